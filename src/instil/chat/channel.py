"""Where the generation prompt opens a channel that the stored turn lacks: how the template itself closes it.

A server of a reasoning model may end the prompt with an opened channel (`<think>\\n`) or an empty closed one
(`<think></think>`), while the template writes the same finished turn without it. The answer must go on from the
prompt, so it begins with what closes the channel. That text is taken from the template, in this order:

1. What the template writes between a turn's reasoning and its content, where it writes reasoning after that prompt.
2. What it adds to the prompt when thinking is switched off (enable_thinking or thinking = false). Where the prompt
   already is the one with thinking off, the channel is closed and nothing is added.
3. The text after which the template looks for the answer when it removes reasoning from a stored turn.

Where none of them exists the turn is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from instil.chat.endings import ATOM
from instil.chat.template import Template
from instil.errors import TemplateError
from instil.types import Message

THOUGHT, SAID = "instil thinks of nothing", "instil says something"
SWITCHES = ("enable_thinking", "thinking")


@dataclass(frozen=True, slots=True)
class Channel:
    """shared: length of what prompt and stored turn have in common. opening: what only the prompt has.

    lead: what the template writes before the content of such a turn instead. closing: what the answer begins with.
    """

    shared: int
    opening: str
    lead: str
    closing: str

    @property
    def is_open(self) -> bool:
        """Whether the model must close the channel itself."""
        return bool(self.closing)


def find_channel(
    template: Template,
    before: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    args: Mapping[str, Any],
    prompt: str,
    cache: dict[tuple[str, str], str | None],
) -> Channel | None:
    """The channel that `prompt`, made of `before`, opens for a plain answer; None where that is not the difference."""
    stored = template.render([*before, Message("assistant", SAID)], tools=tools, args=args, generation_prompt=False)
    turn, found, _ = stored.partition(SAID)
    if not found:
        return None
    shared = _shared(prompt, turn)
    opening, lead = prompt[shared:], turn[shared:]
    if not opening:
        return Channel(shared, "", lead, "")
    key = (opening, lead)
    if key not in cache:
        cache[key] = _closing(template, before, tools, args, prompt, opening)
    closing = cache[key]
    if closing is None or (lead and not (opening + closing).endswith(lead)):
        return None
    return Channel(shared, opening, lead, closing)


def _closing(
    template: Template,
    before: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    args: Mapping[str, Any],
    prompt: str,
    opening: str,
) -> str | None:
    """What closes the opening; "" where it is closed already; None where the template does not show it."""

    def render(messages: Sequence[Message], switch: Mapping[str, Any] | None = None, ask: bool = False) -> str:
        try:
            return template.render(messages, tools=tools, args={**args, **(switch or {})}, generation_prompt=ask)
        except TemplateError:
            return ""

    thought = Message("assistant", SAID, {"reasoning_content": THOUGHT})
    written = render([*before, thought])
    if written.startswith(prompt + THOUGHT) and SAID in written:
        return written[len(prompt) + len(THOUGHT) :].partition(SAID)[0]

    def header(switch: Mapping[str, Any] | None = None) -> str:
        """What the generation prompt adds: a switch may change older turns too (DeepSeek-V3.2's `thinking`)."""
        asked, told = render(before, switch, ask=True), render(before, switch)
        return asked[len(told) :] if asked.startswith(told) else asked

    now = header()
    for name in SWITCHES:
        off = header({name: False})
        if off != now and off.startswith(now):
            return off[len(now) :]
        on = header({name: True})
        if off == now and on and on != now and now.startswith(on):
            return ""
    for mark in template.constants():
        if len(mark.strip()) < 3 or not ATOM.fullmatch(mark):
            continue
        inline = Message("assistant", opening.removesuffix(mark) + THOUGHT + mark + SAID)
        for messages in ([*before, inline], [*before, inline, Message("user", "instil asks again")]):
            text = render(messages)
            if SAID in text and THOUGHT not in text:
                return "" if opening.endswith(mark) else mark
    return None


def _shared(left: str, right: str) -> int:
    """The length of the common beginning, in whole tags, words and spaces."""
    n = 0
    for a, b in zip(ATOM.finditer(left), ATOM.finditer(right), strict=False):
        if a.group() != b.group():
            break
        n = a.end()
    return n
