import pytest

from megasft.data.categories import Categories
from megasft.data.conversation import BadRecordError, Category


def test_names_get_ids_in_the_order_they_appear() -> None:
    categories = Categories()
    wanted = [Category(None, "maths"), Category(), Category(2, "code"), Category(None, "chat")]
    wanted += [Category(None, "maths"), Category(7, None), Category(None, "code")]
    assert [categories.resolve(c) for c in wanted] == [1, 0, 2, 3, 1, 7, 2]
    assert categories.as_meta() == {"1": "maths", "2": "code", "3": "chat", "7": "7"}


def test_id_zero_is_no_category_whatever_its_name() -> None:
    categories = Categories()
    assert categories.resolve(Category(0, "maths")) == 0
    assert categories.as_meta() == {}


def test_a_later_record_may_name_an_id() -> None:
    categories = Categories()
    assert [categories.resolve(Category(4, n)) for n in (None, "maths", None)] == [4, 4, 4]
    assert categories.as_meta() == {"4": "maths"}


@pytest.mark.parametrize("second", [Category(1, "code"), Category(2, "maths")])
def test_two_names_for_an_id_and_two_ids_for_a_name_conflict(second: Category) -> None:
    categories = Categories()
    categories.resolve(Category(1, "maths"))
    with pytest.raises(BadRecordError, match="category"):
        categories.resolve(second)
