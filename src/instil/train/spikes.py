"""Losses that leap: told from the losses before by their median and the median distance from it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

WINDOW_STEPS, LEAST_STEPS = 50, 10
DEVIATIONS = 8.0  # of the usual distance from the median
LEAST_FACTOR = 1.5  # times the median, so that a run whose losses hardly differ does not warn of trifles
LEAST_NATS = 0.5


class Spikes:
    """limit = median + max(8 * 1.4826 * MAD, 0.5 * median, 0.5 nats) of the last 50 losses; infinite before there are 10.

    1.4826 * MAD (median absolute deviation) is a normal distribution's standard deviation (Hampel 1974): neither the trend
    of a run nor earlier spikes move it much.
    """

    def __init__(self, recent: Sequence[float]):
        self._recent = list(recent)
        self.median = statistics.median(recent) if recent else float("inf")
        deviation = 1.4826 * statistics.median(abs(loss - self.median) for loss in recent) if recent else 0.0
        room = max(DEVIATIONS * deviation, (LEAST_FACTOR - 1) * self.median, LEAST_NATS)
        self.limit = self.median + room if len(recent) >= LEAST_STEPS else float("inf")

    def leaps(self, loss: float) -> bool:
        """Whether a step's loss is above the limit."""
        return loss > self.limit

    def after(self, loss: float) -> list[float]:
        """The losses that the next step is judged by."""
        return [*self._recent, loss][-WINDOW_STEPS:]
