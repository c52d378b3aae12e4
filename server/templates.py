"""The pages' templates: one environment for all of them, so that numbers and looks are the same on both.

::

    PACKAGE/*.html.j2 (package data) + server/report.css --render--> one HTML file that loads nothing

Everything from a report is escaped; a missing part is empty, never an error (reports of older versions are rendered too).
"""

from __future__ import annotations

from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

__all__ = ["render_page", "signed"]


def signed(value: float, digits: int = 2) -> str:
    """A number with its sign (a minus, not a hyphen); 0 has none."""
    text = f"{value:+.{digits}f}"
    return text.replace("-", "−") if float(text) else f"{0:.{digits}f}"


def _bytes(value: Any) -> str:
    size = float(value or 0)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"


def _duration(seconds: Any) -> str:
    value = float(seconds or 0)
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _source(name: str, package: str = "xfed.server") -> str:
    place = resources.files(package).joinpath(name)
    return (place if place.is_file() else resources.files("xfed.server").joinpath(name)).read_text(encoding="utf-8")


def render_page(template: str, *, package: str = "xfed.server", **values: Any) -> str:
    """The page `template` (a file of `package`, else of this one) with `values`; `style` is the common style sheet."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: _source(name, package)),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"bytes": _bytes, "duration": _duration, "signed": signed}
    return environment.get_template(template).render(style=Markup(_source("report.css")), **values)  # noqa: S704 (ours)
