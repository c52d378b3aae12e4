"""How a study's privacy budget becomes noise: one plan per site, from public figures alone.

::

    study.privacy (epsilon, delta, shares, overlap) + declared patients per class --plan_budget--> Budget
        1. each part alone:   embeddings, generators (per class), classifier, scores --calibrate to share x epsilon--> sigma
        2. all parts together: every sigma x one factor, such that max over classes of epsilon(class + shared) meets epsilon
    Budget.parts --> Part.per_round: the Event of one request        Part.whole: of the study        Budget.of_class: composed

Nothing is on disk, and nothing here reads patients: site, coordinator and auditor make the same plan. Noise multipliers are
rounded up to four significant digits, so that they are the same on every machine and can be read aloud.

Formal guarantees
    A patient belongs to one class, so their events are those of that class and those of the parts that read every class;
    the site's epsilon is the maximum over classes of the composition, never a mean, and at most `privacy.epsilon`.
    With `privacy.overlap` k every event is composed k times: a patient of k sites with such a plan each.
Not covered
    Rounds that are run again: they are further events, which the site's ledger counts and its budget refuses.
    With overlap, sites whose plans differ: the k largest losses would have to be composed from the ledgers of all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from xfed.common.accounting import TIGHTNESS, calibrate, epsilon, epsilon_bound, epsilon_estimate, smallest_factor
from xfed.common.config import Study
from xfed.common.dp_events import Event, merged
from xfed.common.errors import ConfigError

__all__ = ["SCORE_SENSITIVITY", "Budget", "Part", "plan_budget"]

SCORE_SENSITIVITY = math.sqrt(2)
"""One patient changes two counts of a test's table by one each."""
EMBEDDING_SENSITIVITY = 1.0
SMALL_CLASS = 1000
LARGE_SIGMA = 20.0


@dataclass(frozen=True, kw_only=True)
class Part:
    """One use of the patients: what is run, how often, and by how many patients it is fed (`expected`, public).

    `name` is embeddings, generators, classifier or scores; `class_name` is None where patients of every class are read.
    `per_round` is the event of one request (its `steps` are the steps of a round); there are `requests` of them.
    """

    name: str
    class_name: str | None
    per_round: Event
    requests: int
    expected: int

    @property
    def phase(self) -> str:
        """The ledger's word: embeddings belong to the generators."""
        return "generators" if self.name == "embeddings" else self.name

    @property
    def whole(self) -> Event:
        """All requests of the study as one event."""
        return self.per_round.times(self.per_round.steps * self.requests)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The plan of one site. `epsilons` holds each class's composed epsilon at `delta`, `epsilon` the site's (the maximum)."""

    target: float
    delta: float
    overlap: int
    parts: tuple[Part, ...]
    epsilons: Mapping[str, float]
    warnings: tuple[str, ...]

    @property
    def epsilon(self) -> float:
        """The site's epsilon: of the patients who lose most."""
        return max(self.epsilons.values())

    def part(self, name: str, class_name: str | None = None) -> Part:
        """The part of that name and class. Raises `ConfigError` where the plan has none."""
        for part in self.parts:
            if (part.name, part.class_name) == (name, class_name):
                return part
        of = f" of {class_name}" if class_name is not None else ""
        raise ConfigError(
            f"the privacy budget of this site has no part for {name}{of}: no patients are declared for it"
        )

    def of_class(self, class_name: str) -> list[Event]:
        """All that patients of a class are exposed to, at all the sites they may attend."""
        return _of_class(self.parts, class_name, self.overlap)


def plan_budget(study: Study, declared: Mapping[str, int]) -> Budget:
    """The plan of a site that declares so many patients per class. Raises `ConfigError` where none is possible.

    The site's epsilon is at most `study.privacy.epsilon`, and at least 0.98 of it.
    """
    target, delta, sizes = _checked(study, declared)
    parts = [_alone(part, share * target, delta) for part, share in _parts(study, sizes)]
    overlap, room = study.privacy.overlap, (1 - TIGHTNESS) * target

    def cost(of: Callable[[list[Event], float], float], class_name: str, factor: float) -> float:
        return of(_of_class([_scaled(part, factor) for part in parts], class_name, overlap), delta)

    def needed(of: Callable[[list[Event], float], float], class_name: str, start: float, tolerance: float) -> float:
        return smallest_factor(lambda f: cost(of, class_name, f), room, start=start, tolerance=tolerance)

    factor = smallest_factor(lambda f: max(cost(epsilon_estimate, name, f) for name in sizes), room)
    worst = max(sizes, key=lambda name: cost(epsilon_bound, name, factor))
    factor = needed(epsilon_bound, worst, factor, 0.02)
    while (
        True
    ):  # at most once per class: the noise only grows, and with it every other class is further below its budget
        factor = needed(epsilon, worst, factor, 0.005)
        figures = {name: cost(epsilon, name, factor) for name in sizes}
        worst = max(figures, key=lambda name: figures[name])
        if figures[worst] <= room:
            break
    planned = tuple(_scaled(part, factor) for part in parts)
    return Budget(
        target=target,
        delta=delta,
        overlap=overlap,
        parts=planned,
        epsilons=figures,
        warnings=(*_warnings_of_sizes(study, sizes), *_warnings_of_noise(planned)),
    )


def _checked(study: Study, declared: Mapping[str, int]) -> tuple[float, float, dict[str, int]]:
    """Epsilon, delta, and the declared patients of the classes that have any. Raises `ConfigError`."""
    target, delta = study.privacy.epsilon, study.privacy.delta
    if target is None or delta is None:
        raise ConfigError(
            "this study is not private: without privacy.epsilon and privacy.delta there is no budget to plan"
        )
    for name, count in declared.items():
        if name not in study.classes:
            raise ConfigError(f"patients are declared for {name!r}, which is none of the study's classes")
        if type(count) is not int or count < 0:
            raise ConfigError(f"{count!r} patients are declared for {name}: a whole number, 0 or more, is expected")
    sizes = {name: declared[name] for name in study.classes if declared.get(name, 0) > 0}
    total = sum(sizes.values())
    if not total:
        raise ConfigError("no patients are declared for any class of the study: this site has nothing to protect")
    if delta >= 1 / total:
        raise ConfigError(
            f"privacy.delta {delta:g} is not below 1 / {total} patients of this site: a mechanism that publishes one patient "
            f"at random would pass. Choose {1 / (10 * total):.1g} or less"
        )
    return target, delta, sizes


def _parts(study: Study, sizes: Mapping[str, int]) -> list[tuple[Part, float]]:
    """Every use of the patients, with its share of epsilon. The noise is still to be found: 1.0."""
    privacy, gan, classifier, total = study.privacy, study.gan, study.classifier, sum(sizes.values())
    arms, shares = len(classifier.arms), privacy.shares
    steps = classifier.steps_per_round or math.ceil(total / classifier.batch)
    found: list[tuple[Part, float]] = []

    def add(name: str, share: float, class_name: str | None, event: Event, requests: int, expected: int) -> None:
        if share <= 0:
            raise ConfigError(
                f"privacy.shares.{name} is 0, but the study has that part: it would need infinite noise. Give it a share"
            )
        part = Part(name=name, class_name=class_name, per_round=event, requests=requests, expected=expected)
        found.append((part, share))

    for name, size in sizes.items():
        if "dp-merf" in gan.method:
            add("embeddings", shares.embeddings, name, _event(1, 1, 1, EMBEDDING_SENSITIVITY), 1, size)
        if "dcgan" in gan.method:
            event = _event(gan.batch, size, gan.steps_per_round, privacy.clip)
            add("generators", shares.generators, name, event, gan.rounds, min(gan.batch, size))
    event = _event(classifier.batch, total, steps, privacy.clip)
    add("classifier", shares.classifier, None, event, arms * classifier.rounds, min(classifier.batch, total))
    add("scores", shares.scores, None, _event(1, 1, 1, SCORE_SENSITIVITY), arms, total)
    return found


def _event(batch: int, patients: int, steps: int, clip: float) -> Event:
    q = min(1.0, batch / patients)
    return Event(sampling="none" if q == 1 else "poisson", q=q, sigma=1.0, steps=steps, clip=clip)


def _alone(part: Part, share: float, delta: float) -> Part:
    """The part with the noise that it would need if it were all there is; near enough, for all are scaled together later."""
    factor = calibrate(lambda f: [_scaled(part, f).whole], share, delta, rough=True)
    return _scaled(part, factor)


def _scaled(part: Part, factor: float) -> Part:
    event = part.per_round
    return replace(part, per_round=replace(event, sigma=_rounded_up(event.sigma * factor)))


def _rounded_up(value: float) -> float:
    """The next larger number of four significant digits."""
    digits = 3 - math.floor(math.log10(value))
    # what was rounded before may lie a hair above its own decimal digits
    units = math.ceil(value * 10.0**digits - 1e-6) if digits >= 0 else math.ceil(value / 10.0**-digits - 1e-6)
    return float(f"{units}e{-digits}")


def _of_class(parts: list[Part] | tuple[Part, ...], class_name: str, overlap: int) -> list[Event]:
    whole = [part.whole for part in parts if part.class_name in (None, class_name)]
    return merged(event.times(event.steps * overlap) for event in whole)


def _warnings_of_sizes(study: Study, sizes: Mapping[str, int]) -> list[str]:
    small = [f"{name} ({size})" for name, size in sizes.items() if size < SMALL_CLASS]
    if not small or "dcgan" not in study.gan.method:
        return []
    return [
        f"fewer than about {SMALL_CLASS} patients: {', '.join(small)}. A larger batch no longer lowers the noise of their "
        "generators; dp-merf needs far less noise"
    ]


def _warnings_of_noise(parts: tuple[Part, ...]) -> list[str]:
    return [
        f"{part.name}{f' of {part.class_name}' if part.class_name else ''}: noise multiplier {part.per_round.sigma:g}: above "
        f"{LARGE_SIGMA:g} hardly anything is learned. Fewer steps, more patients or a larger epsilon would help"
        for part in parts
        if part.per_round.sigma > LARGE_SIGMA and part.name in ("generators", "classifier")
    ]
