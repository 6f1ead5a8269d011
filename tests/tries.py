"""Prefix trees of token sequences as packs, written as plainly as possible and apart from instil's own packing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from instil.types import Example, Pack


def trie_pack(examples: Sequence[Example]) -> Pack:
    """Every distinct prefix of the computed tokens once, in depth-first order; branches in order of appearance."""
    root: dict[int, Any] = {}
    paths = [[*e.prompt_tokens.tolist(), *e.answer_tokens.tolist()[:-1]] for e in examples]
    for path in paths:
        node = root
        for token in path:
            node = node.setdefault(token, {})
    tokens, positions, reach, place = [], [], [], {}

    todo: list[tuple[int, int, dict[int, Any]] | int] = [(token, 0, below) for token, below in reversed(root.items())]
    while todo:
        now = todo.pop()
        if isinstance(now, int):  # all descendants of this token are behind us
            reach[now] = len(tokens)
            continue
        token, depth, below = now
        place[id(below)] = len(tokens)
        todo.append(len(tokens))
        todo.extend((child, depth + 1, further) for child, further in reversed(below.items()))
        tokens.append(token)
        positions.append(depth)
        reach.append(0)
    at, target, weight, owner = [], [], [], []
    for i, (example, path) in enumerate(zip(examples, paths, strict=True)):
        node, where = root, []
        for token in path:
            node = node[token]
            where.append(place[id(node)])
        for j, (answer, w) in enumerate(zip(example.answer_tokens, example.weights, strict=True)):
            at.append(where[len(example.prompt_tokens) - 1 + j])
            target.append(answer)
            weight.append(w)
            owner.append(i)
    integers = (np.array(x, np.int32) for x in (tokens, positions, reach, at, target))
    return Pack(*integers, np.array(weight, np.float32), np.array(owner, np.int32), tuple(range(len(examples))))


def random_paths(rng: np.random.Generator, count: int, longest: int, *, branching: float = 0.7) -> list[list[int]]:
    """Sequences of 1 to about 2 * longest tokens, of which most go on from a random prefix of an earlier one."""
    paths: list[list[int]] = []
    for _ in range(count):
        head: list[int] = []
        if paths and rng.random() < branching:
            other = paths[rng.integers(len(paths))]
            head = other[: rng.integers(0, min(len(other), longest) + 1)]
        paths.append([*head, *rng.integers(0, 50, rng.integers(1, longest + 1)).tolist()])
    return paths


def pack_of_paths(paths: Sequence[Sequence[int]]) -> Pack:
    """A pack of bare sequences, each the prompt of an example whose answer is one token."""
    one = np.ones(1, np.float32)
    return trie_pack([Example(np.array(path, np.int32), np.zeros(1, np.int32), one, "x.jsonl:1", 0) for path in paths])
