"""charts: axes have nice numbers that cover the values, and thinning and smoothing keep what they promise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instil.report.charts import SMALL, Line, draw, log_ticks, nice_ticks, smooth, thin_out
from instil.report.quantities import count, duration, loss, number, share, short, size

VALUES = st.floats(-1e90, 1e90).map(lambda v: v if abs(v) > 1e-90 else 0.0)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 100, [0, 20, 40, 60, 80, 100]), (1.13, 2.47, [1, 1.5, 2, 2.5]), (0, 2e-5, [0, 5e-6, 1e-5, 1.5e-5, 2e-5])],
)
def test_ticks_are_nice(low, high, expected):
    "Ticks are what a person would choose, and enclose the values."
    assert nice_ticks(low, high, widen=True) == pytest.approx(expected)


@given(VALUES, VALUES)
def test_ticks_cover_any_range(low, high):
    "Whatever the range: a few ticks, from below to above it."
    low, high = sorted((low, high))
    if high - low <= 1e-6 * max(abs(low), abs(high)):
        return
    ticks = nice_ticks(low, high, widen=True)
    slack = 1e-6 * (high - low)
    assert 2 <= len(ticks) <= 8
    assert ticks[0] <= low + slack
    assert ticks[-1] >= high - slack


def test_log_ticks_are_few_powers_of_ten():
    "Decades, thinned out when there are many."
    assert log_ticks(0.3, 200) == pytest.approx([1, 10, 100])
    assert log_ticks(1e-12, 1e12) == pytest.approx([1e-12, 1e-7, 1e-2, 1e3, 1e8])


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400), st.integers(6, 50))
def test_thinning_keeps_order_ends_and_extremes(values, most):
    "No more points than asked for; first, last, lowest and highest among them."
    x, y = np.arange(len(values), dtype=float), np.array(values)
    kept_x, kept_y = thin_out(x, y, most)
    assert len(kept_x) <= max(most, 1)
    assert np.all(np.diff(kept_x) > 0)
    assert np.array_equal(y[kept_x.astype(int)], kept_y)
    assert {kept_x[0], kept_x[-1]} == {0, len(values) - 1}
    assert (kept_y.min(), kept_y.max()) == (y.min(), y.max())


def test_smoothing_by_hand():
    "Span 2 halves the past: (2*1 + 0.5*4*3) / (2 + 0.5*4) = 2 at the second of (3 by 4 tokens, 1 by 2 tokens)."
    assert smooth(np.array([3.0, 1.0]), np.array([4.0, 2.0]), 2).tolist() == [3.0, 2.0]
    assert smooth(np.full(50, 1.7), np.arange(1.0, 51), 5) == pytest.approx(np.full(50, 1.7))


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e90, -1e-90])
def test_a_constant_is_drawn_within_the_frame(value):
    "One value only: an axis around it, no division by zero."
    chart = draw([Line("line", np.array([1.0, 2.0]), np.array([value, value]))], SMALL, zero=True)
    assert chart is not None
    heights = [float(p.split()[1]) for p in chart.paths[0].d[1:].split("L")]
    assert all(SMALL.top <= h <= SMALL.height - SMALL.bottom for h in heights)


def test_nothing_to_draw_is_no_chart():
    "An empty series has no axes either."
    assert draw([Line("line", np.array([]), np.array([]))], SMALL) is None


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (loss(2.31447), "2.314"), (loss(0.012344), "0.01234"), (loss(0.0), "0.000"), (loss(None), "–"),
        (count(1234567.0), "1,234,567"), (short(2e-5), "2e-5"), (short(0.0002), "2e-4"), (short(0.05), "0.05"),
        (short(2000.0), "2,000"), (short(3e6), "3e6"), (share(1, 3), "33.3 %"), (share(1, 1_000_000), "< 0.1 %"),
        (size(3 << 30), "3 GiB"), (size(12_345_678_901), "11.5 GiB"), (size(1023), "1023 B"), (duration(3.21), "3.2 s"),
        (duration(59.7), "1 min 00 s"), (duration(7265), "2 h 01 min"), (duration(273_600), "3 d 04 h"),
        (number(True), None), (number("3"), None), (number(float("nan")), None), (number(float("inf")), None), (number(3), 3.0),
    ],
)  # fmt: skip
def test_quantities_read_as_people_write_them(shown, expected):
    "Units and digits that fit the size."
    assert shown == expected
