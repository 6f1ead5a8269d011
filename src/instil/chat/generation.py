"""The template author's own opinion: which characters of a rendering are inside `{% generation %}` blocks."""

from __future__ import annotations

import functools
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser

from instil.chat.template import Sandbox, Template
from instil.types import Message

SECRET = str(secrets.randbits(64))  # so that no row can contain the marks; digits, as filters may change letters
OPEN, CLOSE = f"\U000f0000{SECRET}\U000f0001", f"\U000f0001{SECRET}\U000f0000"
MARK = re.compile(f"({OPEN}|{CLOSE})")


def generation_spans(
    template: Template,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] = (),
    args: Mapping[str, Any] | None = None,
) -> list[tuple[int, int]] | None:
    """The characters [start, stop) that the template declares to be the model's, without a generation prompt.

    They are positions in `template.render(messages, tools=tools, args=args, generation_prompt=False)`. None where the
    template has no such block, and where it treats the text of its blocks further (trims or measures it), so that they
    cannot be followed. Raises TemplateError where the rendering does.
    """
    compiled = _marked(template)
    if compiled is None:
        return None
    plain = template.render(messages, tools=tools, args=args, generation_prompt=False)
    with template.naming_faults():
        marked = compiled.render(template.variables(messages, tools, args, False))
    text, spans = _without_marks(marked)
    return spans if text == plain else None


def _without_marks(marked: str) -> tuple[str | None, list[tuple[int, int]]]:
    """The text, and where its outermost marks were; no text where a mark has lost its partner."""
    pieces: list[str] = []
    spans: list[tuple[int, int]] = []
    length = start = depth = 0
    for piece in MARK.split(marked):
        if piece == OPEN:
            start = start if depth else length
            depth += 1
        elif piece == CLOSE:
            depth -= 1
            if depth < 0:
                return None, []
            if depth == 0:
                spans.append((start, length))
        else:
            pieces.append(piece)
            length += len(piece)
    return (None, []) if depth else ("".join(pieces), spans)


@functools.lru_cache(maxsize=4)
def _marked(template: Template) -> jinja2.Template | None:
    """The template compiled so that it marks its blocks; None where it has none."""
    compiled = template.compile(_MarkingSandbox)
    marks: Any = compiled.environment.extensions[_Marks.identifier]
    return compiled if marks.blocks else None


class _Marks(jinja2.ext.Extension):
    """Writes a mark before and after each block."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as a plain attribute)
    priority = 200  # jinja2 gives a tag to the last extension that claims it, and Template brings one that ignores it

    def __init__(self, environment: jinja2.Environment):
        super().__init__(environment)
        self.blocks = 0

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        self.blocks += 1
        line = next(parser.stream).lineno
        inside = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_inside"), [], [], inside).set_lineno(line)

    def _inside(self, caller: Callable[[], str]) -> str:
        return OPEN + caller() + CLOSE


class _MarkingSandbox(Sandbox):
    """The sandbox of every template, with marks."""

    def __init__(self, *, extensions: Sequence[Any], **options: Any):
        super().__init__(extensions=[*extensions, _Marks], **options)
