"""The scores of `xfed-client evaluate` for a person at the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["print_scores"]


def _span(facts: Mapping[str, Any], name: str) -> str:
    if facts.get(name) is None:
        return "–"
    interval = facts.get(f"{name}_interval")
    return f"{facts[name]:.3f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")


def print_scores(scores: Mapping[str, Any], console: Console) -> None:
    """A table per class, the two accuracies side by side, and what could not be scored."""
    table = Table(header_style="bold")
    table.add_column("class")
    for name in ("n", "sensitivity", "specificity", "AUC"):
        table.add_column(name, justify="right")
    for name, facts in scores["per_class"].items():
        spans = [_span(facts, key) for key in ("sensitivity", "specificity", "auc")]
        table.add_row(Text(name), str(facts["n"]), *spans)
    console.print(table)
    console.print(
        f"Balanced accuracy {_span(scores, 'balanced_accuracy')}, accuracy {_span(scores, 'accuracy')}, "
        f"{scores['n']} images of {scores['patients']} patients; 95% intervals with the patient as the unit.",
        highlight=False,
    )
    for title, key in (("Left out", "left_out"), ("Unreadable", "unreadable")):
        for reason, count in scores[key].items():
            console.print(Text(f"{title}: {count} images: {reason}"))
