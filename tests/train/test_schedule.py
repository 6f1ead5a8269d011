"""The rate of every step is what the formula says, worked out by hand."""

from __future__ import annotations

import math

import pytest

from instil.train.schedule import (
    Schedule,
    default_batch_examples,
    default_epochs,
    default_rate,
    learning_rate,
    pretraining_rate,
    rate_warning,
)


def rates(schedule: Schedule, *, steps: int, warmup: float = 0.0) -> list[float]:
    return [learning_rate(k, peak=1.0, steps=steps, warmup=warmup, schedule=schedule) for k in range(steps)]


def test_cosine_by_hand() -> None:
    """Two of seven steps of warm-up, then from 1 to 0.1 in quarters of the half circle: cos 0, 45, 90, 135, 180."""
    middle = (0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2, 0.55, 0.1 + 0.9 * (1 - math.sqrt(0.5)) / 2)
    assert rates("cosine", steps=7, warmup=0.25) == pytest.approx([0.5, 1.0, 1.0, *middle, 0.1])


def test_linear_by_hand() -> None:
    """One step of warm-up of six, then down to a tenth in equal parts."""
    assert rates("linear", steps=6, warmup=0.1) == pytest.approx([1.0, 1.0, 0.775, 0.55, 0.325, 0.1])


def test_constant_by_hand() -> None:
    """After the warm-up the peak."""
    assert rates("constant", steps=6, warmup=0.5) == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 3, 100])
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.5, 1.0])
def test_no_step_is_without_a_rate(schedule: Schedule, steps: int, warmup: float) -> None:
    """Every rate is above 0 and at most the peak, the peak is reached, and a warm-up only rises."""
    found = rates(schedule, steps=steps, warmup=warmup)
    assert all(0 < rate <= 1 for rate in found)
    assert max(found) == 1
    warm = found[: math.ceil(warmup * steps)]
    assert warm == sorted(warm)


def test_rates_scale_with_the_peak() -> None:
    """Nothing but the peak has a unit."""
    assert learning_rate(3, peak=2e-5, steps=9, warmup=0.1, schedule="cosine") == pytest.approx(
        2e-5 * rates("cosine", steps=9, warmup=0.1)[3]
    )


@pytest.mark.parametrize(("warmup", "steps", "warm"), [(0.07, 100, 7), (0.29, 100, 29), (0.03, 100, 3), (0.03, 101, 4)])
def test_a_share_of_the_steps_is_counted_exactly(warmup: float, steps: int, warm: int) -> None:
    """0.07 of 100 steps are 7, although 0.07 * 100 is a little more in floating point; a part of a step is one."""
    assert rates("constant", steps=steps, warmup=warmup).index(1.0) == warm - 1


def test_defaults_by_the_size_of_the_data() -> None:
    """2e-5 or 2e-4; two epochs up to 10,000 rows; a power of two from 8 to 128 that makes about 100 steps."""
    assert (default_rate(0), default_rate(16)) == (2e-5, 2e-4)
    assert (default_epochs(10_000), default_epochs(10_001)) == (2, 1)
    assert [default_batch_examples(n) for n in (0, 1, 1000, 1600, 3200, 12_800, 10**6)] == [8, 8, 8, 16, 32, 128, 128]


def test_pretraining_rates_are_within_a_factor_of_two_of_known_models() -> None:
    """SmolLM2 135M 3e-3 and 1.7B 5e-4, Llama 3 8B 3e-4 and 70B 1.5e-4."""
    for parameters, known in ((135e6, 3e-3), (1.7e9, 5e-4), (8e9, 3e-4), (70e9, 1.5e-4)):
        assert 0.5 < pretraining_rate(int(parameters)) / known < 2


def test_a_rate_that_makes_a_model_forget_is_warned_of() -> None:
    """For an 8B model 2e-4 is too much and 2e-5 is not; an adapter is never warned of."""
    warning = rate_warning(2e-4, 8_000_000_000, 0)
    assert warning is not None
    assert "train.lr 0.0002" in warning
    assert "8,000M" in warning
    assert rate_warning(2e-5, 8_000_000_000, 0) is None
    assert rate_warning(2e-4, 8_000_000_000, 16) is None
