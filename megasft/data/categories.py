"""Numbers for category names, given in input order so that the same inputs get the same numbers."""

from __future__ import annotations

from megasft.data.conversation import BadRecordError, Category
from megasft.schema import NO_CATEGORY


class Categories:
    """The categories met so far; an id has one name and a name one id."""

    def __init__(self) -> None:
        self._names: dict[int, str | None] = {}
        self._ids: dict[str, int] = {}

    def resolve(self, category: Category) -> int:
        """Return the id of a record's category, giving a new name the smallest free id above 0.

        Raises:
            BadRecordError: The id has another name already, or the name another id.
        """
        number, name = category.id, category.name
        if number == NO_CATEGORY or (number is None and name is None):
            return NO_CATEGORY
        if name is None:
            assert number is not None
            self._names.setdefault(number, None)
            return number
        known = self._ids.get(name)
        if number is None:
            number = known or self._free_id()
        if known is not None and known != number:
            raise BadRecordError("bad category", f"category {name!r} is {known} and {number}")
        named = self._names.get(number)
        if named is not None and named != name:
            raise BadRecordError("bad category", f"category {number} is {named!r} and {name!r}")
        self._names[number], self._ids[name] = name, number
        return number

    def as_meta(self) -> dict[str, str]:
        """Return id -> name for store.json; a category without a name is called by its id."""
        return {str(i): self._names[i] or str(i) for i in sorted(self._names)}

    def _free_id(self) -> int:
        number = NO_CATEGORY + 1
        while number in self._names:
            number += 1
        return number
