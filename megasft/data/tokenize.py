"""From the bytes of a record to token ids and turn records.

The whole render is encoded once; cutting it where an answer starts would change the ids at the
seam. A token is trained if it lies wholly inside a span. One that begins before the turn (a header
that glues to it, such as ``Assistant: Yes``) belongs to the prompt: at inference the prompt ends
there. Such border tokens are counted and shown, since a template that makes them hides the first
token of each answer from training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as Backend

from megasft.data import exact_json
from megasft.data.conversation import BadRecordError, Category, Conversation
from megasft.data.encode import Encoder, HuggingFaceEncoder, make_encoder, trained_tokens
from megasft.data.formats import FieldMap, parse
from megasft.data.held_out import Part
from megasft.data.render import Rendered, Renderer, RenderOptions
from megasft.data.specials import SpecialTokens
from megasft.data.tokenizer_folder import TokenizerFacts, open_folder
from megasft.data.too_long import Limit, shorten
from megasft.data.turn_bounds import Span
from megasft.data.unread_keys import OF_MESSAGE, OF_RECORD, UnreadKey
from megasft.errors import DataError
from megasft.schema import NO_CATEGORY, TURN_FIELDS, UNIT_WEIGHT, Sample, turn_weights_of

CHECK_EVERY: Final = 512
"""Of so many records one is rendered and encoded by the references, too, and compared."""
_AUTO: Final = FieldMap()
_MAX_RENDERERS: Final = 64


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides which sample a record becomes.

    Attributes:
        tokenizer: Folder of the tokenizer.
        fields: Where in a record the messages are.
        special_tokens_in_text: One of ``specials.POLICIES``.
        chat_template: Jinja source that replaces the folder's; empty for the folder's own.
        rendering: What is rendered how.
        limit: How long a sample may be.
        encoder: One of ``encode.ENCODERS``.
        part: Which conversations; None for all.
    """

    tokenizer: Path
    fields: FieldMap = _AUTO
    special_tokens_in_text: str = "escape"
    chat_template: str = ""
    rendering: RenderOptions = field(default_factory=RenderOptions)
    limit: Limit = field(default_factory=Limit)
    encoder: str = "auto"
    part: Part | None = None


class Made(NamedTuple):
    """A record that became a sample.

    Attributes:
        line: Its line or record number.
        sample: Category ids are still 0: names become ids in input order, in one place.
        categories: What the record says about the category of each turn.
        stop_ids: The token that ends each turn; fewer than turns if some end without one.
        num_border_tokens: Tokens half inside a span, which are not trained.
        stripped: Messages not trained because the template leaves out their thinking.
        lost_tokens: Tokens cut off because the sample was too long.
        lost_labels: Trained tokens among them.
        unread: Keys of the record, and of its messages, that nobody reads.
        is_text: It is pretraining text.
    """

    line: int
    sample: Sample
    categories: tuple[Category, ...]
    stop_ids: tuple[int, ...]
    num_border_tokens: int
    stripped: int = 0
    lost_tokens: int = 0
    lost_labels: int = 0
    unread: tuple[UnreadKey, ...] = ()
    is_text: bool = False


class Rejected(NamedTuple):
    """A record that did not, and why."""

    line: int
    reason: str
    detail: str


class Dropped(NamedTuple):
    """A good record that is left out, because it is too long."""

    line: int
    num_tokens: int
    num_labels: int


class Elsewhere(NamedTuple):
    """A record of the other part."""

    line: int


Outcome = Made | Rejected | Dropped | Elsewhere


class _Ready(NamedTuple):
    line: int
    conversation: Conversation
    rendered: Rendered


class Tokenizer:
    """Turns records into samples with one recipe; loaded once in each worker.

    Raises:
        DataError: The folder holds no fast tokenizer, or there is no chat template.
        UnfaithfulError: gigatoken does not encode as the tokenizer does.
    """

    def __init__(self, recipe: Recipe) -> None:
        try:
            self._load(recipe)
        except DataError:
            raise
        except Exception as error:  # whatever a library says of a folder it does not understand
            raise DataError(
                f"{recipe.tokenizer}: the tokenizer or its chat template cannot be used: "
                f"{type(error).__name__}: {error}"
            ) from error

    def _load(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._folder = open_folder(recipe.tokenizer, chat_template=recipe.chat_template)
        self._specials = SpecialTokens(self._folder.control_tokens(), recipe.special_tokens_in_text)
        self._stops = self._folder.stops
        self._renderers: dict[tuple[bool, str], Renderer] = {}
        backend = self._folder.hf.backend_tokenizer
        self._source = backend.to_str()
        self._reference = HuggingFaceEncoder(backend, str(recipe.tokenizer))
        self._encoder = make_encoder(self._source, self._reference, recipe.encoder)
        self._stop_ids = {stop: self._reference.id_of(stop) for stop in self._stops}
        self._hidden: HuggingFaceEncoder | None = None

    def facts(self) -> TokenizerFacts:
        """Return what the store keeps of the tokenizer."""
        return self._folder.facts()

    def make(self, records: Sequence[tuple[int, bytes]]) -> list[Outcome]:
        """Make samples of some records; one outcome each, in order.

        Raises:
            UnfaithfulError: A fast road differs from its reference on one of them.
        """
        try:
            return self._make(records)
        except (DataError, MemoryError):
            raise
        except Exception as error:  # of the code, or a library's: one record must not end a build
            if len(records) > 1:
                return [made for record in records for made in self.make([record])]
            detail = f"{type(error).__name__}: {error}"[:300]
            return [Rejected(records[0][0], "failed", f"no sample could be made: {detail}")]

    def _make(self, records: Sequence[tuple[int, bytes]]) -> list[Outcome]:
        ready: list[_Ready | Rejected | Elsewhere] = []
        part = self._recipe.part
        for line, data in records:
            conversation = None
            try:
                conversation = parse(data, self._recipe.fields)
                if part is not None and not part.holds(conversation):
                    ready.append(Elsewhere(line))
                    continue
                rendered = self.render(conversation, check=line % CHECK_EVERY == 1)
                ready.append(_Ready(line, conversation, rendered))
            except BadRecordError as error:  # what cannot be read belongs to the training part
                bad = Rejected(line, error.reason, error.detail)
                is_unread = conversation is None and part is not None and part.held_out
                ready.append(Elsewhere(line) if is_unread else bad)
        good = [item for item in ready if isinstance(item, _Ready)]
        made = self._encode([item for item in good if not item.rendered.is_hidden])
        made |= self._encode_hidden([item for item in good if item.rendered.is_hidden])
        return [made[item.line] if isinstance(item, _Ready) else item for item in ready]

    def render(self, conversation: Conversation, *, check: bool = False) -> Rendered:
        """Render a conversation and find its trained turns.

        Args:
            conversation: What to render.
            check: Compare the render with the template's own.
        """
        if conversation.is_text:
            return self._render_text(conversation)
        rendered = self._renderer(conversation).render(conversation, check=check)
        if self._recipe.fields.train_on == "everything":
            return rendered._replace(spans=(Span(0, len(rendered.text), None, 0),))
        return rendered

    def _renderer(self, conversation: Conversation) -> Renderer:
        has_tools, arguments = bool(conversation.tools), ""
        if conversation.template_kwargs:
            arguments = self._arguments_of(conversation)
        if (found := self._renderers.get((has_tools, arguments))) is not None:
            return found
        if len(self._renderers) == _MAX_RENDERERS:  # arguments that are others in each record
            self._renderers.clear()
        made = self._renderers[has_tools, arguments] = Renderer(
            self._folder.template(has_tools=has_tools),
            special_tokens={**self._folder.hf.special_tokens_map, **conversation.template_kwargs},
            stops=self._stops,
            specials=self._specials,
            options=self._recipe.rendering,
        )
        return made

    def _arguments_of(self, conversation: Conversation) -> str:
        arguments = exact_json.dump(conversation.template_kwargs).decode()
        found = None if self._specials.policy == "keep" else self._specials.find(arguments)
        if found is not None:
            raise self._specials.refuse(found, "in chat_template_kwargs; take it out there")
        return arguments

    def _render_text(self, conversation: Conversation) -> Rendered:
        """Return pretraining text and its eos: one turn, and no chat template sees it."""
        text, eos = str(conversation.messages[0].content), self._folder.hf.eos_token
        if eos is None:
            raise BadRecordError("not supported", "the tokenizer has no eos to end a `text` with")
        policy, found = self._specials.policy, self._specials.find(text)
        if found is not None and policy == "reject":
            raise self._specials.refuse(found, "(--special-tokens-in-text escape, or keep)")
        must_hide = found is not None and policy == "escape"
        whole = text + (self._specials.hide(eos) if must_hide else eos)
        span = Span(0, len(whole), eos, 0)
        return Rendered(whole, (span,), is_hidden=must_hide)

    def _encode(self, items: list[_Ready]) -> dict[int, Outcome]:
        checked = [item.rendered.text for item in items if item.line % CHECK_EVERY == 1]
        self._encoder.check(checked)
        return self._finish(items, self._encoder)

    def _encode_hidden(self, items: list[_Ready]) -> dict[int, Outcome]:
        if items and self._hidden is None:
            renamed = Backend.from_str(self._specials.rename(self._source))
            self._hidden = HuggingFaceEncoder(renamed, str(self._recipe.tokenizer))
        return self._finish(items, self._hidden) if self._hidden else {}

    def _finish(self, items: list[_Ready], encoder: Encoder) -> dict[int, Outcome]:
        """Make the samples of some renders; all their spans are looked up at once."""
        if not items:
            return {}
        texts = [item.rendered.text for item in items]
        encoded = encoder.encode(texts)
        turns = trained_tokens(encoded, texts, [item.rendered.spans for item in items])
        ends = np.searchsorted(turns.text, np.arange(len(items) + 1)).tolist()
        stop_ids = encoded.ids[encoded.borders[turns.text] + turns.last - 1].tolist()
        records = np.zeros((len(turns.text), len(TURN_FIELDS)), np.int32)
        records[:, 0], records[:, 1] = turns.first, turns.last - turns.first
        records[:, 2], records[:, 4] = NO_CATEGORY, UNIT_WEIGHT
        borders = encoded.borders.tolist()
        made: dict[int, Outcome] = {}
        for number, item in enumerate(items):
            spans = slice(ends[number], ends[number + 1])
            own = records[spans]
            made[item.line] = self._judge(item, own, stop_ids[spans]) or self._sample(
                item,
                Sample(encoded.ids[borders[number] : borders[number + 1]], own),
                stop_ids[spans],
                int(turns.num_border_tokens[number]),
            )
        return made

    def _judge(
        self, item: _Ready, turns: npt.NDArray[np.int32], stop_ids: list[int]
    ) -> Rejected | None:
        spans = item.rendered.spans
        if not spans or turns[:, 1].min() < 1:
            number = spans[int(turns[:, 1].argmin())].message if spans else 0
            detail = f"message {number} has no token to train"
            return Rejected(item.line, "turn without tokens", detail)
        for span, stop_id in zip(spans, stop_ids, strict=True):
            if span.stop is not None and stop_id != self._stop_ids[span.stop]:
                return Rejected(
                    item.line,
                    "the template changed the message",
                    f"message {span.message} should end in the token {span.stop!r}",
                )
        return None

    def _sample(
        self, item: _Ready, sample: Sample, stop_ids: list[int], num_border_tokens: int
    ) -> Outcome:
        messages, spans = item.conversation.messages, item.rendered.spans
        sample.turns[:, 3] = [span.message for span in spans]
        weights = [messages[span.message].weight for span in spans]
        if weights.count(1.0) < len(weights):
            turn_weights_of(sample.turns)[:] = weights
        made = Made(
            item.line,
            sample,
            tuple(messages[span.message].category or item.conversation.category for span in spans),
            tuple(i for i, span in zip(stop_ids, spans, strict=True) if span.stop is not None),
            num_border_tokens,
            item.rendered.stripped,
            unread=self._unread(item.conversation),
            is_text=item.conversation.is_text,
        )
        return self._fit(made) if self._recipe.limit.exceeded_by(sample) else made

    def _unread(self, conversation: Conversation) -> tuple[UnreadKey, ...]:
        if not conversation.unread and not conversation.has_fields:
            return ()
        unread = [UnreadKey(OF_RECORD, key) for key in conversation.unread]
        if conversation.has_fields and not conversation.is_text:
            keys = self._renderer(conversation).unread(conversation)
            unread += [UnreadKey(OF_MESSAGE, key) for key in keys]
        return tuple(unread)

    def _fit(self, made: Made) -> Outcome:
        limit, size = self._recipe.limit, len(made.sample.tokens)
        if limit.policy == "error":
            return Rejected(
                made.line,
                "too long",
                f"it has {size:,} tokens, of which {limit.room(made.sample):,} are within its "
                "limits (--max-tokens, --max-prompt-tokens, --max-answer-tokens); --too-long "
                "truncate-turns cuts such conversations",
            )
        cut = shorten(made.sample, limit)
        if cut.sample is None:
            return Dropped(made.line, cut.lost_tokens, cut.lost_labels)
        num_turns = len(cut.sample.turns)
        num_stops = min(len(made.stop_ids), num_turns - cut.is_mid_turn)
        return made._replace(
            sample=cut.sample,
            categories=made.categories[:num_turns],
            stop_ids=made.stop_ids[:num_stops],
            lost_tokens=cut.lost_tokens,
            lost_labels=cut.lost_labels,
        )
