"""Where the trained texts lie in one render, whatever the template does: by marks in a second one.

This is the road for conversations that no skeleton serves (``skeleton.py``): the template looks
into their texts, or repeats them. The conversation is rendered again with two non-characters around
each trained content. Without its marks that second render must be, byte for byte, the first one,
and what lies between the marks must be the content; then the places are exact for this very
conversation, and repeated, empty or role-named contents cannot confuse them. Three placements of
the marks are tried:

    around the content              the template copies it
    around the stripped content     the template trims it
    behind the stripped content     the template takes it apart and puts it together (Qwen3's
                                    thinking); the text before the mark must then be the content

When none fits, the template changed the message and the record is rejected: nothing is guessed.
A template with ``{% generation %}`` says itself what is trained, so its blocks are marked instead.

Rendering prefixes (``messages[:i]``) is not done: templates that strip the thinking of earlier
turns render a prefix differently from the whole. Rejected, too: searching the contents in the
render (ambiguous), and transformers' own ``return_assistant_tokens_mask`` (silently empty without
generation tags, misplaced inside macros).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Final

from megasft.data.chat_template import CLOSE, OPEN, ChatTemplate
from megasft.data.conversation import REASONING_KEYS, BadRecordError, Conversation, Message
from megasft.data.shape import split_blanks
from megasft.data.tool_calls import calls_of

MARKS: Final = re.compile(f"[{OPEN}{CLOSE}]")
Block = tuple[int, int, int]  # first character, one behind the last, message


def trained_contents(template: ChatTemplate, conversation: Conversation, text: str) -> list[Block]:
    """Return where the trained contents lie in a conversation's render.

    Raises:
        BadRecordError: The template changes one of them, or it is more than a text.
    """
    _require_plain(conversation)
    trained = [(i, m) for i, m in enumerate(conversation.messages) if m.trained]
    for mark, locate in _PLACEMENTS:
        messages = [
            m.as_dict(mark(m.content) if m.trained and m.content is not None else m.content)
            for m in conversation.messages
        ]
        try:
            marked = template.run(messages, conversation.tools)
        except BadRecordError:
            continue  # a template may dislike the marks; another placement can do
        bare, places = _take_marks(marked)
        if bare == text:
            spans = locate(text, places, [m.content or "" for _, m in trained])
            if spans is not None:
                return [(*span, i) for span, (i, _) in zip(spans, trained, strict=True)]
    numbers = ", ".join(str(i) for i, _ in trained)
    raise BadRecordError(
        "the template changed the message",
        f"the chat template does not render all trained messages ({numbers}) as they are (some "
        "templates strip earlier thinking): label those it changes 0, or use a template with "
        "{% generation %}",
    )


def generation_blocks(conversation: Conversation, marked: str, text: str) -> list[Block]:
    """Return the generation block of each assistant message, in a render with marked blocks.

    Args:
        conversation: What was rendered.
        marked: Its render, with marks around the blocks.
        text: Its render without marks.

    Raises:
        BadRecordError: There is not one block for each assistant message.
    """
    bare, places = _take_marks(marked)
    answers = [i for i, m in enumerate(conversation.messages) if m.role == "assistant"]
    blocks = _joined(places)
    if bare != text or blocks is None or len(blocks) != len(answers):
        raise BadRecordError(
            "the template changed the message",
            f"the chat template marks {len(blocks or ())} {{% generation %}} blocks for "
            f"{len(answers)} assistant messages",
        )
    return [(start, end, index) for (start, end), index in zip(blocks, answers, strict=True)]


def _joined(places: Places) -> list[tuple[int, int]] | None:
    """Return the blocks between marks: those without a gap are one, empty ones are none."""
    if [kind for kind, _ in places] != [OPEN, CLOSE] * (len(places) // 2):
        return None
    blocks: list[tuple[int, int]] = []
    for (_, start), (_, end) in zip(places[::2], places[1::2], strict=True):
        if blocks and blocks[-1][1] == start:
            blocks[-1] = (blocks[-1][0], end)
        elif end > start:
            blocks.append((start, end))
    return blocks


def require_whole(index: int, message: Message, block: str) -> None:
    """Refuse a generation block that leaves out a part of its message.

    Raises:
        BadRecordError: A text, a thinking or a part of a tool call is missing.
    """
    wanted = [message.content or ""]
    wanted += [str(message.extra[key]) for key in REASONING_KEYS if message.extra.get(key)]
    has_calls = all(call.is_in(block) for call in calls_of(message))
    if not has_calls or not all(part.strip() in block for part in wanted):
        raise not_whole(index)


def not_whole(index: int) -> BadRecordError:
    """Return the error for a generation block that leaves out a part of its message."""
    return BadRecordError(
        "the template changed the message",
        f"the {{% generation %}} block of message {index} does not hold all of it",
    )


def _require_plain(conversation: Conversation) -> None:
    for index, message in enumerate(conversation.messages):
        found = [key for key in ("tool_calls", *REASONING_KEYS) if message.extra.get(key)]
        if message.trained and (found or message.content is None):
            raise BadRecordError(
                "needs {% generation %}",
                f"message {index} holds `{(found or ['no content'])[0]}`, and where that begins "
                "and ends cannot be seen from what the chat template makes of it: use a template "
                "with {% generation %}, or label the message 0",
            )


def _around(content: str) -> str:
    return f"{OPEN}{content}{CLOSE}"


def _around_stripped(content: str) -> str:
    lead, body, tail = split_blanks(content)
    return f"{lead}{OPEN}{body}{CLOSE}{tail}"


def _behind_stripped(content: str) -> str:
    lead, body, tail = split_blanks(content)
    return f"{lead}{body}{CLOSE}{tail}"


Places = list[tuple[str, int]]
Pairs = list[tuple[int, int]] | None


def _between(text: str, places: Places, contents: Sequence[str]) -> Pairs:
    if [kind for kind, _ in places] != [OPEN, CLOSE] * len(contents):
        return None
    spans = [(places[i][1], places[i + 1][1]) for i in range(0, len(places), 2)]
    same = (text[a:b] == c for (a, b), c in zip(spans, contents, strict=True))
    return spans if all(same) else None


def _between_stripped(text: str, places: Places, contents: Sequence[str]) -> Pairs:
    return _between(text, places, [c.strip() for c in contents])


def _before(text: str, places: Places, contents: Sequence[str]) -> Pairs:
    bodies = [c.strip() for c in contents]
    if [kind for kind, _ in places] != [CLOSE] * len(bodies) or not all(bodies):
        return None
    spans = [(end - len(c), end) for (_, end), c in zip(places, bodies, strict=True)]
    same = (a >= 0 and text[a:b] == c for (a, b), c in zip(spans, bodies, strict=True))
    return spans if all(same) else None


Mark = Callable[[str], str]
Locate = Callable[[str, Places, Sequence[str]], Pairs]
_PLACEMENTS: Final[tuple[tuple[Mark, Locate], ...]] = (
    (_around, _between),
    (_around_stripped, _between_stripped),
    (_behind_stripped, _before),
)


def _take_marks(marked: str) -> tuple[str, Places]:
    # "a<OPEN>b<CLOSE>" -> "ab", [(OPEN, 1), (CLOSE, 2)]
    places = [(m[0], m.start() - i) for i, m in enumerate(MARKS.finditer(marked))]
    return MARKS.sub("", marked), places
