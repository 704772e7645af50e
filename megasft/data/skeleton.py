"""What a chat template puts around the texts of one shape: a native renderer, learnt from Jinja.

A shape (``shape.py``) is rendered once with names in the place of its texts. Cut at the names, that
render is the skeleton of every conversation of the shape: rendering one is then a join of strings,
some hundred times faster than Jinja, and its trained spans are known from the skeleton. So each
template gets its native renderer, the published ones, yours, and those of models to come; nothing
is kept per model family, and nothing can go stale.

Price: it holds only while the template does not look into the texts. What a template looks for is
read from its syntax tree, and a conversation that holds any of it is compared with Jinja itself;
besides, each new shape and a sample of all conversations are (``render.py``). Rejected: renderers
written by hand for each family (each new template would wait for one, and an edited template is
like none of them); strings that remember where they came from (Jinja's filters forget it).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence, Set
from itertools import accumulate
from typing import Final, NamedTuple

from megasft.data.chat_template import CLOSE, OPEN, ChatTemplate
from megasft.data.conversation import BadRecordError, Conversation
from megasft.data.marks import generation_blocks, not_whole
from megasft.data.shape import REASONING, TOOL_NAME, Leaf, Probe, probe
from megasft.data.tool_calls import calls_of, with_mark
from megasft.data.turn_bounds import Place, Span, TurnBounds, num_shared

_NAME: Final = re.compile(r'Qz7(\d{6})(?:(\\*)")?vK')


class Edge(NamedTuple):
    """A position in a skeleton: so many characters into the ``piece``-th glue."""

    piece: int
    offset: int


class SkeletonSpan(NamedTuple):
    """A trained span of a skeleton; see ``turn_bounds.Span``."""

    start: Edge
    end: Edge
    stop: str | None
    message: int


class Skeleton(NamedTuple):
    """A render without its texts.

    Attributes:
        pieces: Glue, place of a leaf, glue, ... glue; places of leaves are empty.
        order: Which leaf each place takes; a leaf that is missing is not rendered.
        levels: How often JSON escapes the leaf there; empty if it never does.
        spans: Trained spans; ascending, not overlapping.
        stripped: Trained messages whose thinking is not rendered.
        num_leaves: Leaves of the shape, the missing ones counted.
    """

    pieces: tuple[str, ...]
    order: tuple[int, ...]
    levels: tuple[int, ...]
    spans: tuple[SkeletonSpan, ...]
    stripped: frozenset[int]
    num_leaves: int

    def join(self, leaves: Sequence[str]) -> tuple[str, list[Span]]:
        """Return the render of a conversation of this shape, and its trained spans."""
        pieces = list(self.pieces)
        texts = [leaves[number] for number in self.order]
        if self.levels:
            texts = list(map(_escaped, texts, self.levels))
        pieces[1::2] = texts
        ends = [0, *accumulate(map(len, pieces))]
        spans = [
            Span(ends[2 * a.piece] + a.offset, ends[2 * b.piece] + b.offset, stop, message)
            for a, b, stop, message in self.spans
        ]
        return "".join(pieces), spans


def learn(
    template: ChatTemplate, bounds: TurnBounds, conversation: Conversation
) -> Skeleton | None:
    """Learn the skeleton of a conversation's shape; None if the template does not have one.

    Raises:
        BadRecordError: The template refuses the shape, or does not render a trained text.
    """
    asked = probe(conversation, _name)
    tools = conversation.tools
    text = template.run(asked.messages, tools)
    found = _find_names(text)
    order = [name.leaf for name in found]
    firsts = {name.leaf: name for name in reversed(found)}
    for name in found:
        if name is not firsts[name.leaf] and asked.leaves[name.leaf].kind != TOOL_NAME:
            return None  # a text is rendered twice: which of them is trained only marks can tell
    stripped = _missing_thinking(conversation, asked, firsts.keys(), text)
    once = sorted(firsts.values(), key=lambda name: name.start)
    if template.has_generation_tags:
        spans = _tagged_spans(template, bounds, conversation, asked, once, text)
    else:
        spans = _plain_spans(template, bounds, conversation, asked, once, text)
    if spans is None:
        return None
    borders = [0, *(edge for name in found for edge in (name.start, name.end)), len(text)]
    glue = [text[a:b] for a, b in zip(borders[::2], borders[1::2], strict=True)]
    pieces = [""] * (2 * len(found) + 1)
    pieces[::2] = glue
    kept = []
    for span in spans:
        start, end = _edge(span.start, borders), _edge(span.end, borders)
        if start is None or end is None:
            return None
        kept.append(SkeletonSpan(start, end, span.stop, span.message))
    levels = tuple(name.level for name in found)
    return Skeleton(
        tuple(pieces),
        tuple(order),
        levels if any(levels) else (),
        tuple(kept),
        stripped,
        len(asked.leaves),
    )


def _name(number: int, kind: str) -> str:
    # The quote tells a text from one the template writes as JSON; names of tools need no escape.
    return f"Qz7{number:06d}vK" if kind == TOOL_NAME else f'Qz7{number:06d}"vK'


class _Found(NamedTuple):
    """A name in the render of a probe: its leaf, how often JSON escaped it, and its bounds."""

    leaf: int
    level: int
    start: int
    end: int


def _find_names(text: str) -> list[_Found]:
    return [
        _Found(int(m[1]), len(m[2] or "").bit_length(), m.start(), m.end())
        for m in _NAME.finditer(text)
    ]


def _escaped(text: str, level: int) -> str:
    for _ in range(level):
        text = json.dumps(text, ensure_ascii=False)[1:-1]
    return text


def _edge(position: int, borders: list[int]) -> Edge | None:
    """Return a position as an edge; None inside a name."""
    for piece in range(len(borders) // 2):
        start, end = borders[2 * piece], borders[2 * piece + 1]
        if start <= position <= end:
            return Edge(piece, position - start)
    return None


def _missing_thinking(
    conversation: Conversation, asked: Probe, rendered: Set[int], text: str
) -> frozenset[int]:
    trained = {i for i, m in enumerate(conversation.messages) if m.trained}
    missing = [
        leaf
        for number, leaf in enumerate(asked.leaves)
        if leaf.message in trained and number not in rendered
        if leaf.kind != TOOL_NAME or not _is_named_by_id(conversation, leaf.message, text)
    ]
    for leaf in missing:
        if leaf.kind != REASONING:
            raise BadRecordError(
                "the template changed the message",
                f"the chat template does not render the {leaf.kind} of message {leaf.message}, "
                "which is to be trained: label it 0, or mend the template",
            )
    return frozenset(leaf.message for leaf in missing)


def _plain_spans(
    template: ChatTemplate,
    bounds: TurnBounds,
    conversation: Conversation,
    asked: Probe,
    found: list[_Found],
    text: str,
) -> list[Span] | None:
    def prompt(count: int) -> str:
        return template.run(asked.messages[:count], conversation.tools, add_generation_prompt=True)

    owners = [asked.leaves[name.leaf].message for name in found]
    if owners != sorted(owners):
        return None
    spans: list[Span] = []
    cursor = 0
    for index, message in enumerate(conversation.messages):
        if message.role != "assistant":
            continue
        place = _place(index, asked.leaves, found, cursor, text)
        has_names = place.calls_tools
        if has_names or _is_named_by_id(conversation, index, text):
            place = place._replace(calls_tools=True)
            span = bounds.span(text, place, prompt) if has_names else None
            if span is None:
                place = _with_arguments(place, template, conversation, asked, text)
                span = bounds.span(text, place, prompt)
        else:
            span = bounds.span(text, place, prompt)
        if span is None and message.trained:
            return None
        if span is not None:
            cursor = max(cursor, span.end)
            if message.trained:
                spans += bounds.apart(text, span)
    return spans


def _place(
    index: int,
    leaves: list[Leaf],
    found: list[_Found],
    cursor: int,
    text: str,
) -> Place:
    """Return where an assistant message lies; one without a text somewhere in what is left."""
    ahead = [name for name in found if leaves[name.leaf].message < index]
    own = [name for name in found if leaves[name.leaf].message == index]
    behind = [name for name in found if leaves[name.leaf].message > index]
    after = max(cursor, ahead[-1].end) if ahead else cursor
    before = behind[0].start if behind else len(text)
    anchor = text[ahead[-1].start : after] if ahead else ""
    calls = any(leaves[name.leaf].kind == TOOL_NAME for name in own)
    start, end = (own[0].start, own[-1].end) if own else (before, before)
    return Place(index, start, end, after, before, calls, anchor=anchor, is_empty=not own)


def _is_named_by_id(conversation: Conversation, index: int, text: str) -> bool:
    calls = [*calls_of(conversation.messages[index])]
    return bool(calls) and all(call.is_named_by_id(text) for call in calls)


def _with_arguments(
    place: Place, template: ChatTemplate, conversation: Conversation, asked: Probe, text: str
) -> Place:
    """Return a place that reaches to the arguments of its last call.

    One more argument changes the render where the arguments end, and nothing behind.
    """
    marked = with_mark(asked.messages, place.message)
    try:
        other = template.run(marked, conversation.tools) if marked else text
    except BadRecordError:
        return place
    if other == text:
        return place
    end = len(text) - num_shared(text[::-1], other[::-1])
    start = end if place.is_empty else place.start
    return place._replace(
        start=start, end=start if place.is_empty else place.end, is_empty=False, calls_end=end
    )


def _tagged_spans(
    template: ChatTemplate,
    bounds: TurnBounds,
    conversation: Conversation,
    asked: Probe,
    found: list[_Found],
    text: str,
) -> list[Span] | None:
    marked = template.run(asked.messages, conversation.tools, mark_generation=True)
    if OPEN in text or CLOSE in text:
        return None
    blocks = generation_blocks(conversation, marked, text)

    def prompt(count: int) -> str:
        return template.run(asked.messages[:count], conversation.tools, add_generation_prompt=True)

    spans = []
    for start, end, index in blocks:
        if conversation.messages[index].trained:
            place = Place(index, start, end, start, len(text), False)
            places = [n for n in found if asked.leaves[n.leaf].message == index]
            last = _with_arguments(place, template, conversation, asked, text).calls_end or start
            if last > end or any(not start <= n.start <= n.end <= end for n in places):
                raise not_whole(index)
            spans.append(bounds.in_block(text, place, prompt))
    return spans
