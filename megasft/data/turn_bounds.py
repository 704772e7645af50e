r"""Where a turn begins and ends in a render: behind the inference prompt, up to the stop token.

A turn is what the model has to say when it is asked with ``add_generation_prompt=True``. So it
begins where that prompt ends:

    the template's generation prompt is looked for before the answer   <|im_start|>assistant\n
    a template without one: the end of its render of the messages
    before the answer                                                  [INST] Hi [/INST]
    neither: at the answer itself

Where the prompt opens the thinking and an answer does not think, or calls a tool, the turn begins
where the two part (Cohere's). An empty ``<think>`` block behind it was put there by the template
(or by the prompt of a model that is asked not to think), so the turn begins behind that, as it does
behind the rest of such a block. A block of ``{% generation %}`` begins no earlier, either.

It ends with the stop token: the special token behind the answer, white space between them or not;
for some templates that is the next role token. Where several follow each other, all up to the
tokenizer's eos belong to the turn, the words of closing tags among them (Kimi K3's). Behind tool
calls it is the token that ends a plain answer, because their markup may hold special tokens, too;
where there is none, or another message begins before it, the first one behind the arguments of the
last call; and where nothing follows at all, the end of the render.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, Final, NamedTuple

from megasft.data.chat_template import ChatTemplate, Tools
from megasft.data.conversation import REASONING_KEYS, BadRecordError

_OPENS: Final = (
    r"<(?:\w+:)?think(?:ing)?(?::\w+)?>|\[THINK\]|<\|START_THINKING\|>|<\|channel>thought\n"
    r"|<\|open\|>think<\|sep\|>"
)
CLOSES_THINKING: Final = (
    r"</(?:\w+:)?think(?:ing)?(?::\w+)?>|\[/THINK\]|<\|END_THINKING\|>|<channel\|>"
    r"|<\|close\|>think<\|sep\|>"
)
_EMPTY_THINKING: Final = re.compile(
    rf"\s*(?:{_OPENS})\s*(?:{CLOSES_THINKING})\n{{0,2}}|\s*(?:{CLOSES_THINKING})"
)
"""A closing tag alone is an empty block, too, as GLM 4.7 writes it."""
_REST_OF_EMPTY_THINKING: Final = re.compile(rf"\s*(?:{CLOSES_THINKING})\n{{0,2}}")
_OPENED_BEFORE: Final = re.compile(rf"(?:{_OPENS})\s{{0,4}}\Z")
_THINKING_TAIL: Final = re.compile(rf"(?:{_OPENS})\s*(?:(?:{CLOSES_THINKING})\s*)?\Z")
_THINKING_OPENED: Final = re.compile(rf"(?:{_OPENS})\s*\Z")
_GLUE: Final = re.compile(rf"\s*(?:(?:{_OPENS})\s*)?(?:(?:{CLOSES_THINKING})\s*)?")
_PART_OF_TAG: Final = re.compile(r"<[^<>\s]*\Z")
_PROBES: Final = ("Qz7user0vK", "Qz7answer0vK")
_PROBE_TOOLS: Final = (
    {
        "type": "function",
        "function": {
            "name": "probe",
            "description": "A probe.",
            "parameters": {"type": "object", "properties": {}, "required": []},
        },
    },
)
_PROBE_CALL: Final = {"type": "function", "function": {"name": "probe", "arguments": {"a": 1}}}
_PROBE_ANSWERS: Final[tuple[dict[str, Any], ...]] = (
    {"content": _PROBES[1]},
    {"content": _PROBES[1], **dict.fromkeys(REASONING_KEYS, _PROBES[1])},
    {"content": "", "tool_calls": [_PROBE_CALL]},
)
"""How an answer may begin: with its text, with thinking, with a call."""


class Span(NamedTuple):
    """Supervised characters of a render.

    Attributes:
        start: First character of the turn.
        end: Behind its last character, or behind its stop token.
        stop: The special token that ends the turn, included in the span; None if there is none.
        message: Index of the message.
    """

    start: int
    end: int
    stop: str | None
    message: int


class Place(NamedTuple):
    """Where the texts of a trained message lie in a render.

    Attributes:
        message: Its index.
        start: First character of its first text.
        end: Behind its last text.
        after: End of what lies before and belongs to other messages.
        before: Start of what lies behind and belongs to other messages.
        calls_tools: Its first or last text may be a tool's name.
        is_alone: No text of another message lies between ``after`` and ``start``.
        anchor: What the render reads up to ``after``, unique in it; empty if nothing is.
        is_empty: It has no text in the render; its turn is somewhere between ``after`` and
            ``before``, the first if there are several.
        calls_end: At or shortly before the end of the arguments of its last call; None if unknown.
    """

    message: int
    start: int
    end: int
    after: int
    before: int
    calls_tools: bool
    is_alone: bool = True
    anchor: str = ""
    is_empty: bool = False
    calls_end: int | None = None


class TurnBounds:
    """Finds the bounds of turns in the renders of one chat template.

    Args:
        template: The chat template.
        stops: Special tokens that can end a turn.
        eos: The one that ends a text; empty for none.
    """

    def __init__(self, template: ChatTemplate, stops: Iterable[str], eos: str = "") -> None:
        self._template, self._eos = template, eos
        any_stop = "|".join(re.escape(t) for t in sorted(stops, key=len, reverse=True)) or "(?!)"
        self._stop = re.compile(rf"\s*({any_stop})")
        self._stops_inside = re.compile(rf"((?:{any_stop})+)\s*(?:(?:{any_stop})\s*)*\Z")
        self._any_stop = re.compile(any_stop)
        self._headers = self._generation_prompts()
        self._usual_stop = self._stop_of_a_plain_answer()
        begin = self._any_stop.findall(self._headers[0]) if self._headers else []
        begin = [token for token in begin if token not in (eos, self._usual_stop)]
        self._opener = begin[0] if begin else ""
        headers = "|".join(map(re.escape, self._headers)) if self._usual_stop else ""
        stop = re.escape(self._usual_stop)
        self._next_header = re.compile(rf"({stop})\s*(?:{headers})" if headers else "(?!)")

    def span(self, text: str, place: Place, prompt: Callable[[int], str]) -> Span | None:
        """Return the span of the turn that holds a message, or None if it cannot be told.

        Args:
            text: The whole render.
            place: Where the message lies in it.
            prompt: Render of the first so many messages, with the generation prompt.
        """
        if place.is_empty:
            return self._span_of_nothing(text, place, prompt)
        start = self._start(text, place, prompt)
        if start is None:
            return None
        return self.with_stop(text, start, place)

    def _span_of_nothing(
        self, text: str, place: Place, prompt: Callable[[int], str]
    ) -> Span | None:
        """Return the span of an answer without words: blanks and the stop token."""
        starts = []
        for header in self._headers:
            found = text.find(header, place.after, place.before)
            starts += [found + len(header)] if found >= 0 else []
        if not starts and (asked := self._asked(text, place, prompt)) is not None:
            starts.append(asked)
        for start in starts:
            start = _behind_empty_thinking(text, start, place.before)
            if stop := self._stop.match(text, start, place.before):
                return self._ended(text, start, stop.start(1), place)
        return None

    def _asked(self, text: str, place: Place, prompt: Callable[[int], str]) -> int | None:
        """Return where the prompt for this message ends in the whole render."""
        try:
            asked = prompt(place.message)
        except BadRecordError:
            return None
        if text.startswith(asked):
            start = len(asked)
        elif place.anchor and place.anchor in asked:
            # It begins otherwise (tools are shown before the last question alone), and ends so.
            tail = asked.rpartition(place.anchor)[2]
            start = place.after + len(tail) if text.startswith(tail, place.after) else -1
        else:
            start = -1
        specials = list(self._any_stop.finditer(asked)) if start < 0 and place.is_alone else []
        if specials:
            tail = asked[specials[-1].start() :]
            found = text.rfind(tail, place.after, place.start)
            start = found + len(tail) if found >= 0 else -1
        return start if place.after <= start <= place.start else None

    def in_block(self, text: str, place: Place, prompt: Callable[[int], str]) -> Span:
        """Return the span of a block that a template marks as generated.

        Args:
            text: The whole render.
            place: Its bounds; what the prompt already says is left out of the span.
            prompt: Render of the first so many messages, with the generation prompt.
        """
        begin, end = self._behind_prompt(text, place, prompt), place.end
        begin = _behind_empty_thinking(text, begin, end)
        if found := self._stops_inside.search(text, begin, end):
            span = self._ended(text, begin, found.start(), place)
            if span.stop != self._eos:  # the template says that they all are generated
                *_, last = self._any_stop.finditer(found[1])
                span = Span(begin, found.end(1), last[0], place.message)
            return span
        if direct := self._stop.match(text, end):
            return self._ended(text, begin, direct.start(1), place)
        return Span(begin, end, None, place.message)

    def _behind_prompt(self, text: str, block: Place, prompt: Callable[[int], str]) -> int:
        start = block.start
        for header in self._headers:  # the longest first
            found = text.find(header, max(start - len(header), 0), start + len(header))
            if 0 <= found <= start:
                return found + len(header)
        asked = self._asked(text, block._replace(after=0, start=block.end), prompt)
        return max(start, asked or 0)

    def with_stop(self, text: str, start: int, place: Place) -> Span | None:
        """Return the span from a known start to behind the stop token; None if it is unclear."""
        end, before = place.end, place.before
        direct = self._stop.match(text, end)
        usual = text.find(self._usual_stop, end, before) if self._usual_stop else -1
        if self._opener and self._opener in text[end : max(usual, end)]:
            usual = -1  # it ends something that another message begins
        if usual >= 0 and (place.calls_tools or direct is None):
            return self._ended(text, start, usual, place)
        if not place.calls_tools:
            if direct is None:
                return Span(start, end, None, place.message)
            return self._ended(text, start, direct.start(1), place)
        if place.calls_end is None:
            return None
        if stop := self._any_stop.search(text, max(end, place.calls_end), before):
            return self._ended(text, start, stop.start(), place)
        is_last = before == len(text)
        return Span(start, len(text.rstrip()), None, place.message) if is_last else None

    def _ended(self, text: str, start: int, stop: int, place: Place) -> Span:
        """Return the span up to a stop token, or to the eos that follows it without a gap."""
        first = last = self._any_stop.match(text, stop)
        assert first is not None
        while last is not None and last[0] != self._eos:
            last = self._any_stop.match(text, last.end())
        end = last or self._behind_closing_tags(text, first, place.before) or first
        return Span(start, end.end(), end[0], place.message)

    def _behind_closing_tags(
        self, text: str, first: re.Match[str], before: int
    ) -> re.Match[str] | None:
        """Return the eos behind closing tags that are special tokens and words (Kimi K3's)."""
        eos = text.find(self._eos, first.end(), before) if self._eos else -1
        gap = text[first.end() : max(eos, first.end())]
        is_tags = bool(gap) and not gap[0].isspace() and self._any_stop.search(gap) is not None
        is_own = not self._opener or self._opener not in first[0] + gap
        return self._any_stop.match(text, eos) if is_tags and is_own else None

    def apart(self, text: str, span: Span) -> Iterator[Span]:
        """Yield the turns of a message: several where a template begins another one for its call.

        Args:
            text: The whole render.
            span: From the beginning of the first to the end of the last one.
        """
        start = span.start
        for found in self._next_header.finditer(text, span.start, span.end):
            yield Span(start, found.end(1), found[1], span.message)
            start = found.end()
        yield span._replace(start=start)

    def _start(self, text: str, place: Place, prompt: Callable[[int], str]) -> int | None:
        for header in self._headers:
            found = text.rfind(header, place.after, place.start)
            start = found + len(header)
            if found >= 0 and (place.is_alone or _is_glue(text, start, place)):
                return _behind_empty_thinking(text, start, place.start)
        asked = self._asked(text, place, prompt)
        if asked is not None and (place.calls_tools or _is_glue(text, asked, place)):
            return _behind_empty_thinking(text, asked, place.start)
        if place.calls_tools:
            return None
        opened = _THINKING_OPENED.search(text, place.after, place.start)
        return opened.start() if opened else place.start

    def _generation_prompts(self) -> tuple[str, ...]:
        """Return the generation prompt, and what of it stands before answers that begin otherwise.

        Such answers have no thinking, or call a tool. The longest comes first.
        """
        user = [{"role": "user", "content": _PROBES[0]}]
        for tools in (None, _PROBE_TOOLS):  # a template for tools may insist on some
            with suppress(BadRecordError):
                bare = self._template.run(user, tools)
                asked = self._template.run(user, tools, add_generation_prompt=True)
                shared = [*self._shared(user, tools, asked)]
                if asked == bare and min(shared, default=len(asked)) < len(asked):  # asks always
                    bare = bare[: bare.rfind(_PROBES[0]) + len(_PROBES[0])]
                if not asked.startswith(bare) or asked == bare:
                    return ()
                prompt = asked[len(bare) :]
                before = _THINKING_TAIL.sub("", prompt)
                others = {_PART_OF_TAG.sub("", asked[len(bare) : end]) for end in shared}
                # Not half a think block, nor what begins a user's message, too.
                others = {p for p in others if len(p) < len(before) and p not in bare}
                headers = (p for p in {prompt, before, *others} if p.strip())
                return tuple(sorted(headers, key=len, reverse=True))
        return ()

    def _shared(self, user: list[dict[str, Any]], tools: Tools, asked: str) -> Iterator[int]:
        """Yield up to where answers of several kinds begin as the generation prompt does."""
        for answer in _PROBE_ANSWERS:
            try:
                text = self._template.run([*user, {"role": "assistant", **answer}], tools)
            except BadRecordError:
                continue
            end = num_shared(asked, text)
            for special in self._any_stop.finditer(asked):
                if special.start() < end < special.end():
                    end = special.start()
            yield end

    def _stop_of_a_plain_answer(self) -> str:
        messages: list[Mapping[str, Any]] = [
            {"role": "user", "content": _PROBES[0]},
            {"role": "assistant", "content": _PROBES[1]},
        ]
        for tools in (None, _PROBE_TOOLS):  # a template for tools may insist on some
            with suppress(BadRecordError):
                text = self._template.run(messages, tools)
                answer = text.find(_PROBES[1])
                behind = answer + len(_PROBES[1])
                found = self._stop.match(text, behind) if answer >= 0 else None
                is_further = not found and answer >= 0 and self._eos in text[behind:]
                return found[1] if found else self._eos if is_further else ""
        return ""


def num_shared(left: str, right: str) -> int:
    """Return the length of the longest beginning of both."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))


def _is_glue(text: str, start: int, place: Place) -> bool:
    glue = _GLUE.match(text, start, place.start)
    return glue is not None and glue.end() == place.start


def _behind_empty_thinking(text: str, start: int, limit: int) -> int:
    is_opened = _OPENED_BEFORE.search(text, max(start - 32, 0), start) is not None
    pattern = _REST_OF_EMPTY_THINKING if is_opened else _EMPTY_THINKING
    found = pattern.match(text, start, limit)
    return found.end() if found else start
