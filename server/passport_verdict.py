"""What an archive may be used for and what not, in plain words, from the report's numbers and never more than they say.

::

    scores of DS1, DS3, TSTR (with intervals) + per-class figures + privacy + curation --> one sentence, uses, warnings

A use that is not shown is a warning, not a use: "no gain was shown" stands under what the archive is not for. The limits
below are conventions, stated beside each sentence that rests on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xfed.server.report import difference, guessing_rate
from xfed.server.templates import signed

__all__ = ["LIMITS", "curation_of", "judgement"]

LIMITS = {"recognised": 0.5, "coverage": 0.5, "alike": 0.1}
"""A class below these shares, or whose pairs are more alike than real ones by so much, is named in a warning."""
ALWAYS_USE = "Testing software, teaching how models are trained, trying out methods: where no image needs to be right."
ALWAYS_NOT = (
    "Diagnosis, or any decision about a patient. Nothing here is a medical device.",
    "Learning how frequent a finding is: the numbers per class were chosen, not observed.",
)


def judgement(report: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, Any]:
    """ "summary": one sentence; "may" and "may_not": lists of sentences."""
    may, warned, brief = [ALWAYS_USE], list(ALWAYS_NOT), []
    for judge in (_training_beside_real, _training_alone):
        use, warning, short = judge(report)
        may += use
        warned += warning
        brief.append(short)
    warned += _classes(report)
    warned.append(_privacy(report, manifest))
    brief.append("no differential privacy" if _epsilon(report) is None else f"epsilon at most {_epsilon(report):.3g}")
    seen = curation_of(manifest)
    if seen.startswith("none"):
        warned.append("Teaching radiology, or as pictures of disease: no person has looked at these images yet.")
    brief.append("not yet looked at by a person" if seen.startswith("none") else "looked at by people")
    if report.get("source") == "phantom":
        warned.append("Anything about patients: the images behind this archive are drawn phantoms.")
    counts = report["archive"].get("counts") or {}
    size = report.get("image_size")
    opening = f"{sum(counts.values()):,} synthetic images of {len(report['classes'])} classes"
    return {
        "summary": f"{opening}{f' at {size} × {size} px' if size else ''}: {'; '.join(part for part in brief if part)}.",
        "may": may,
        "may_not": warned,
    }


Judged = tuple[list[str], list[str], str]


def _training_beside_real(report: Mapping[str, Any]) -> Judged:
    """DS3 against DS1: does adding the archive to real images help?"""
    gap = difference(report, "balanced_accuracy")
    if gap is None:
        return [], ["Training beside real images: whether it helps was not measured."], "help in training not measured"
    found = f"balanced accuracy {signed(gap.value)} (interval {signed(gap.low)} to {signed(gap.high)})"
    if not gap.shown:
        text = f"Training beside real images with a gain in mind: none was shown ({found})."
        return [], [text], "not shown to help training beside real images"
    if gap.value > 0:
        text = (
            f"Training beside real images of the same classes, at hospitals like these: {found} on their test patients."
        )
        return [text], [], "shown to help training beside real images"
    return [], [f"Training beside real images: it made the classifier worse, {found}."], "shown to harm training"


def _training_alone(report: Mapping[str, Any]) -> Judged:
    """TSTR: what does the archive teach without a real image?"""
    facts, guessing = report["archive"].get("tstr") or {}, guessing_rate(report)
    interval = facts.get("balanced_accuracy_interval")
    if not interval:
        reason = facts.get("left_out") or "not measured"
        return [], [f"Training without real images: how well that works is not known ({reason})."], ""
    real = (report.get("arms") or {}).get("DS1", {}).get("balanced_accuracy")
    score = f"{facts['balanced_accuracy']:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"
    beside = f", one of real images {real:.2f}" if real is not None else ""
    found = f"a classifier of this archive alone reached {score} balanced accuracy on real test images{beside}; "
    found += f"guessing reaches {guessing:.2f}"
    if interval[0] <= guessing:
        return [], [f"Training without real images: {found}."], "alone not shown to teach more than guessing"
    return (
        [f"First experiments, or training before real images are at hand: {found}."],
        [],
        "teaches more than guessing",
    )


def _classes(report: Mapping[str, Any]) -> list[str]:
    archive = report["archive"]
    quality = archive.get("quality") or {}
    recognised = (archive.get("recognised") or {}).get("per_class") or {}
    texts = []
    odd = [name for name, share in recognised.items() if share < LIMITS["recognised"]]
    if odd:
        shares = ", ".join(f"{name} ({recognised[name]:.0%})" for name in odd)
        texts.append(
            "Relying on these classes' labels: a classifier of real images calls fewer than half of them by their class: "
            f"{shares}."
        )
    narrow = [
        name
        for name, facts in quality.items()
        if facts.get("coverage") is not None and facts["coverage"] < LIMITS["coverage"]
    ]
    if narrow:
        shares = ", ".join(f"{name} ({quality[name]['coverage']:.0%})" for name in narrow)
        texts.append(
            f"Showing how varied these classes are: less than half of the real variety is near any image: {shares}."
        )
    alike = [
        name
        for name, facts in quality.items()
        if facts.get("ms_ssim") is not None
        and facts.get("ms_ssim_real") is not None
        and facts["ms_ssim"] - facts["ms_ssim_real"] > LIMITS["alike"]
    ]
    if alike:
        texts.append(
            f"Taking each image as a new case: these classes' images are more alike than real ones: {', '.join(alike)}."
        )
    return texts


def _epsilon(report: Mapping[str, Any]) -> float | None:
    sites = ((report.get("privacy") or {}).get("sites") or {}).values()
    figures = [entry.get("epsilon") for entry in sites]
    return None if not figures or None in figures else float(max(figures))


def _privacy(report: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    epsilon = _epsilon(report)
    if epsilon is None:
        return (
            "Taking it for anonymous: there is no differential privacy (epsilon is infinite). Synthetic images can carry "
            "features of training patients; who may receive them is for the data-protection officer to decide."
        )
    return f"Taking it for free of any patient: what it can reveal of one is bounded (epsilon {epsilon:.3g} at most), not 0."


def curation_of(manifest: Mapping[str, Any]) -> str:
    """Whether people looked at the images, in words: begins with "none" where nobody did."""
    found = manifest.get("curation") or "none"
    return str(found.get("summary", "none") if isinstance(found, Mapping) else found)
