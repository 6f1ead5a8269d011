"""Quantities as people read them: counts, losses, shares, rates, bytes and durations as short text."""

from __future__ import annotations

import math
from typing import Any

NONE = "–"  # what stands for a number that is not known
LARGEST, SMALLEST = 1e100, 1e-100  # beyond them a number is taken for a fault of the file, and for 0


def number(value: Any) -> float | None:
    """`value` as a float if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGEST:
        return None
    return float(value) if abs(value) > SMALLEST else 0.0


def count(value: float | None) -> str:
    """1,234,567."""
    return NONE if value is None else f"{value:,.0f}"


def loss(value: float | None) -> str:
    """2.314, and four significant digits below 1: 0.01234."""
    if value is None:
        return NONE
    return f"{value:.3f}" if abs(value) >= 1 or value == 0 else f"{value:.{3 - math.floor(math.log10(abs(value)))}f}"


def change(value: float | None) -> str:
    """A difference with its sign: +0.021, −0.442."""
    return NONE if value is None else f"{'−' if value < 0 else '+'}{loss(abs(value))}"


def rate(value: float | None) -> str:
    """1,234 from 100 on; three significant digits below."""
    if value is None:
        return NONE
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def share(part: float, whole: float) -> str:
    """12.3 %; a share that is not zero never shows as 0."""
    if not whole:
        return NONE
    percent = 100 * part / whole
    return "< 0.1 %" if 0 < percent < 0.05 else f"{percent:.1f} %"


def size(value: float | None) -> str:
    """Bytes in binary units: 3.21 GiB."""
    if value is None:
        return NONE
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}" if value < 1000 * scale else f"{value / scale:,.0f} {unit}"
    return f"{value:.0f} B"


def duration(value: float | None) -> str:
    """3.2 s, 42 s, 4 min 05 s, 2 h 07 min, 3 d 04 h."""
    if value is None:
        return NONE
    if value < 10:
        return f"{value:.2g} s"
    s = round(value)
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60:02d} s"
    return f"{s // 3600} h {s % 3600 // 60:02d} min" if s < 86400 else f"{s // 86400} d {s % 86400 // 3600:02d} h"


def short(value: float) -> str:
    """For an axis: 0, 0.05, 2,000, 1.5e-5, 2e6."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:,.6g}"
    mantissa, _, exponent = f"{value:.3g}".partition("e")
    if not exponent:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        mantissa = mantissa.rstrip("0").rstrip(".")
    return f"{mantissa}e{int(exponent)}"
