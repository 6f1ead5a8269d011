"""Line charts without a chart library: series in, the geometry of an SVG out (axes with nice numbers, bounded paths)."""

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
    ys = np.concatenate([np.array(list(marks.values()), float), *(line.y for line in lines)])
    xs = np.concatenate([np.array(list(marks), float), *(line.x for line in lines)])
    if not len(ys):
        return None
    logarithmic = log and ys.min() > 0 and ys.max() / ys.min() >= LOG_FROM
    values = np.log10(ys) if logarithmic else ys
    y_at = log_ticks(values.min(), values.max()) if logarithmic else nice_ticks(*_range(values, zero), widen=True)
    x_at = [
        t
        for t in nice_ticks(float(xs.min()), max(float(xs.max()), float(xs.min()) + 1), most=size.most_x_ticks)
        if t == round(t)
    ]
    bounds = (min(values.min(), y_at[0]), max(values.max(), y_at[-1])) if logarithmic else (y_at[0], y_at[-1])
    x_scale = _Scale(float(xs.min()), float(xs.max()), size.left, size.width - size.right)
    y_scale = _Scale(float(bounds[0]), float(bounds[1]), size.height - size.bottom, size.top)

    def y_of(y: Float64) -> Float64:
        return y_scale.at(np.log10(y) if logarithmic else y)

    placed = zip(
        marks, x_scale.at(np.array(list(marks), float)), y_of(np.array(list(marks.values()), float)), strict=True
    )
    ends = {min(marks), max(marks)} if marks else set()
    return Chart(
        size,
        tuple(Tick(round(float(x_scale.at(np.array(t))), 2), f"{t:,.0f}") for t in x_at if t <= xs.max()),
        tuple(Tick(round(float(y_scale.at(np.array(t))), 2), short(10**t if logarithmic else t)) for t in y_at),
        tuple(_path(line, x_scale, y_of) for line in lines if len(line.x)),
        tuple(
            Dot(
                round(float(x), 2),
                round(float(y), 2),
                f"step {s:,}: {loss(marks[s])}",
                loss(marks[s]) if s in ends else "",
            )
            for s, x, y in placed
        ),
    )


@dataclass(frozen=True, slots=True)
class _Scale:
    """Values [low, high] to coordinates [start, stop]; a single value lies at the start."""

    low: float
    high: float
    start: float
    stop: float

    def at(self, values: Float64) -> Float64:
        span = self.high - self.low
        part = (values - self.low) / span if span else np.zeros_like(values)
        return np.asarray(self.start + part * (self.stop - self.start))


def _path(line: Line, x_scale: _Scale, y_of: object) -> Path:
    x, y = thin_out(line.x, line.y, MOST_POINTS)
    points = zip(x_scale.at(x).tolist(), y_of(y).tolist(), strict=True)  # type: ignore[operator]
    return Path(line.kind, "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in points), len(x))


def _range(values: Float64, zero: bool) -> tuple[float, float]:
    """What the y axis must cover; a constant gets room around it."""
    low, high = float(values.min()), float(values.max())
    if zero:
        low = min(low, 0.0)
    if low == high:
        low, high = low - abs(low) / 2, high + (abs(high) / 2 or 1.0)
    return low, high


def nice_ticks(low: float, high: float, *, most: int = 5, widen: bool = False) -> list[float]:
    """About `most` multiples of 1, 2 or 5 times a power of ten in [low, high]; widen: from the one below to the one above."""
    raw = (high - low) / most
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= raw * (1 - 1e-9))
    slack = 1e-9
    first, last = math.ceil(low / step - slack), math.floor(high / step + slack)
    if widen:
        first, last = math.floor(low / step + slack), math.ceil(high / step - slack)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Whole powers of ten as exponents between log10 values, at most about 6 of them."""
    first, last = math.ceil(low - 1e-9), math.floor(high + 1e-9)
    return [float(e) for e in range(first, last + 1, max(1, math.ceil((last - first) / 5)))]


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
