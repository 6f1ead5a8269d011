"""Answers from a model: batched, greedy or sampled, with a KV cache, after the very prompt tokens that training uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from instil.model.attention import attention
from instil.types import Int32

MOST_TOKENS = 256  # of an answer, where nothing tells how long it may be


@dataclass(frozen=True, slots=True)
class Sampling:
    """max_tokens: longest answer, None = as what is measured asks for (measure.py), else MOST_TOKENS; temperature 0 = greedy;
    top_p: share of the probability mass sampled from."""

    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0


def generate(
    net: PreTrainedModel,
    prompts: Sequence[Int32],
    *,
    stop_ids: Sequence[int],
    sampling: Sampling,
    stop_sequences: Sequence[Sequence[int]] = (),
    batch_examples: int = 64,
    progress: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """The answer tokens after each prompt, through the first of `stop_ids` (or as many as max_tokens allows).

    stop_sequences: runs of tokens that end an answer as well, where a terminator is not one token.
    Prompts of like length are batched; padding goes on the left, is known by length, and is never looked at: what its
    id is does not matter. progress: called with the number of answers made so far.
    """
    order = np.argsort([len(p) for p in prompts], kind="stable")[::-1]
    answers: list[list[int]] = [[] for _ in prompts]
    with _serving(net):
        for start in range(0, len(order), batch_examples):
            chunk = order[start : start + batch_examples]
            some = [prompts[i] for i in chunk]
            for i, answer in zip(chunk, _batch(net, some, stop_ids, sampling, stop_sequences), strict=True):
                answers[i] = answer
            if progress is not None:
                progress(start + len(chunk))
    return answers


def stream(
    net: PreTrainedModel,
    prompt: Int32,
    *,
    stop_ids: Sequence[int],
    sampling: Sampling,
    emit: Callable[[int], None],
    stop_sequences: Sequence[Sequence[int]] = (),
) -> list[int]:
    """One answer, each token handed to `emit` as soon as it is known; returns all of them."""
    with _serving(net):
        return _batch(net, [prompt], stop_ids, sampling, stop_sequences, _Emitter(emit))[0]


@torch.no_grad()
def _batch(
    net: PreTrainedModel,
    prompts: Sequence[Int32],
    stop_ids: Sequence[int],
    sampling: Sampling,
    stop_sequences: Sequence[Sequence[int]] = (),
    streamer: BaseStreamer | None = None,
) -> list[list[int]]:
    device = next(net.parameters()).device
    longest = max(len(p) for p in prompts)
    filler = stop_ids[0] if stop_ids else 0
    tokens = torch.full((len(prompts), longest), filler, dtype=torch.int64)
    seen = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = torch.from_numpy(np.asarray(prompt, np.int64))
        seen[row, longest - len(prompt) :] = 1
    config = GenerationConfig(
        max_new_tokens=MOST_TOKENS if sampling.max_tokens is None else sampling.max_tokens,
        do_sample=sampling.temperature > 0,
        temperature=sampling.temperature or None,
        top_p=sampling.top_p if sampling.temperature > 0 else None,
        top_k=0 if sampling.temperature > 0 else None,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=filler,
    )
    found: Any = net.generate(  # type: ignore[operator]
        inputs=tokens.to(device), attention_mask=seen.to(device), generation_config=config, streamer=streamer,
        stopping_criteria=StoppingCriteriaList([_Ended(stop_sequences)] if stop_sequences else []),
    )  # fmt: skip
    return [_until_stop(row[longest:].tolist(), set(stop_ids), stop_sequences) for row in found]


def _until_stop(tokens: list[int], stop_ids: set[int], sequences: Sequence[Sequence[int]] = ()) -> list[int]:
    """Through the first stop token or sequence; what generation put after it is padding."""
    for i, token in enumerate(tokens):
        if token in stop_ids or any(tokens[: i + 1][-len(s) :] == list(s) for s in sequences):
            return tokens[: i + 1]
    return tokens


class _Ended(StoppingCriteria):
    """A row is done when its last tokens are one of the sequences."""

    def __init__(self, sequences: Sequence[Sequence[int]]):
        self.sequences = [list(sequence) for sequence in sequences]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        rows = input_ids.tolist()
        done = [any(row[-len(s) :] == s for s in self.sequences) for row in rows]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)


@contextmanager
def _serving(net: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, a KV cache, and attention that knows left padding."""
    training, before = net.training, net.generation_config
    net.eval()
    net.generation_config = GenerationConfig()  # only what we pass decides
    try:
        with attention(net, "sdpa"):
            yield
    finally:
        net.generation_config = before
        net.train(training)


class _Emitter(BaseStreamer):
    """Hands tokens on; the first put is the prompt."""

    def __init__(self, emit: Callable[[int], None]):
        self.emit = emit
        self.prompt_seen = False

    def put(self, value: Any) -> None:
        if self.prompt_seen:
            self.emit(int(value.reshape(-1)[0]))
        self.prompt_seen = True

    def end(self) -> None:
        pass
