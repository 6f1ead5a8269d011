"""Examples to one Pack: here a token of an answer becomes a target, and nothing else does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from instil.types import Example, Pack


def build_pack(examples: Sequence[Example], indices: Sequence[int]) -> Pack:
    """Lay examples one after another; each sees only itself.

    Example e with p prompt and a answer tokens takes p + a - 1 computed tokens (its last token is only predicted).
    Answer token j is predicted from the position before it: at = start + p - 1 + j, for every j with weight > 0.
    indices: which example of the epoch each one is; goes into `owner` and `examples`.
    """
    tokens, positions, reach, at, target, weight, owner = ([] for _ in range(7))
    start = 0
    for example, index in zip(examples, indices, strict=True):
        length, prompt = example.length_tokens, len(example.prompt_tokens)
        if not prompt:
            raise ValueError(f"{example.origin}: an example without prompt has nothing to predict its answer from")
        counted = np.flatnonzero(example.weights > 0)
        tokens.append(np.concatenate([example.prompt_tokens, example.answer_tokens[:-1]]))
        positions.append(np.arange(length))
        reach.append(np.full(length, start + length))
        at.append(start + prompt - 1 + counted)
        target.append(example.answer_tokens[counted])
        weight.append(example.weights[counted])
        owner.append(np.full(len(counted), index))
        start += length
    return Pack(
        tokens=np.concatenate(tokens).astype(np.int32),
        positions=np.concatenate(positions).astype(np.int32),
        reach=np.concatenate(reach).astype(np.int32),
        at=np.concatenate(at).astype(np.int32),
        target=np.concatenate(target).astype(np.int32),
        weight=np.concatenate(weight).astype(np.float32),
        owner=np.concatenate(owner).astype(np.int32),
        examples=tuple(int(i) for i in indices),
    )
