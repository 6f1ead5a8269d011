"""Examples to one Pack, a prefix tree: here a token of an answer becomes a target, and nothing else does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from instil.types import Example, Int32, Pack, common_tokens

LEAST_TRUNK = 128  # tokens: a shorter beginning that all have is not worth a pass of its own
LEAST_GROUP = 512  # tokens: fewer at a time make matrix products slow


def build_pack(examples: Sequence[Example], indices: Sequence[int], limit_tokens: int | None = None) -> Pack:
    """Lay examples out as a prefix tree in depth-first order: every distinct prefix once.

    Example e with p prompt and a answer tokens has p + a - 1 computed tokens (its last token is only predicted); those that
    begin like another example's are that example's. Answer token j is predicted from the token at depth p - 1 + j of the
    example's own path, for every j with weight > 0: where paths branch, one token has a triple for each branch.
    indices: which example of the epoch each one is; goes into `owner` and `examples`. limit_tokens: that are in memory at one
    time, where the examples have a trunk of at least LEAST_TRUNK tokens that can be computed before the rest (None = any
    number).
    """
    for example in examples:
        if not len(example.prompt_tokens):
            raise ValueError(f"{example.origin}: an example without prompt has nothing to predict its answer from")
    streams = [np.concatenate([e.prompt_tokens, e.answer_tokens[:-1]]).astype(np.int32) for e in examples]
    tree = sorted(range(len(streams)), key=lambda i: streams[i].tobytes())  # a prefix comes before what it begins
    path = np.zeros(max(map(len, streams)), np.int64)  # where each token of the current example is in the pack
    tokens, positions, at, target, weight, owner = ([] for _ in range(6))
    reach = np.zeros(sum(map(len, streams)), np.int32)
    size = length = 0
    for before, i in zip([None, *tree], tree, strict=False):
        stream, example = streams[i], examples[i]
        shared = 0 if before is None else common_tokens(streams[before], stream)
        reach[path[shared:length]] = size  # the subtrees of the tokens that this example does not begin with end here
        length = len(stream)
        path[shared:length] = np.arange(size, size + length - shared)
        size += length - shared
        tokens.append(stream[shared:])
        positions.append(np.arange(shared, length))
        counted = np.flatnonzero(example.weights > 0)
        at.append(path[len(example.prompt_tokens) - 1 + counted])
        target.append(example.answer_tokens[counted])
        weight.append(example.weights[counted])
        owner.append(np.full(len(counted), indices[i]))
    reach[path[:length]] = size
    depths = np.concatenate(positions).astype(np.int32)
    return Pack(
        tokens=np.concatenate(tokens).astype(np.int32),
        positions=depths,
        reach=reach[:size],
        at=np.concatenate(at).astype(np.int32),
        target=np.concatenate(target).astype(np.int32),
        weight=np.concatenate(weight).astype(np.float32),
        owner=np.concatenate(owner).astype(np.int32),
        examples=tuple(int(indices[i]) for i in tree),
        cuts=_cuts(depths, reach[:size], limit_tokens) if limit_tokens else (),
    )


def _cuts(positions: Int32, reach: Int32, limit_tokens: int) -> tuple[int, ...]:
    """Where the pack is cut: behind its trunk, and between groups of branches that fit with it into `limit_tokens`; but a
    group may have LEAST_GROUP tokens, or be a single branch."""
    size = len(positions)
    trunk = int((reach == size).cumprod().sum())
    if size <= limit_tokens or not LEAST_TRUNK <= trunk < size:
        return ()
    most = max(limit_tokens - trunk, LEAST_GROUP)
    cuts = [trunk]
    ends = [*np.flatnonzero(positions == trunk).tolist(), size][1:]  # of the branches
    for end, following in zip(ends, [*ends[1:], size], strict=True):
        if end == size or following - cuts[-1] > most:
            cuts.append(end)
    return tuple(cuts) if len(cuts) > 2 else ()
