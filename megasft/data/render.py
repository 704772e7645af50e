"""One render of the chat template, and where in it the supervised turns lie.

The tokens of a sample come from ONE render of the whole conversation, never from prefixes of it.
Three roads lead to the same render, each the judge of the one before:

    skeleton   the shape of the conversation was rendered before: its texts are joined into it.
               The spans are the skeleton's.
    Jinja      the template itself; the join is compared with it, character by character: always
               where the template looks for something these texts hold, at the first use of a
               shape, and for a sample of all conversations (or all, with ``check_all``)
    marks      where the two differ because the template looked into the texts, two renders with
               marks find the answers (``marks.py``), or the record is rejected

When they differ and nothing the template looks for is in the texts, the template decides by
something a skeleton cannot know (lengths, counts): ``UnfaithfulError`` ends the build, which begins
again with ``check_all`` and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, NamedTuple

from megasft.data.chat_template import ChatTemplate
from megasft.data.conversation import (
    REASONING_KEYS,
    BadRecordError,
    Conversation,
    Message,
    UnfaithfulError,
)
from megasft.data.marks import MARKS, generation_blocks, require_whole, trained_contents
from megasft.data.shape import Shape, extra_texts, shape_of
from megasft.data.skeleton import Skeleton, learn
from megasft.data.specials import SpecialTokens
from megasft.data.tool_calls import ArgumentForm
from megasft.data.turn_bounds import Place, Span, TurnBounds
from megasft.data.turn_parts import without_calls, without_thinking

STRIPPED_THINKING: Final = ("mask", "train", "reject")
_MAX_REMEMBERED: Final = 16 * 2**20
"""Characters of the skeletons remembered; conversations that call tools have shapes of their own,
with the schemas of all their tools, which must not pile up."""
_SHAPE_SIZE: Final = 1_000
"""Characters that a shape itself, its spans and its place among others are counted as."""
_CHECKED_SHAPES: Final = 256
"""Shapes whose first conversation is compared with Jinja; of later ones, a sample is."""


class Rendered(NamedTuple):
    """A rendered conversation.

    Attributes:
        text: The render.
        spans: Ascending, not overlapping.
        stripped: Messages that were to be trained and are not, because their thinking is not in
            the render.
        is_hidden: The template's special tokens have their private names (``specials.py``).
    """

    text: str
    spans: tuple[Span, ...]
    stripped: int = 0
    is_hidden: bool = False


@dataclass(frozen=True, slots=True)
class RenderOptions:
    """How conversations are rendered.

    Attributes:
        stripped_thinking: What becomes of a message whose thinking the template leaves out:
            ``mask`` (not trained, but for a call that an answer to the same question follows),
            ``train`` (its answer is), or ``reject``.
        check_all: Compare every conversation with Jinja.
        mask_thinking: Train no thinking.
        mask_tool_calls: Train no tool calls.
    """

    stripped_thinking: str = "mask"
    check_all: bool = False
    mask_thinking: bool = False
    mask_tool_calls: bool = False


_DEFAULT: Final = RenderOptions()
_SPARED: Final = {"tool_calls", "tool_call_id", "name", *REASONING_KEYS}
"""Keys that a template may leave out: they repeat what is known, or are looked for elsewhere."""


class Renderer:
    """Renders conversations with one chat template.

    Args:
        template: Jinja source.
        special_tokens: What the template may name, ``{"eos_token": "</s>", ...}``; arguments such
            as ``enable_thinking``, too.
        stops: Special tokens that can end a turn.
        specials: Special tokens in the texts, and what becomes of them; None leaves them alone.
        options: How conversations are rendered.
    """

    def __init__(
        self,
        template: str,
        *,
        special_tokens: Mapping[str, Any],
        stops: Iterable[str],
        specials: SpecialTokens | None = None,
        options: RenderOptions = _DEFAULT,
    ) -> None:
        self._template = ChatTemplate(template, special_tokens)
        eos = str(special_tokens.get("eos_token") or "")
        self._bounds = TurnBounds(self._template, tuple(stops), eos)
        self._arguments = ArgumentForm(self._template)
        self._masks = [without_thinking] if options.mask_thinking else []
        self._masks += [without_calls] if options.mask_tool_calls else []
        self._specials, self._options = specials, options
        self._skeletons: dict[Shape, Skeleton | BadRecordError | None] = {}
        self._hidden: dict[Shape, Skeleton] = {}
        self._num_checked = self._remembered = 0

    def unread(self, conversation: Conversation) -> list[str]:
        """Return the keys of messages that this template does not read."""
        names, keys = self._template.names, [key for m in conversation.messages for key in m.extra]
        return [key for key in dict.fromkeys(keys) if key not in names and key not in _SPARED]

    def render(self, conversation: Conversation, *, check: bool = False) -> Rendered:
        """Render a conversation and find its trained turns.

        Args:
            conversation: What to render.
            check: Compare the render with Jinja's.

        Raises:
            BadRecordError: The template refuses the conversation or changes a trained message.
            UnfaithfulError: The render is not Jinja's, and nothing in the texts explains it.
        """
        in_fields = None
        if conversation.has_fields:
            conversation = self._arguments.fit(conversation)
            in_fields = self._in_fields(conversation)
        shape, leaves = shape_of(conversation)
        words = "\0".join(leaves)
        must_hide = self._must_hide(words, in_fields)
        is_shielded = in_fields is not None
        if is_shielded:  # a stop token in an argument must not end the turn
            conversation = self._shielded(conversation)
            shape, leaves = shape_of(conversation)
        is_new = shape not in self._skeletons
        skeleton = self._skeleton(shape, conversation) if is_new else self._skeletons[shape]
        if not isinstance(skeleton, Skeleton) or skeleton.num_leaves != len(leaves):
            return self._without_skeleton(conversation, must_hide, skeleton)
        text, spans = skeleton.join(leaves)
        is_looked_into = self._template.looks_for.meet(leaves, words)
        is_first = is_new and self._num_checked < _CHECKED_SHAPES
        if is_looked_into or is_first or check or self._options.check_all:
            self._num_checked += is_first
            if text != self._template.run(_as_dicts(conversation), conversation.tools):
                if not (is_looked_into or self._options.check_all):
                    raise UnfaithfulError("render", _unlike(conversation))
                return self._by_marks(conversation, must_hide)
        kept = self._kept_parts(conversation, text, spans)
        if must_hide or is_shielded:  # it moves no position
            text, _ = self._hide(shape, skeleton, must_hide).join(leaves)
        return self._judge(conversation, Rendered(text, kept, is_hidden=must_hide), skeleton)

    def _kept_parts(
        self, conversation: Conversation, text: str, spans: Sequence[Span]
    ) -> tuple[Span, ...]:
        if not self._masks:
            return tuple(spans)
        kept = list(spans)
        for mask in self._masks:
            kept = [mask(text, span, conversation.messages[span.message]) for span in kept]
        left = tuple(span for span in kept if span.start < span.end)
        if spans and not left:
            raise BadRecordError(
                "nothing to train",
                "its turns only think or call tools (--mask-thinking, --mask-tool-calls)",
            )
        return left

    def _skeleton(
        self, shape: Shape, conversation: Conversation
    ) -> Skeleton | BadRecordError | None:
        skeleton: Skeleton | BadRecordError | None
        try:
            skeleton = learn(self._template, self._bounds, conversation)
        except BadRecordError as error:
            skeleton = error
        self._skeletons[shape] = skeleton
        self._remembered += _size_of(skeleton)
        while self._remembered > _MAX_REMEMBERED and len(self._skeletons) > 1:
            oldest = next(iter(self._skeletons))
            self._remembered -= _size_of(self._skeletons.pop(oldest))
            self._hidden.pop(oldest, None)
        return skeleton

    def _without_skeleton(
        self, conversation: Conversation, must_hide: bool, error: object
    ) -> Rendered:
        try:  # the record itself may fare better than names in the place of its texts
            return self._by_marks(conversation, must_hide)
        except BadRecordError as own:
            is_about_texts = own.reason == "needs {% generation %}"
            if is_about_texts and isinstance(error, BadRecordError):
                raise error from None
            raise

    def _must_hide(self, words: str, in_fields: str | None) -> bool:
        if self._specials is None or self._specials.policy == "keep":
            return False
        found = self._specials.find(words) or in_fields
        if found is not None and self._specials.policy == "reject":
            raise self._specials.refuse(
                found, "(--special-tokens-in-text escape makes plain text of it, keep allows it)"
            )
        return found is not None

    def _in_fields(self, conversation: Conversation) -> str | None:
        if self._specials is None:
            return None
        return self._specials.find("\0".join(extra_texts(conversation)))

    def _shielded(self, conversation: Conversation) -> Conversation:
        assert self._specials is not None
        shield = self._specials.shield
        messages = tuple(m._replace(extra=_but_leaves(m, shield)) for m in conversation.messages)
        return conversation._replace(messages=messages, tools=shield(conversation.tools))

    def _hide(self, shape: Shape, skeleton: Skeleton, must_hide: bool) -> Skeleton:
        if shape not in self._hidden:
            specials = self._specials
            assert specials is not None
            hidden = map(specials.hide, skeleton.pieces) if must_hide else skeleton.pieces
            self._hidden[shape] = skeleton._replace(pieces=tuple(map(specials.reveal, hidden)))
        return self._hidden[shape]

    def _judge(
        self, conversation: Conversation, rendered: Rendered, skeleton: Skeleton
    ) -> Rendered:
        if skeleton.stripped:
            policy = self._options.stripped_thinking
            if policy == "reject":
                numbers = ", ".join(map(str, sorted(skeleton.stripped)))
                raise BadRecordError(
                    "the template changed the message",
                    f"the chat template leaves out the thinking of the messages {numbers}, which "
                    "are to be trained; label them 0, or see --stripped-thinking",
                )
            if policy == "mask":
                masked = {i for i in skeleton.stripped if not self._calls_alone(conversation, i)}
                kept = tuple(s for s in rendered.spans if s.message not in masked)
                rendered = rendered._replace(spans=kept, stripped=len(masked))
        has_trained = any(m.trained for m in conversation.messages)
        if has_trained and not rendered.spans:
            raise BadRecordError(
                "nothing to train",
                "the chat template leaves out the thinking of all trained messages "
                "(--stripped-thinking train trains their answers without it)",
            )
        _require_order(rendered.spans)
        return rendered

    def _calls_alone(self, conversation: Conversation, index: int) -> bool:
        """Say whether a message's call is trained though its thinking is left out.

        gpt-oss leaves it out as soon as the answer is there: no call stands before an answer with
        its thinking. A template that knows no thinking has no such form.
        """
        message = conversation.messages[index]
        is_read = any(
            key in self._template.names for key in REASONING_KEYS if message.extra.get(key)
        )
        is_asked_again = any(m.role == "user" for m in conversation.messages[index + 1 :])
        return bool(message.extra.get("tool_calls")) and is_read and not is_asked_again

    def _by_marks(self, conversation: Conversation, must_hide: bool) -> Rendered:
        if must_hide:
            raise BadRecordError(
                "special token in the text",
                "a special token in the text cannot be escaped, because the chat template looks "
                "into the texts of this conversation (--special-tokens-in-text keep allows it)",
            )
        template = self._template
        messages = _as_dicts(conversation)
        text = template.run(messages, conversation.tools)
        if MARKS.search(text):
            raise BadRecordError("special token in the text", "it holds U+FDD0 or U+FDD1")
        if not any(m.trained for m in conversation.messages):
            return Rendered(text, ())
        if template.has_generation_tags:
            spans = self._tagged(conversation, text)
        else:
            blocks = trained_contents(template, conversation, text)
            spans = self._extended(conversation, text, blocks)
        _require_order(spans)
        return Rendered(text, self._kept_parts(conversation, text, spans))

    def _tagged(self, conversation: Conversation, text: str) -> list[Span]:
        marked = self._template.run(
            _as_dicts(conversation), conversation.tools, mark_generation=True
        )
        spans = []
        messages = _as_dicts(conversation)

        def prompt(count: int) -> str:
            return self._template.run(
                messages[:count], conversation.tools, add_generation_prompt=True
            )

        for start, end, index in generation_blocks(conversation, marked, text):
            message = conversation.messages[index]
            if message.trained:
                require_whole(index, message, text[start:end])
                place = Place(index, start, end, start, len(text), calls_tools=False)
                spans.append(self._bounds.in_block(text, place, prompt))
        return spans

    def _extended(
        self, conversation: Conversation, text: str, blocks: list[tuple[int, int, int]]
    ) -> list[Span]:
        messages = _as_dicts(conversation)

        def prompt(count: int) -> str:
            return self._template.run(
                messages[:count], conversation.tools, add_generation_prompt=True
            )

        ends = [0, *(end for _, end, _ in blocks)]
        starts = [*(start for start, _, _ in blocks), len(text)]
        spans = []
        for k, (start, end, index) in enumerate(blocks):
            place = Place(
                index, start, end, ends[k], max(end, starts[k + 1]), False, is_alone=False
            )
            spans.append(self._bounds.span(text, place, prompt))
        return [span for span in spans if span is not None]


def _size_of(skeleton: object) -> int:
    own = sum(map(len, skeleton.pieces)) if isinstance(skeleton, Skeleton) else 0
    return own + _SHAPE_SIZE


def _as_dicts(conversation: Conversation) -> list[dict[str, Any]]:
    return [message.as_dict(message.content) for message in conversation.messages]


def _but_leaves(message: Message, shield: Callable[[Any], Any]) -> dict[str, Any]:
    return {
        key: value if key in REASONING_KEYS and isinstance(value, str) else shield(value)
        for key, value in message.extra.items()
    }


def _unlike(conversation: Conversation) -> str:
    roles = ", ".join(message.role for message in conversation.messages)
    return (
        f"a conversation of {len(conversation.messages)} messages ({roles}) is not rendered as the "
        "others of its shape: the chat template decides by something in its texts"
    )


def _require_order(spans: Iterable[Span]) -> None:
    if any(left.end > right.start for left, right in pairwise(spans)):
        raise BadRecordError(
            "the template changed the message", "its answers overlap or swap places"
        )
