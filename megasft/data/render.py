"""One render of the chat template, and where in it the supervised answers lie.

The tokens of a sample come from ONE render of the whole conversation. Rendering prefixes
(``messages[:i]``) is not done: templates that strip the thinking of earlier turns render a prefix
differently from the whole. To learn where the answers lie, the same conversation is rendered a
second time with two non-characters around each trained content. Without its marks that second
render must be, byte for byte, the first one, and what lies between the marks must be the content;
then the spans are exact for this very conversation, whatever the template does, and repeated,
empty or role-named contents cannot confuse them. Three placements of the marks are tried:

    around the content              the template copies it
    around the stripped content     the template trims it
    behind the stripped content     the template takes it apart and puts it together (Qwen3's
                                    thinking); the text before the mark must then be the content

When none fits, the template changed the message and the record is rejected: nothing is guessed.
A template with ``{% generation %}`` says itself what is trained, so its blocks are marked instead.
Only there can tool calls and separate reasoning fields be trained.

A span is then extended over white space to the special token behind it, the model's sign that it
is done; some templates use the next role token for that. Price: the template runs twice, which is
small beside the encoding. Rejected: searching the contents in the render (ambiguous), rendering
with placeholder contents (fails with templates that look into them), and transformers' own
``return_assistant_tokens_mask`` (silently empty without generation tags, misplaced inside macros).

The Jinja environment mirrors transformers' (a test compares the renders) but for one thing:
``strftime_now`` returns ``TEMPLATE_DATE``, because the same inputs must give the same bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any, Final, NamedTuple

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megasft.data.conversation import REASONING_KEYS, BadRecordError, Conversation, Message

TEMPLATE_DATE: Final = datetime(2024, 7, 26, tzinfo=UTC)
"""What a template sees as today; the default of Llama 3's templates."""

_OPEN, _CLOSE = "\ufdd0", "\ufdd1"  # non-characters: never assigned, kept by strip() and tojson
_MARKS = re.compile(f"[{_OPEN}{_CLOSE}]")
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class Span(NamedTuple):
    """Supervised characters of a render.

    Attributes:
        start: First character of the answer.
        end: Behind its last character, or behind its stop token.
        stop: The special token that ends the turn, included in the span; None if there is none.
        message: Index of the message.
    """

    start: int
    end: int
    stop: str | None
    message: int


class Rendered(NamedTuple):
    """A rendered conversation; its spans ascend and do not overlap."""

    text: str
    spans: tuple[Span, ...]


class Renderer:
    """Renders conversations with one chat template.

    Args:
        template: Jinja source.
        special_tokens: What the template may name, ``{"eos_token": "</s>", ...}``.
        stops: Special tokens that can end a turn.
    """

    def __init__(
        self, template: str, *, special_tokens: dict[str, Any], stops: Iterable[str]
    ) -> None:
        self.has_generation_tags = _GENERATION.search(template) is not None
        self._special_tokens = special_tokens
        self._plain = _compile(template, _Unmarked)
        self._marked = _compile(template, _Marked) if self.has_generation_tags else self._plain
        self._stop = re.compile(rf"\s*({_any_of(stops)})")
        self._stop_inside = re.compile(rf"({_any_of(stops)})\s*\Z")

    def render(self, conversation: Conversation) -> Rendered:
        """Render a conversation and find its trained answers.

        Raises:
            BadRecordError: The template refuses the conversation or changes a trained message.
        """
        if not self.has_generation_tags:
            _require_plain(conversation)
        text = self._run(self._plain, conversation, _unchanged)
        if _MARKS.search(text):
            raise BadRecordError("special token in the text", "it holds U+FDD0 or U+FDD1")
        if self.has_generation_tags:
            found = self._blocks(conversation, text)
        else:
            found = self._contents(conversation, text)
        spans = tuple(self._with_stop(text, *span) for span in found)
        if any(left.end > right.start for left, right in pairwise(spans)):
            raise BadRecordError(
                "the template changed the message", "its answers overlap or swap places"
            )
        return Rendered(text, spans)

    def _run(
        self, template: Template, conversation: Conversation, mark: Callable[[str], str]
    ) -> str:
        messages = [
            m.as_dict(mark(m.content) if m.trained and m.content is not None else m.content)
            for m in conversation.messages
        ]
        tools = [dict(tool) for tool in conversation.tools] if conversation.tools else None
        try:
            return template.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=False,
                **self._special_tokens,
            )
        except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise BadRecordError(
                "the template refused", f"the chat template says: {error}"
            ) from None

    def _contents(self, conversation: Conversation, text: str) -> list[tuple[int, int, int]]:
        trained = [(i, m) for i, m in enumerate(conversation.messages) if m.trained]
        for mark, locate in _PLACEMENTS:
            try:
                marked = self._run(self._plain, conversation, mark)
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

    def _blocks(self, conversation: Conversation, text: str) -> list[tuple[int, int, int]]:
        bare, places = _take_marks(self._run(self._marked, conversation, _unchanged))
        answers = [(i, m) for i, m in enumerate(conversation.messages) if m.role == "assistant"]
        kinds = [kind for kind, _ in places]
        if bare != text or kinds != [_OPEN, _CLOSE] * len(answers):
            raise BadRecordError(
                "the template changed the message",
                f"the chat template marks {kinds.count(_OPEN)} {{% generation %}} blocks for "
                f"{len(answers)} assistant messages",
            )
        spans = []
        for number, (index, message) in enumerate(answers):
            start, end = places[2 * number][1], places[2 * number + 1][1]
            if message.trained:
                _require_whole(index, message, text[start:end])
                spans.append((start, end, index))
        return spans

    def _with_stop(self, text: str, start: int, end: int, message: int) -> Span:
        if inside := self._stop_inside.search(text[start:end]):  # a block may hold the stop token
            return Span(start, start + inside.end(1), inside[1], message)
        if behind := self._stop.match(text, end):
            return Span(start, behind.end(), behind[1], message)
        return Span(start, end, None, message)


def _unchanged(content: str) -> str:
    return content


def _around(content: str) -> str:
    return f"{_OPEN}{content}{_CLOSE}"


def _around_stripped(content: str) -> str:
    lead, body, tail = _split_blanks(content)
    return f"{lead}{_OPEN}{body}{_CLOSE}{tail}"


def _behind_stripped(content: str) -> str:
    lead, body, tail = _split_blanks(content)
    return f"{lead}{body}{_CLOSE}{tail}"


def _split_blanks(content: str) -> tuple[str, str, str]:
    # "  a b\n" -> "  ", "a b", "\n"
    body = content.strip()
    lead = content[: len(content) - len(content.lstrip())] if body else ""
    return lead, body, content[len(lead) + len(body) :]


Places = list[tuple[str, int]]
Pairs = list[tuple[int, int]] | None


def _between(text: str, places: Places, contents: Sequence[str]) -> Pairs:
    if [kind for kind, _ in places] != [_OPEN, _CLOSE] * len(contents):
        return None
    spans = [(places[i][1], places[i + 1][1]) for i in range(0, len(places), 2)]
    same = (text[a:b] == c for (a, b), c in zip(spans, contents, strict=True))
    return spans if all(same) else None


def _between_stripped(text: str, places: Places, contents: Sequence[str]) -> Pairs:
    return _between(text, places, [c.strip() for c in contents])


def _before(text: str, places: Places, contents: Sequence[str]) -> Pairs:
    bodies = [c.strip() for c in contents]
    if [kind for kind, _ in places] != [_CLOSE] * len(bodies) or not all(bodies):
        return None
    spans = [(end - len(c), end) for (_, end), c in zip(places, bodies, strict=True)]
    same = (a >= 0 and text[a:b] == c for (a, b), c in zip(spans, bodies, strict=True))
    return spans if all(same) else None


_PLACEMENTS: Final = (
    (_around, _between),
    (_around_stripped, _between_stripped),
    (_behind_stripped, _before),
)


def _take_marks(marked: str) -> tuple[str, Places]:
    # "a<OPEN>b<CLOSE>" -> "ab", [(OPEN, 1), (CLOSE, 2)]
    places = [(m[0], m.start() - i) for i, m in enumerate(_MARKS.finditer(marked))]
    return _MARKS.sub("", marked), places


def _require_plain(conversation: Conversation) -> None:
    for index, message in enumerate(conversation.messages):
        found = [key for key in ("tool_calls", *REASONING_KEYS) if message.extra.get(key)]
        if not message.trained or not (found or message.content is None):
            continue
        raise BadRecordError(
            "needs {% generation %}",
            f"message {index} holds `{(found or ['no content'])[0]}`; that can only be trained "
            "with a chat template that has {% generation %}, or be labelled 0",
        )


def _require_whole(index: int, message: Message, block: str) -> None:
    wanted = [message.content or ""]
    wanted += [str(message.extra[key]) for key in REASONING_KEYS if message.extra.get(key)]
    for call in message.extra.get("tool_calls") or []:
        function = call.get("function", call) if isinstance(call, dict) else {}
        wanted.append(str(function.get("name", "")))
    if not all(part.strip() in block for part in wanted):
        raise BadRecordError(
            "the template changed the message",
            f"the {{% generation %}} block of message {index} does not hold all of it",
        )


def _any_of(tokens: Iterable[str]) -> str:
    return "|".join(re.escape(t) for t in sorted(tokens, key=len, reverse=True)) or "(?!)"


class _Unmarked(Extension):
    tags = {"generation"}  # noqa: RUF012 (jinja's own convention)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_wrap"), [], [], body).set_lineno(line)

    def _wrap(self, caller: Callable[[], str]) -> str:
        return caller()


class _Marked(_Unmarked):
    def _wrap(self, caller: Callable[[], str]) -> str:
        return _around(caller())


def _compile(template: str, generation: type[Extension]) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = TEMPLATE_DATE.strftime
    return environment.from_string(template)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise(message: str) -> None:
    raise TemplateError(message)
