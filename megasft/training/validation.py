"""Several validation stores: their names, and which of them are reported apart.

Megatron 0.19 has a mechanism of its own (``--multiple-validation-sets``), which does not fit. It
works with ``--full-validation`` alone (``build_train_valid_test_data_loaders`` raises otherwise).
That takes the iterations of a set from the length of its loader, in micro-batches, and then reads
as many global batches: a set is read again for each micro-batch of a step, in rows one by one.

So all sets are evaluated in one pass. Each row knows its set, and the table of sums
(``loss/breakdown.py``) has slots for each: the layout does not matter, and a set needs no whole
batch of its own. Each store keeps its own numbering of categories: they are never joined with those
of another store.
"""

from collections.abc import Sequence
from pathlib import Path

from megasft.errors import FlagError


def named_stores(values: Sequence[str] | None) -> dict[str, str]:
    """Return name to folder of what ``--megasft-valid-data`` was given, in that order.

    Raises:
        FlagError: Two have one name, or a name or a folder is missing.

    Example:
        >>> named_stores(["data/maths", "talk=data/chat_v2"])
        {'maths': 'data/maths', 'talk': 'data/chat_v2'}
    """
    stores: dict[str, str] = {}
    for value in values or ():
        name, path = _name_and_path(value)
        if not name or not path:
            raise FlagError(f"--megasft-valid-data {value} is neither STORE nor NAME=STORE")
        if name in stores:
            raise FlagError(
                f"--megasft-valid-data {stores[name]} and {path} are both called {name}, and each "
                f"is logged by its name; give one another: other={path}"
            )
        stores[name] = path
    return stores


def reported_names(values: Sequence[str] | None) -> tuple[str, ...]:
    """Return the names to report apart: none for a single store that was given no name."""
    stores = named_stores(values)
    is_unnamed = list(stores.values()) == list(values or ())
    return () if len(stores) == 1 and is_unnamed else tuple(stores)


def _name_and_path(value: str) -> tuple[str, str]:
    name, separator, path = value.partition("=")
    # A folder may have "=" in its name, too.
    if not separator or "/" in name or Path(value).exists():
        return Path(value).absolute().name, value
    return name, path
