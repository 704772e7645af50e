import pytest

from megasft.data.chat_template import ChatTemplate, LookedFor

ROLE_TESTS = "{% if m.role == 'user' or m['role'] in ['tool', 'system'] %}x{% endif %}"
LOOKS_INSIDE = (
    "{% if '</think>' in c %}{{ c.split('<x>')[0].rstrip('\\n') }}{% endif %}"
    "{% if c.startswith('<r>') and not c[:3] == 'abc' %}{{ c | replace('a', 'b') }}{% endif %}"
    "{{ c | trim('#\\n') }}{{ raise_exception('not this') }}{{ namespace(x='nor this').x }}"
)


def looks_for(source: str) -> tuple[set[str], ...]:
    return tuple(map(set, ChatTemplate(source, {}).looks_for))


def test_what_a_template_looks_for_is_read_from_its_syntax_tree() -> None:
    assert looks_for(ROLE_TESTS) == (set(), {"user", "tool", "system"}, set())
    contained, equal, edges = looks_for(LOOKS_INSIDE)
    assert contained == {"</think>", "<x>", "<r>", "abc", "a", "b"}
    assert equal == set()
    assert edges == {"#"}  # white space is cut off before texts are compared
    assert looks_for("{{ messages[0].content | trim }}{{ bos_token }}") == (set(), set(), set())


@pytest.mark.parametrize(
    ("texts", "is_noticed"),
    [
        (["Hello", "1 < 2"], False),
        (["Hello", "so </think>"], True),
        (["user"], True),
        (["the user"], False),
        (["#1"], True),
        (["C# is"], False),
    ],
)
def test_texts_are_noticed_where_the_template_would_see_them(
    texts: list[str], is_noticed: bool
) -> None:
    looks = LookedFor(frozenset({"</think>"}), frozenset({"user"}), frozenset("#"))
    assert looks.meet(texts, "\0".join(texts)) is is_noticed


def test_two_texts_do_not_make_one_between_them() -> None:
    assert not LookedFor(frozenset({"ab"}), frozenset(), frozenset()).meet(["a", "b"], "a\0b")
