"""One rendering for all turns: which message wrote which part of the text, where a template only looks back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jinja2.nodes
import jinja2.runtime

from instil.chat.template import Namespace, Sandbox, Template, run
from instil.types import Message

AHEAD = {"last", "revindex", "revindex0", "length", "nextitem", "__len__"}  # of a loop over messages
PLAIN = {"first", "last", "index", "index0", "revindex", "revindex0", "length", "depth", "depth0"}
REMEMBERING = ("cycler", "joiner")  # jinja2's own, which carry something from message to message unseen
SWITCH = "add_generation_prompt"


@dataclass(frozen=True, slots=True)
class Appended:
    """The rendering of a conversation, of which the rendering of its first k messages is a proven part.

    text: all messages. ends[k] = where the text of message k ends. header: what a generation prompt adds after any of
    them. So the prompt for message k is text[:ends[k - 1]] + header, and the conversation through it text[:ends[k]].
    """

    text: str
    ends: list[int]
    header: str


class TrackedTemplate:
    """The same template, watched: does it, for this conversation, read anything of a later message?

    It does not where the loop over the messages never asks what comes next (loop.last, a length, a later index, a
    second loop), where what follows the loop reads no message and no namespace, and where `add_generation_prompt`
    is read outside loops and macros only. Then each message's text depends on the messages before it alone.
    """

    def __init__(self, template: Template):
        self._template = template
        self._compiled = template.compile(_Watching)
        self._environment: Any = self._compiled.environment
        self.possible = not _switch_inside(template)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        args: Mapping[str, Any] | None = None,
    ) -> Appended | None:
        """The rendering with its parts; None where the template looks ahead, or fails: then render turn by turn."""
        if not self.possible or not messages:
            return None
        variables = self._template.variables(messages, tools, args, generation_prompt=True)
        for name in REMEMBERING:
            variables.pop(name, None)
        watch = self._environment.watch = _Watch(len(messages))
        variables["messages"] = _Messages(variables["messages"], watch)
        pieces: list[str] = []
        owners: list[int] = []
        try:
            for piece in run(self._compiled, variables):
                pieces.append(piece)
                owners.append(watch.at)
        except Exception:  # the rendering turn by turn says what is wrong
            return None
        if watch.ahead or watch.at != len(messages):
            return None
        ends = [0] * (len(messages) + 1)
        total = 0
        for piece, owner in zip(pieces, owners, strict=True):
            total += len(piece)
            ends[max(owner, 0)] = total
        for k in range(1, len(ends)):
            ends[k] = max(ends[k], ends[k - 1])
        text = "".join(pieces)
        return Appended(text[: ends[-2]], ends[:-1], text[ends[-2] :])


@lru_cache(maxsize=8)
def tracked(template: Template) -> TrackedTemplate:
    """The watched form of a template. Compiling a long one takes 45 ms, and every 2,048 rows would do it again."""
    return TrackedTemplate(template)


class _Watch:
    """at: the message that is being rendered, -1 before the loop, n after it. ahead: whether a later one was read."""

    def __init__(self, n: int):
        self.n = n
        self.at = -1
        self.ahead = False
        self.looping = False


class _Messages(Sequence[Any]):
    """The messages from `start` on, telling the watch what is read."""

    def __init__(self, items: list[Any], watch: _Watch, start: int = 0):
        self._items, self._watch, self._start = items, watch, start

    def __iter__(self) -> Iterator[Any]:
        watch = self._watch
        if watch.looping:
            watch.ahead = True
            yield from self._items[self._start :]
            return
        watch.looping = True
        for index in range(self._start, len(self._items)):
            watch.at = index
            yield self._items[index]
        watch.at = watch.n

    def __getitem__(self, index: Any) -> Any:
        watch = self._watch
        if isinstance(index, slice):
            if (index.start, index.stop, index.step) != (1, None, None) or self._start or watch.looping:
                watch.ahead = True
                return self._items[self._start :][index]
            return _Messages(self._items, watch, 1)
        at = index + self._start
        if index < 0 or at > max(watch.at, 0) or watch.at == watch.n:
            watch.ahead = True
        return self._items[self._start :][index]

    def __len__(self) -> int:
        self._watch.ahead = True
        return len(self._items) - self._start

    def __str__(self) -> str:
        self._watch.ahead = True
        return str(self._items[self._start :])

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        self._watch.ahead = True
        return self._items[self._start :] == other

    def __bool__(self) -> bool:
        return len(self._items) > self._start or bool(len(self))


class _Watching(Sandbox):
    """The sandbox, telling the watch about loops and namespaces."""

    watch: _Watch

    def getattr(self, obj: Any, attribute: str) -> Any:
        if type(obj) is jinja2.runtime.LoopContext:
            # A loop with a condition, or over what a filter gives, runs over an iterator that may hold the messages.
            if attribute in AHEAD and isinstance(obj._iterable, (_Messages, Iterator)):
                self.watch.ahead = True
            if attribute in PLAIN:  # past the sandbox's own look at every attribute, a sixth of the time
                return getattr(obj, attribute)
        elif isinstance(obj, Namespace) and self.watch.at == self.watch.n:
            self.watch.ahead = True
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if type(obj) is dict and argument in obj:
            return obj[argument]
        if isinstance(obj, jinja2.runtime.LoopContext) or (
            isinstance(obj, Namespace) and self.watch.at == self.watch.n
        ):
            self.watch.ahead = True
        return super().getitem(obj, argument)


def _switch_inside(template: Template) -> bool:
    """Whether the template reads the generation switch inside a loop or macro."""
    tree = template.tree()
    inside = [*tree.find_all(jinja2.nodes.For), *tree.find_all(jinja2.nodes.Macro)]
    return any(name.name == SWITCH for node in inside for name in node.find_all(jinja2.nodes.Name))
