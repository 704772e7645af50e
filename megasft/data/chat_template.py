"""A chat template as Jinja: compiled as transformers compiles it, and which texts it tests for.

The environment mirrors transformers' (a test compares the renders) but for one thing:
``strftime_now`` returns ``TEMPLATE_DATE``, because the same inputs must give the same bytes.

``LookedFor`` is read from the template's syntax tree: the constants that its comparisons, string
methods and filters look for. A conversation that holds none of them cannot send the template down
another path by what its texts say, which is what lets ``skeleton.py`` learn a render once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megasft.data.conversation import BadRecordError

TEMPLATE_DATE: Final = datetime(2024, 7, 26, tzinfo=UTC)
"""What a template sees as today; the default of Llama 3's templates."""

OPEN, CLOSE = "\ufdd0", "\ufdd1"  # non-characters: never assigned, kept by strip() and tojson
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_STRIPS: Final = ("strip", "lstrip", "rstrip")

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]] | None


class LookedFor(NamedTuple):
    """Constants a template looks for in the texts it is given.

    Attributes:
        contained: Looked for inside a text (``in``, ``startswith``, ``split``, ``replace``, ...).
        equal: Compared with a whole text.
        edges: Characters stripped from the ends of a text; white space is not listed.
    """

    contained: frozenset[str]
    equal: frozenset[str]
    edges: frozenset[str]

    def meet(self, texts: Sequence[str], joined: str) -> bool:
        """Return whether any of these texts, stripped of white space, could be noticed.

        Args:
            texts: Of one conversation.
            joined: The same with something between that no template looks for.
        """
        for text in self.contained:
            if text in joined:
                return True
        if not self.equal.isdisjoint(texts):
            return True
        return bool(self.edges) and any(
            text[0] in self.edges or text[-1] in self.edges for text in texts if text
        )


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: Jinja source.
        special_tokens: What the template may name, ``{"eos_token": "</s>", ...}``; arguments such
            as ``enable_thinking``, too.

    Attributes:
        names: Every name by which the template may read a field of a message.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, Any]) -> None:
        self.has_generation_tags = _GENERATION.search(source) is not None
        self._special_tokens = dict(special_tokens)
        self._plain = _compile(source, _Unmarked)
        self._marked = _compile(source, _Marked) if self.has_generation_tags else self._plain
        tree = _environment(_Unmarked).parse(source)
        self.looks_for = _looked_for(tree)
        self.names = _names(tree)

    def run(
        self,
        messages: Messages,
        tools: Tools,
        *,
        add_generation_prompt: bool = False,
        mark_generation: bool = False,
    ) -> str:
        """Render messages.

        Args:
            messages: What the template sees.
            tools: Function schemas, or None.
            add_generation_prompt: End with the header of the next answer.
            mark_generation: Put ``OPEN`` and ``CLOSE`` around ``{% generation %}`` blocks.

        Raises:
            BadRecordError: The template refuses the messages.
        """
        template = self._marked if mark_generation else self._plain
        try:
            return template.render(
                messages=messages,
                tools=[dict(tool) for tool in tools] if tools else None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise BadRecordError(
                "the template refused", f"the chat template says: {error}"
            ) from None


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
        return f"{OPEN}{caller()}{CLOSE}"


def _environment(generation: type[Extension]) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = TEMPLATE_DATE.strftime
    return environment


def _compile(source: str, generation: type[Extension]) -> Template:
    return _environment(generation).from_string(source)


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


def _names(tree: nodes.Template) -> frozenset[str]:
    """Return every name a template may read a field of a message by."""
    read = {node.attr for node in tree.find_all(nodes.Getattr)}
    named = (node.value for node in tree.find_all(nodes.Const))
    return frozenset(read.union(value for value in named if isinstance(value, str)))


def _looked_for(tree: nodes.Template) -> LookedFor:
    contained, equal, edges = set[str](), set[str](), set[str]()
    for compare in tree.find_all(nodes.Compare):
        for operand in compare.ops:
            left, right = _constants(compare.expr), _constants(operand.expr)
            if operand.op in ("in", "notin"):
                contained.update(left)
                equal.update(right)
            else:
                is_cut = any(True for _ in compare.find_all(nodes.Slice))
                (contained if is_cut else equal).update(left, right)
    for name, arguments in _calls(tree):
        found = [text for argument in arguments for text in _constants(argument)]
        if name in (*_STRIPS, "trim"):
            edges.update(c for text in found for c in text if not c.isspace())
        else:
            contained.update(found)
    return LookedFor(frozenset(contained - {""}), frozenset(equal - {""}), frozenset(edges))


def _calls(tree: nodes.Template) -> Iterator[tuple[str, Iterable[nodes.Expr]]]:
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Getattr):
            yield call.node.attr, call.args
    for found in tree.find_all(nodes.Filter):
        if found.name in ("replace", "trim", "split"):
            yield found.name, found.args
    for test in tree.find_all(nodes.Test):
        if test.name in ("in", "eq", "equalto", "=="):
            yield test.name, [test.node, *test.args]


def _constants(node: nodes.Node) -> list[str]:
    """Return the string constants an expression is made of, those of a list included."""
    if isinstance(node, nodes.Const):
        return [node.value] if isinstance(node.value, str) else []
    if isinstance(node, nodes.List | nodes.Tuple):
        return [text for item in node.items for text in _constants(item)]
    return []
