"""The statements of an audit in words: what a claim means, what it rests on, and what it does not cover.

::

    facts of the sites (plain values) + config.yaml + Evidence --points--> 21 numbered statements
    epsilon, delta --consequence--> one sentence for people who have never heard of epsilon

Pure text. What a ledger cannot show (noise source, clipping as run) is said to be the software's word, not the auditor's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from xfed.common.auditor.composition import DELTAS

__all__ = ["consequence", "points"]

_WORD = "This is the word of the software that wrote the ledger; a ledger cannot show it."


def consequence(epsilon: float | None, delta: float) -> str:
    """What an epsilon means for one patient, as a change of odds. None: infinite or unknown."""
    if epsilon is None:
        return (
            "No bound: by this claim, whoever sees what was released may be able to tell with certainty whether "
            "a certain patient "
            "took part, or what their images show."
        )
    if epsilon == 0:
        return "Nothing computed from patients was released: what was released tells nothing about any of them."
    odds, even, rare = math.exp(min(epsilon, 700)), 1 / (1 + math.exp(-epsilon)), _posterior(0.01, epsilon)
    times = f"{odds:,.1f}" if odds < 100 else f"{odds:,.0f}" if odds < 1e6 else f"{odds:.1e}"
    verdict = (
        "This is a strong limit."
        if epsilon <= 1
        else "This is a moderate limit."
        if epsilon <= 3
        else "This is a weak limit."
        if epsilon <= 10
        else "This limit alone protects hardly anybody."
    )
    return (
        f"Whoever sees everything that was released, whatever else they know, can raise the odds that a certain "
        "patient took part "
        f"by a factor of at most {times}: a guess of 50% becomes at most {_percent(even)}, one of 1% at most "
        f"{_percent(rare)}; "
        f"except with a probability of about {delta:g}. {verdict} What is true of patients in general may be "
        "learned all the same."
    )


def _posterior(prior: float, epsilon: float) -> float:
    return prior / (prior + (1 - prior) * math.exp(-epsilon))


def _percent(share: float) -> str:
    # "at most": rounded up
    return f"{math.ceil(100 * share - 1e-9)}%" if share < 0.99 else f"{min(100 * share, 99.9999):.4g}%"


def points(facts: Mapping[str, Any], config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The 21 points: {number, title, text}. `facts` as `xfed.common.auditor.report` builds them."""
    texts = [*_model(facts), *_mechanism(facts, config), *_accounting(facts), *_limits(facts, config)]
    return [{"number": n, "title": title, "text": text} for n, (title, text) in enumerate(texts, 1)]


def _model(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    sites: Mapping[str, Any] = facts["sites"]
    phases = sorted({part["phase"] for site in sites.values() for part in site["parts"]})
    return [
        (
            "Model of privacy, and whom it trusts",
            "Every site adds noise to its own sums before anything leaves it (differential privacy at each site, "
            "no trusted "
            "curator). Trusted are: a site's own machine and software, and that a site truly ran what its ledger "
            "says. Not trusted: "
            "the coordinator, other sites, readers of the archive, of a model or of this report. A hospital's "
            "machine under "
            "somebody else's control is out of scope.",
        ),
        (
            "What was released, and what is not covered",
            f"Covered: {', '.join(phases) or 'nothing'}; each answer that left has a release line with its "
            "SHA-256. Not covered: that "
            "a site answers, when and how large its answer is; refusals and their reasons; the declared numbers "
            "of patients; anything "
            "that a site did beside this software"
            + (
                f"; other studies on the same patients, which are in the same ledgers ({facts['other_studies']} "
                "of them)."
                if facts["other_studies"]
                else "."
            ),
        ),
        (
            "Unit of privacy, and how it is enforced",
            "The patient, with all their images. Each patient belongs to one class; each step draws one image of "
            "a sampled patient, "
            f"and each patient's whole gradient is clipped. An epsilon per image is not offered. {_WORD}",
        ),
        (
            "Neighbours",
            "Two data sets are neighbours when one has one patient more than the other (add or remove). "
            "Replacing a patient is two such "
            "steps.",
        ),
        (
            "Whether sizes and labels are public",
            "Public: the declared number of patients per class of each site, and which sites take part in which "
            "class. Secret: "
            "the true numbers, who is in the data, every patient's class and images.",
        ),
        (
            "Every touch of the data",
            "; ".join(
                f"{name}: {site['spent_attempts']} spent, {site['broken_off']} broken off before anything left, "
                f"{len(site['standing'])} reserved and standing, {len(site['refusals'])} refused before patients "
                "were read"
                for name, site in sites.items()
            )
            + ". Exempt: building the store and splits at the site, from which nothing leaves but the declared sizes.",
        ),
    ]


def _mechanism(facts: Mapping[str, Any], config: Mapping[str, Any]) -> list[tuple[str, str]]:
    sites: Mapping[str, Any] = facts["sites"]
    parts = [part for site in sites.values() for part in site["parts"]]
    sampled = [part["q"] for part in parts if part["sampling"] == "poisson"]
    rates = f"q from {min(sampled):.4g} to {max(sampled):.4g}" if sampled else "no mechanism was sampled"
    sigmas = [part["sigma"] for part in parts]
    gan, classifier = _section(config, "gan"), _section(config, "classifier")
    batches = (
        f" Expected batch, public: {gan.get('batch')} patients for generators, {classifier.get('batch')} for the "
        "classifier "
        "(fewer where fewer are declared)."
        if gan and classifier
        else ""
    )
    return [
        (
            "Sampler, rate and expected batch",
            f"Poisson sampling: at each step every patient is taken by an independent draw ({rates}); embeddings "
            "and scores read every "
            f"patient once, without sampling.{batches} Each mechanism's q is in the tables below.",
        ),
        (
            "Noised releases, retries counted",
            "; ".join(
                f"{name}: {site['noised_sums']:,} noised sums in {site['spent_attempts']} answers, of which "
                f"{site['retries']} retries "
                f"and {site['spent_but_not_released']} that never left"
                for name, site in sites.items()
            )
            + ". All of these are composed, whether they left or not. Reservations that stand are not in the "
            "claim; with them see each "
            "site.",
        ),
        (
            "Clip norm, sigma, normaliser",
            (
                f"Noise multipliers from {min(sigmas):.4g} to {max(sigmas):.4g}; clip norms and deviations are "
                "in the tables below. "
                if sigmas
                else "No mechanism was run. "
            )
            + "Sums are divided by a public constant (the expected batch or the declared size), never by the "
            "number drawn or held. " + _WORD,
        ),
    ]


def _accounting(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    sites: Mapping[str, Any] = facts["sites"]
    names = dict.fromkeys(one["name"] for site in sites.values() for one in site["accountants"])
    apart = [
        name
        for name, site in sites.items()
        for a, b in [[one["epsilon"] for one in site["accountants"]]]
        if abs(a - b) > 0.01 * min(a, b)
    ]
    agree = (
        "They agree within 1% everywhere."
        if not apart
        else f"They differ by more than 1% at {', '.join(apart)}: the larger counts."
    )
    overlap = facts["overlap"]
    return [
        ("Accountants", f"{'; '.join(names)}. {agree} RDP, where PRV cannot be computed, is a looser upper bound."),
        (
            "Epsilon at delta, the rule for delta, the curve",
            f"Delta is {facts['delta']:g}. Rule: below 1 / patients of a site, or publishing one patient at "
            "random would pass. "
            f"{facts['delta_check']} The curve from delta {DELTAS[0]:g} to {DELTAS[-1]:g} is drawn for each site.",
        ),
        (
            "Composition, and why parallel parts are parallel",
            "In sequence, composed: all steps and rounds, all tries, generators, classifier and scores of the "
            "same patient. In parallel, "
            "the largest counts: classes, because every patient contributes to one class alone; sites, because "
            "patients are stated "
            "to attend one site"
            + (". " if overlap == 1 else f", or at most {overlap}: every event is composed {overlap} times. ")
            + "Losses are composed as events, never as epsilons.",
        ),
        (
            "Epsilon of each site",
            "; ".join(f"{name}: {_epsilon(site['epsilon'])}" for name, site in sites.items())
            + f". The largest is {_epsilon(facts['maximum']['epsilon'])}; no mean is formed.",
        ),
        (
            "Cost of tuning",
            "What was tried on these patients before is charged only as far as it is in the ledgers: "
            + "; ".join(
                f"{name}: {len(site['studies'])} studies, together {_epsilon(site['epsilon_all_studies'])}"
                for name, site in sites.items()
            )
            + ". Settings that were chosen by looking at patients without a ledger are not covered.",
        ),
    ]


def _limits(facts: Mapping[str, Any], config: Mapping[str, Any]) -> list[tuple[str, str]]:
    source = _section(config, "data").get("source")
    gan_method = _section(config, "gan").get("method")
    software = dict.fromkeys(name for site in facts["sites"].values() for name in site["software"])
    return [
        (
            "Source of the noise",
            f"{', '.join(software) or 'The software'}: ChaCha20 under a fresh key of the operating system for "
            "each release; no seed, "
            f"no checkpoint, nothing repeats after a restart. {_WORD}",
        ),
        (
            "Floating point",
            "Sums are rounded to a grid, noise is rounded to it by itself, and both are added as integers, so "
            "that the set of possible "
            f"results does not hang on the data; the noise is enlarged by 1e-4 for what rounding adds. {_WORD}",
        ),
        (
            "Post-processing, and what would break it",
            "Generators' updates, averages, the archive and everything computed from them alone cost nothing "
            "more. It would break if "
            "anything else read patients: stopping or choosing a checkpoint by real images, dropping synthetic "
            "images near real ones, "
            "un-noised losses or counts in logs" + (f" (method here: {gan_method})." if gan_method else "."),
        ),
        (
            "Disclosure of sizes",
            "Declared sizes are chosen by the site or rounded to ten; they fix q and the normaliser and are "
            "published without noise. "
            "They are outside the claim. A patient more or less changes no declared size once it is fixed for a study.",
        ),
        (
            "Public data",
            (
                "Images are phantoms, drawn by a procedure: no patient is behind this study. "
                if source == "phantom"
                else ""
            )
            + "No public images entered training: starting weights are random from a public seed. Constants "
            "(length scales, rules of the "
            "discriminator) were measured on phantoms.",
        ),
        (
            "Empirical lower bound",
            _empirical(facts["sites"]),
        ),
        (
            "Signed digests",
            "; ".join(
                f"{name}: line {site['head']['seq']}, {site['head']['hash'][:16]}..., key of "
                f"{site['endorsed_by'] or 'nobody'}"
                for name, site in facts["sites"].items()
            )
            + f". Report signed by {facts['coordinator'] or 'nobody'}. Compare fingerprints by telephone: files "
            "cannot vouch for themselves.",
        ),
    ]


def _empirical(sites: Mapping[str, Any]) -> str:
    found = {name: site["empirical"] for name, site in sites.items() if site["empirical"] is not None}
    if not found:
        return (
            "None is part of this report. An upper bound that is computed from a ledger cannot show that the software does what "
            "it says; a canary audit can refute it (xfed-audit report --empirical)."
        )
    bounds = "; ".join(
        f"{name}: at least {one['epsilon_lower_bound']:.3g} beside {sites[name]['epsilon']:.4g} ({one['confidence']:.0%} "
        f"confidence, {one['right']} of {one['guesses']} guesses right among {one['canaries']:,} canaries)"
        for name, one in found.items()
    )
    return (
        f"{bounds}. The mechanism installed here did on canaries all that patients of the worst class were exposed to; a bound "
        "above the claim would refute it, one below proves nothing more. Small sampling rates hide faults from this attack."
    )


def _epsilon(value: float | None) -> str:
    return "infinite or unknown" if value is None else f"epsilon {value:.4g}"


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = config.get(name)
    return value if isinstance(value, dict) else {}
