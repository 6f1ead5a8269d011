"""Learning rate of each step, default rates, epochs and batch size by the size of the data."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine"]

FINAL_SHARE = 0.1  # of the peak rate, where `linear` and `cosine` end
RATE_FULL = 2e-5
RATE_ADAPTER = 2e-4


def learning_rate(step: int, *, peak: float, steps: int, warmup: float, schedule: Schedule) -> float:
    """The rate of step 0..steps-1: linear from peak / w over the first w = ceil(warmup * steps), then the schedule.

    cosine: peak * (f + (1 - f) * (1 + cos(pi * t)) / 2), linear: peak * (1 - (1 - f) * t), with f = FINAL_SHARE and
    t = 0 at the end of the warm-up, 1 at the last step.
    """
    warm = math.ceil(warmup * steps - 1e-9)  # 0.07 * 100 is 7.000000000000001
    if step < warm:
        return peak * (step + 1) / warm
    t = (step - warm) / max(1, steps - 1 - warm)
    if schedule == "cosine":
        return peak * (FINAL_SHARE + (1 - FINAL_SHARE) * (1 + math.cos(math.pi * t)) / 2)
    if schedule == "linear":
        return peak * (1 - (1 - FINAL_SHARE) * t)
    return peak


def default_rate(adapter_rank: int) -> float:
    """2e-5 for full tuning, 2e-4 for an adapter."""
    return RATE_ADAPTER if adapter_rank else RATE_FULL


def default_epochs(examples: int) -> int:
    """More than 10,000 examples: one pass; else two."""
    return 1 if examples > 10_000 else 2


def default_batch_examples(examples: int) -> int:
    """A power of two between 8 and 128 that makes about 100 steps of an epoch."""
    return min(128, max(8, 2 ** round(math.log2(max(1, examples / 100)))))


def pretraining_rate(parameters: int) -> float:
    """A typical peak rate of pretraining for a model of that size: 3e-3 * sqrt(135M / parameters), at most 3e-3.

    Through SmolLM2 (135M: 3e-3, 1.7B: 5e-4) and Llama 3 (8B: 3e-4, 70B: 1.5e-4); within a factor of two of each, which
    is all that a warning needs.
    """
    return min(3e-3, 3e-3 * math.sqrt(135e6 / parameters))


def rate_warning(rate: float, parameters: int, adapter_rank: int) -> str | None:
    """One line when full tuning would move the weights at more than a tenth of a pretraining rate."""
    limit = pretraining_rate(parameters) / 10
    if adapter_rank or rate <= limit:
        return None
    return (
        f"train.lr {rate:g} is above a tenth of a typical pretraining rate for {parameters / 1e6:,.0f}M parameters "
        f"({limit:.1g}): expect the model to forget; rates of {limit / 10:.1g} to {limit:.1g} are usual"
    )
