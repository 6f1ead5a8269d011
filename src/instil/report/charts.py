"""Line charts without a chart library: series in, an SVG's geometry out (nice ticks, bounded paths)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from instil.report.quantities import loss, short

Float64 = NDArray[np.float64]

MOST_POINTS = 1000  # of a drawn path; more would be drawn on the same pixels
LOG_FROM = 100.0  # an axis that may be logarithmic is, when the largest value is so many times the smallest


@dataclass(frozen=True, slots=True)
class Size:
    """Of a chart, in units of its viewBox; the margins leave room for the tick labels."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int
    most_x_ticks: int


LARGE = Size(width=720, height=300, left=56, right=18, top=16, bottom=34, most_x_ticks=6)
NARROW = Size(width=360, height=270, left=40, right=16, top=16, bottom=34, most_x_ticks=4)
SMALL = Size(width=300, height=170, left=50, right=14, top=12, bottom=26, most_x_ticks=4)


@dataclass(frozen=True, slots=True)
class Tick:
    """A grid line at `at` and what is written beside it."""

    at: float
    label: str


@dataclass(frozen=True, slots=True)
class Dot:
    """A measured point, its tooltip, and the label that the first and the last carry."""

    x: float
    y: float
    title: str
    label: str


@dataclass(frozen=True, slots=True)
class Path:
    """One line of the chart: `d` of an SVG path with `points` points. A single point is drawn as a dot."""

    kind: str
    d: str
    points: int


@dataclass(frozen=True, slots=True)
class Chart:
    """All that the template draws."""

    size: Size
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    paths: tuple[Path, ...]
    dots: tuple[Dot, ...]


@dataclass(frozen=True, slots=True)
class Line:
    """A series to draw: y over x, both [n], finite, x ascending. kind: its class in the page's style."""

    kind: str
    x: Float64
    y: Float64


def draw(
    lines: Sequence[Line], size: Size, *, dots: Mapping[int, float] | None = None, zero: bool = False, log: bool = False
) -> Chart | None:
    """The chart of `lines` and `dots` (step: value) over steps; None where there is nothing to draw.

    zero: the y axis begins at 0. log: it may be logarithmic, and is where LOG_FROM says so.
    """
    marks = dict(sorted((dots or {}).items()))
    dot_x, dot_y = np.array(list(marks), float), np.array(list(marks.values()), float)
    xs = np.concatenate([dot_x, *(line.x for line in lines)])
    ys = np.concatenate([dot_y, *(line.y for line in lines)])
    if not len(ys):
        return None
    x_scale = _Scale(float(xs.min()), float(xs.max()), size.left, size.width - size.right)
    y_scale, y_ticks = _y_axis(ys, size, zero, log)
    x_ticks = nice_ticks(x_scale.low, max(x_scale.high, x_scale.low + 1), most=size.most_x_ticks)
    places = zip(marks.items(), x_scale.at(dot_x).tolist(), y_scale.at(dot_y).tolist(), strict=True)
    ends = (min(marks), max(marks)) if marks else ()
    return Chart(
        size,
        tuple(Tick(x_scale.one(t), f"{t:,.0f}") for t in x_ticks if t == round(t) and t <= x_scale.high),
        tuple(Tick(y_scale.one(t), short(t)) for t in y_ticks),
        tuple(_path(line, x_scale, y_scale) for line in lines if len(line.x)),
        tuple(
            Dot(round(x, 2), round(y, 2), f"step {step:,}: {loss(value)}", loss(value) if step in ends else "")
            for (step, value), x, y in places
        ),
    )


@dataclass(frozen=True, slots=True)
class _Scale:
    """Values [low, high] to coordinates [start, stop], by their logarithms if `log`; a single value lies at the start."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def at(self, values: Float64) -> Float64:
        low, high, v = (np.log10(x) if self.log else x for x in (self.low, self.high, values))
        part = (v - low) / (high - low) if high > low else np.zeros_like(values)
        return np.asarray(self.start + part * (self.stop - self.start))

    def one(self, value: float) -> float:
        return round(float(self.at(np.array(value))), 2)


def _y_axis(values: Float64, size: Size, zero: bool, log: bool) -> tuple[_Scale, list[float]]:
    """The scale and the ticks of the y axis: from tick to tick, or with `log` just what the values cover."""
    low, high = float(values.min()), float(values.max())
    floor, top = size.height - size.bottom, size.top
    if log and low > 0 and high / low >= LOG_FROM:
        return _Scale(low, high, floor, top, log=True), log_ticks(low, high)
    ticks = nice_ticks(*_range(low, high, zero), widen=True)
    return _Scale(ticks[0], ticks[-1], floor, top), ticks


def _path(line: Line, x_scale: _Scale, y_scale: _Scale) -> Path:
    x, y = thin_out(line.x, line.y, MOST_POINTS)
    points = zip(x_scale.at(x).tolist(), y_scale.at(y).tolist(), strict=True)
    return Path(line.kind, "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in points), len(x))


def _range(low: float, high: float, zero: bool) -> tuple[float, float]:
    """What the y axis must cover; a constant gets room around it."""
    low = min(low, 0.0) if zero else low
    return (low, high) if low < high else (low - abs(low) / 2, high + (abs(high) / 2 or 1.0))


def nice_ticks(low: float, high: float, *, most: int = 5, widen: bool = False) -> list[float]:
    """About `most` multiples of 1, 2 or 5 times a power of ten in [low, high]; widen: one below to one above."""
    raw = (high - low) / most
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= raw * (1 - 1e-9))
    slack = 1e-9
    first, last = math.ceil(low / step - slack), math.floor(high / step + slack)
    if widen:
        first, last = math.floor(low / step + slack), math.ceil(high / step - slack)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten in [low, high], at most 6 of them."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    return [10.0**e for e in range(first, last + 1, math.ceil((last - first + 1) / 6))]


def thin_out(x: Float64, y: Float64, most: int) -> tuple[Float64, Float64]:
    """At most `most` of the points, in order: the ends, and the lowest and the highest of equal stretches between.

    So that no spike is lost. All points where there are no more than `most`.
    """
    if len(x) <= most:
        return x, y
    inner = np.array_split(np.arange(1, len(x) - 1), (most - 2) // 2)
    extremes = [i for part in inner for i in sorted({part[np.argmin(y[part])], part[np.argmax(y[part])]})]
    kept = np.array([0, *extremes, len(x) - 1])
    return x[kept], y[kept]


def smooth(y: Float64, weight: Float64, span: float) -> Float64:
    """Exponential mean over about `span` points: ema(weight * y) / ema(weight), so that the start is not biased."""
    keep = 1 - 1 / max(span, 1.0)
    total = weights = 0.0
    means = []
    for value, counted in zip((y * weight).tolist(), weight.tolist(), strict=True):
        total, weights = keep * total + value, keep * weights + counted
        means.append(total / weights)
    return np.array(means)
