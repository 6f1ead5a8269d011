"""A tree of messages in, its paths from the root out: every answer is learnt exactly once."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from instil.data.jsontext import kind
from instil.data.messages import Parts, key_names, not_learnt, shown
from instil.data.notes import Tally
from instil.errors import Problem
from instil.types import Message

DELETED = "{} deleted messages left out, with the replies to them"
EMPTY = "{} empty answers left out, with the replies to them"
_ROLES = {"prompter": "user", "user": "user", "assistant": "assistant", "system": "system"}

Node = tuple[int, Message]  # a message, and its number in the tree


def is_tree(value: Mapping[str, Any]) -> bool:
    """Open Assistant's form: {"prompt": {"text", "role": "prompter", "replies": [...]}}."""
    root = value.get("prompt")
    return isinstance(root, dict) and "replies" in root


def read_tree(value: Mapping[str, Any], origin: str, tally: Tally) -> list[Parts]:
    """The paths in depth-first order, each up to its last answer; an answer of an earlier path is context there."""
    walk = _Walk(origin, tally)
    walk.visit(value.get("prompt"), f"{origin}: prompt", [])
    if walk.problems:
        return [list(walk.problems)]
    return walk.paths or [list(walk.longest)]


@dataclass(slots=True)
class _Walk:
    """One walk over a tree: the paths so far, and which answers they have."""

    origin: str
    tally: Tally
    paths: list[Parts] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    longest: list[Message] = field(default_factory=list)
    learnt: set[int] = field(default_factory=set)
    nodes: int = 0

    def visit(self, node: Any, place: str, path: list[Node]) -> bool:
        """Add the paths through `node`; False where it is left out."""
        found = _message(node, place)
        if isinstance(found, Problem):
            self.problems.append(found)
            return True
        left_out = DELETED if node.get("deleted") is True else ""
        if not left_out and found.role == "assistant" and not found.content.strip():
            left_out = EMPTY
        if left_out:
            self.tally.add(left_out, self.origin)
            return False
        self.nodes += 1
        path = [*path, (self.nodes, found)]
        replies = node.get("replies") or []
        if not isinstance(replies, list):
            what = f"is {kind(replies)}, not a list"
            self.problems.append(Problem(f"{place}.replies", what, "write it as a list of messages", "content"))
            return True
        if not sum(self.visit(reply, f"{place}.replies[{i}]", path) for i, reply in enumerate(replies)):
            self.end(path)
        return True

    def end(self, path: list[Node]) -> None:
        """A path that goes no further: kept up to its last answer, if that is a new one."""
        self.longest = self.longest or [message for _, message in path]
        while path and path[-1][1].role != "assistant":
            path = path[:-1]
        if path and path[-1][0] not in self.learnt:
            self.paths.append([not_learnt(m) if number in self.learnt else m for number, m in path])
            self.learnt.update(number for number, message in path if message.role == "assistant")


def _message(node: Any, place: str) -> Message | Problem:
    if not isinstance(node, dict):
        return Problem(place, f"is {kind(node)}, not an object", 'write {"text", "role", "replies"}', "content")
    role, text = node.get("role"), node.get("text")
    if not isinstance(role, str) or role not in _ROLES:
        near = difflib.get_close_matches(str(role).strip().casefold()[:40], _ROLES, n=1)
        remedy = f"did you mean {near[0]!r}?" if near else "use prompter or assistant"
        return Problem(f"{place}.role", f"{shown(role)} is not a role", remedy, "role")
    if not isinstance(text, str):
        what = f"is {kind(text)}, not text" if "text" in node else f"is missing (keys: {key_names(node)})"
        return Problem(f"{place}.text", what, "write it as text", "content")
    return Message(_ROLES[role], text)
