"""The epsilon(delta) curve as a drawing inside the page: SVG text, no script, no font, no file.

::

    [(delta, epsilon)] + the claimed point --> <svg>...</svg>

Pure. Delta is on a logarithmic axis, epsilon on a linear one from 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["curve_svg"]

_WIDTH, _HEIGHT = 640, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 14, 40


def curve_svg(points: Sequence[Sequence[float]], delta: float, epsilon: float) -> str:
    """The drawing, or "" where there is nothing to draw."""
    shown = [(math.log10(x), y) for x, y in points if x > 0 and math.isfinite(y)]
    if len(shown) < 2 or not math.isfinite(epsilon) or epsilon <= 0:
        return ""
    low, high = min(min(x for x, _ in shown), math.log10(delta)), max(max(x for x, _ in shown), math.log10(delta))
    step = _step(max(*(y for _, y in shown), epsilon))
    top = step * math.ceil(max(*(y for _, y in shown), epsilon) / step)

    def x_of(value: float) -> float:
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def y_of(value: float) -> float:
        return _HEIGHT - _BOTTOM - value / top * (_HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" class="curve">',
        f"<title>epsilon by delta: {epsilon:.3g} at delta {delta:g}</title>",
    ]
    for number in range(round(top / step) + 1):
        y = y_of(number * step)
        parts.append(f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH - _RIGHT}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{number * step:g}</text>')
    for exponent in range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1):
        x = x_of(exponent)
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">1e{exponent}</text>')
    line = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in sorted(shown))
    parts.append(f'<polyline points="{line}" class="line"/>')
    x, y = x_of(math.log10(delta)), y_of(epsilon)
    # the curve falls: it leaves room above to the right and below to the left
    side = (
        f'x="{x - 9:.1f}" y="{y + 19:.1f}" text-anchor="end"'
        if x > _WIDTH * 0.7
        else f'x="{x + 9:.1f}" y="{y - 9:.1f}"'
    )
    parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" class="claim"/>')
    parts.append(f'<text {side} class="strong">ε {math.ceil(epsilon * 100 - 1e-9) / 100:g} at δ {delta:g}</text>')
    parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 4}" text-anchor="end">delta</text>')
    parts.append(f'<text x="4" y="{_TOP + 4}">ε</text></svg>')
    return "".join(parts)


def _step(most: float) -> float:
    """A round step that gives three to seven lines."""
    base = 10.0 ** math.floor(math.log10(most))
    return next(base * factor for factor in (0.2, 0.5, 1, 2) if most / (base * factor) <= 6)
