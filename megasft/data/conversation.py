"""What a conversation is, and everything that can be wrong with one.

A record that breaks a rule raises ``BadRecordError``, which carries a short reason (the key it is
counted under, one of ``REASONS``) and a detail written for the person who owns the file. Nothing
is mended on the way: an unknown role or a label list of the wrong length is the user's to decide.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from megasft.errors import DataError

ROLES: Final = ("system", "user", "assistant", "tool")
TRAIN_ON: Final = ("all-turns", "last-turn", "labels", "everything")
"""What is trained: all assistant messages but those labelled 0, the last one unless labelled 0,
those labelled above 0 alone, or every token of the conversation as one turn."""
LABEL_KEYS: Final = (
    *("label", "labels", "loss", "weight", "train", "training", "trainable"),
    *("loss_mask", "step_loss_mask", "loss_scale", "loss_weight"),
)
"""Keys of a message that say whether it is trained, and with which weight; `mask` is none, as it
means both."""
_WEIGHTS: Final = (1.1754944e-38, 3.4028234e38)
"""The least and the largest weight but 0: those that float32 holds at its full precision."""
REASONING_KEYS: Final = ("reasoning_content", "thinking", "reasoning")
MAX_RECORD_BYTES: Final = 16 * 2**20
"""Some four million tokens of one conversation; what is longer is a file without line ends."""
_MAX_CATEGORY_ID: Final = 2**31 - 1  # turn records are int32

REASONS: Final = (
    "not JSON",
    "not an object",
    "record too long",
    "missing field",
    "wrong type",
    "unknown role",
    "no assistant turn",
    "nothing to train",
    "bad labels",
    "bad category",
    "media",
    "system given twice",
    "special token in the text",
    "the template refused",
    "the template changed the message",
    "needs {% generation %}",
    "turn without tokens",
    "too long",
    "not supported",
    "failed",
)
"""Every reason a record can be rejected for."""


class BadRecordError(DataError):
    """One record cannot become a sample."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail
        assert reason in REASONS, reason


class UnfaithfulError(DataError):
    """A fast road does not do what its reference does; the build begins again without it.

    Attributes:
        road: ``render`` or ``encode``.
    """

    def __init__(self, road: str, detail: str) -> None:
        super().__init__(road, detail)
        self.road, self.detail = road, detail

    def __str__(self) -> str:
        return self.detail


class Category(NamedTuple):
    """What a record says about its category; both None when it says nothing."""

    id: int | None = None
    name: str | None = None


class Message(NamedTuple):
    """One message of a conversation.

    Attributes:
        role: One of ``ROLES``.
        content: Its text; None only for an assistant message that just calls tools.
        trained: An assistant message whose tokens are labels.
        extra: Other fields the chat template may read (``tool_calls``, ``name``, ...).
        category: Its own one, where the messages of a record have several.
        labelled: The record says itself whether it is trained.
        weight: Of its turns in the loss; it counts only where the message is trained.
    """

    role: str
    content: str | None
    trained: bool
    extra: Mapping[str, Any]
    category: Category | None = None
    labelled: bool = False
    weight: float = 1.0

    def as_dict(self, content: str | None) -> dict[str, Any]:
        """Return what a chat template is given, with this content in place of the own one."""
        return {"role": self.role, "content": content, **self.extra}


class Conversation(NamedTuple):
    """A valid record: at least one message is trained.

    Attributes:
        messages: At least one; the text itself, as an answer, for pretraining text.
        category: What the record says of it.
        tools: Schemas of functions the model may call.
        template_kwargs: What the chat template is given beside messages and tools.
        is_text: Pretraining text, which no chat template sees.
        unread: Keys of the record that nobody reads.
        has_fields: It may hold something else than contents and thinking.
    """

    messages: tuple[Message, ...]
    category: Category
    tools: tuple[Mapping[str, Any], ...] | None = None
    template_kwargs: Mapping[str, Any] = MappingProxyType({})
    is_text: bool = False
    unread: tuple[str, ...] = ()
    has_fields: bool = True


def make_messages(
    raw: list[Any], labels: Any, *, train_on: str = "all-turns"
) -> tuple[Message, ...]:
    """Check the messages of a record and decide which are trained.

    Args:
        raw: Objects with ``role`` and ``content``.
        labels: None, or a list of numbers as long as ``raw``: 0 is not trained, any other is the
            weight; only an assistant's counts.
        train_on: One of ``TRAIN_ON``.

    Raises:
        BadRecordError: A role is unknown, a text is missing, or nothing would be trained.
    """
    given = _record_labels(labels, count=len(raw))
    default = float(train_on != "labels")
    messages = tuple([_message(item, i, given, default) for i, item in enumerate(raw)])
    if train_on == "everything":
        return tuple(m._replace(trained=False, weight=1.0) for m in messages)
    answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    if not answers:
        raise BadRecordError(
            "no assistant turn", f"none of the {len(messages)} messages is assistant's"
        )
    if train_on == "last-turn":
        messages = tuple(
            m._replace(trained=m.trained and i == answers[-1]) for i, m in enumerate(messages)
        )
    for i in answers:
        if messages[i].trained:
            return messages
    raise BadRecordError("nothing to train", _NOTHING[train_on])


def make_category(meta: Any) -> Category:
    """Read ``category_id`` and ``category_name`` of a record's ``meta``."""
    if not isinstance(meta, dict):
        return Category()
    number, name = meta.get("category_id"), meta.get("category_name")
    if number is not None and (type(number) is not int or not 0 <= number <= _MAX_CATEGORY_ID):
        raise BadRecordError(
            "bad category", f"meta.category_id must be an integer >= 0, not {number!r}"
        )
    if name is not None and not isinstance(name, str):
        raise BadRecordError("bad category", f"meta.category_name must be a string, not {name!r}")
    return Category(number, name or None)


def category_from_field(record: Mapping[str, Any], key: str) -> Category:
    """Read a category from a field of its own: a string is its name, an integer its id."""
    value = record.get(key)
    if isinstance(value, str):
        return Category(name=value or None)
    if value is None:
        return Category()
    if type(value) is not int:
        raise BadRecordError("bad category", f"`{key}` must be a string or integer, not {value!r}")
    return make_category({"category_id": value})


_NOTHING: Final = {
    "all-turns": "the labels of all assistant messages are 0",
    "last-turn": "the label of the last assistant message is 0 (--train-on last-turn)",
    "labels": "no assistant message has an own label above 0 (--train-on labels)",
}


def _record_labels(labels: Any, *, count: int) -> list[float] | None:
    if labels is None:
        return None
    if not isinstance(labels, list) or len(labels) != count:
        found = f"{len(labels)} entries" if isinstance(labels, list) else repr(labels)
        raise BadRecordError(
            "bad labels", f"labels must be a list of {count} (one a message): {found}"
        )
    return [_weight(label) for label in labels]


def _weight(label: Any) -> float:
    least, most = _WEIGHTS
    if type(label) not in (int, bool, float) or not (label == 0 or least <= label <= most):
        raise BadRecordError(
            "bad labels",
            f"a label or weight is 0 (or false), 1 (or true) or another number between {least:.1e} "
            f"and {most:.1e}, not {label!r:.40}; write 0 where nothing is to be trained, else 1 or "
            "the weight",
        )
    return float(label)


_NOTHING_ELSE: Final[dict[str, Any]] = {}


def _message(item: Any, index: int, given: list[float] | None, default: float) -> Message:
    if type(item) is dict and len(item) == 2:  # nearly all: a role, a text, and nothing else
        role, content = item.get("role"), item.get("content")
        if type(content) is str and role in ROLES:
            weight = given[index] if given else default
            trained = role == "assistant" and weight > 0
            return Message(role, content, trained, _NOTHING_ELSE, None, given is not None, weight)
    if not isinstance(item, dict):
        raise BadRecordError("wrong type", f"message {index} is not an object")
    if "role" not in item:
        raise BadRecordError("missing field", f"message {index} has no `role`")
    role = item["role"]
    if role not in ROLES:
        raise BadRecordError(
            "unknown role", f"message {index} has role {role!r}; known are {', '.join(ROLES)}"
        )
    own = [key for key in LABEL_KEYS if item.get(key) is not None]
    if len(own) > (given is None):
        listed = [*own, *(["the record's `labels`"] if given else [])]
        raise BadRecordError(
            "bad labels", f"message {index} is labelled twice: {', '.join(listed)}; keep one"
        )
    weight = _weight(item[own[0]]) if own else given[index] if given else default
    skipped = {"role", "content", *LABEL_KEYS}
    extra = {k: v for k, v in item.items() if k not in skipped and v is not None}
    content = _content(item, index, may_be_absent=role == "assistant" and "tool_calls" in extra)
    trained = role == "assistant" and weight > 0
    return Message(role, content, trained, extra, labelled=bool(own or given), weight=weight)


def _content(item: dict[str, Any], index: int, *, may_be_absent: bool) -> str | None:
    content = item.get("content")
    if content is None and may_be_absent:
        return None
    if content is None:
        raise BadRecordError("missing field", f"message {index} ({item['role']}) has no `content`")
    if isinstance(content, list) and content:
        return "".join(_text_part(part, index) for part in content)
    if not isinstance(content, str):
        raise BadRecordError(
            "wrong type",
            f"the content of message {index} is {type(content).__name__}; only text can be trained",
        )
    return content


def _text_part(part: Any, index: int) -> str:
    kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
    if kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise BadRecordError(
        "wrong type",
        f'the content of message {index} has a part {kind}; only {{"type": "text", "text": ...}} '
        "can be trained",
    )
