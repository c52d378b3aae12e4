"""A site's part in a private study: every touch of patients is reserved, made, kept, spent, released, in this order.

::

    request --stored answer? -- yes --> (spend, release: if a kill came between) --> the same answer again
                     | no
                     v
            ledger: an attempt that was broken off? --> resume (nothing of it was kept, nothing left)
            ledger: would it exceed the study's or the hospital's budget? --> refuse, before any patient is read
            ledger: reserve (fsync)
            Poisson draws, clipped sums, noise (xfed.common.mechanism)  -->  state/, then answers/ (fsync)
            ledger: spend (fsync), release with the digest of the answer (fsync)   --> reply (in a secure study: under masks)

What noise, how many steps and which patients follow from the study and the declared sizes (`declared.json`), which are public.
On disk after a kill: a reservation without an answer, which is closed when the round is asked again; or an answer without a
spend, which gets it before it is sent. So what was sent is always spent, and a kill costs no budget.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from xfed.client.answers import Answers
from xfed.client.cohort import Cohort, cohort, declared_sizes
from xfed.client.gan_states import GanStates
from xfed.client.ledger import Ledger
from xfed.client.policy import Policy
from xfed.client.shards import Shards
from xfed.client.store import Store
from xfed.common import messages as m
from xfed.common.arms import recipe
from xfed.common.budget import Budget, Part, plan_budget
from xfed.common.classifier import predict, sigmoid_decay
from xfed.common.config import Study
from xfed.common.devices import choose_device
from xfed.common.dp_events import Event
from xfed.common.errors import RefusedError
from xfed.common.gan import new_gan_state
from xfed.common.mechanism import Mechanism, SecretMechanism
from xfed.common.merf import embedding_sum, features_of
from xfed.common.noisy_scores import SENSITIVITY, count_scores
from xfed.common.packing import digest_of_reply
from xfed.common.private_classifier import train_private_round
from xfed.common.private_gan import Ladder, PrivateStep, train_private_gan_round
from xfed.common.randomness import torch_generator
from xfed.common.registry import build_classifier
from xfed.common.version import SOFTWARE
from xfed.common.weights import load_parameters, parameters_of, rounded

__all__ = ["PRIVATE", "PrivateSite"]

PRIVATE = (m.TrainGan, m.EmbedClass, m.TrainClassifier, m.ScorePrivately)
"""The requests that read patients in a private study. No other does."""


@dataclass(frozen=True, kw_only=True)
class _Touch:
    """One request as the ledger calls it."""

    phase: str
    class_name: str | None
    round: int
    event: Event


class PrivateSite:
    """Answers the requests of `PRIVATE`. `work` is the study's folder; `ledger` is opened when first needed."""

    def __init__(
        self,
        *,
        name: str,
        work: Path,
        study: Study,
        policy: Policy,
        store: Callable[[], Store],
        ledger: Callable[[], Ledger],
        mechanism: Mechanism | None = None,
    ) -> None:
        self._name, self._work, self._study, self._policy = name, work, study, policy
        self._open_store, self._open_ledger = store, ledger
        self._mechanism = mechanism or SecretMechanism()
        self._answers = Answers(work / "answers")
        self._states = GanStates(work / "state")
        self.shards = Shards(work / "archive", study)

    @cached_property
    def _store(self) -> Store:
        return self._open_store()

    @cached_property
    def _ledger(self) -> Ledger:
        return self._open_ledger()

    @cached_property
    def declared(self) -> tuple[int, ...]:
        """Training patients per class, as declared: public."""
        wished = self._policy.declared_patients
        return declared_sizes(self._work / "declared.json", self._store, self._study, wished)

    @cached_property
    def budget(self) -> Budget:
        """What the study may cost here. Raises `ConfigError` where the declared sizes allow no such study."""
        return plan_budget(self._study, dict(zip(self._study.classes, self.declared, strict=True)))

    @cached_property
    def _cohort(self) -> Cohort:
        return cohort(self._store, self._study, self.declared)

    @property
    def _device(self) -> torch.device:
        return choose_device(self._study.runtime.device)

    def describe(self) -> m.Description:
        """The declared sizes: nothing here was counted for the request."""
        sizes = np.array(self.declared, np.int64)
        counts = np.zeros((3, len(sizes)), np.int64)
        counts[0] = sizes
        return m.Description(
            site=self._name,
            patients=int(sizes.sum()),
            share_examples=False,
            software=SOFTWARE,
            counts={"counts": counts, "drawn": sizes, "holders": (sizes > 0).astype(np.int64)},
        )

    def show_ledger(self, request: m.ShowLedger) -> m.LedgerLines:
        """The ledger from line `first` on: events, digests and signatures, no patient data."""
        ledger = self._ledger
        return m.LedgerLines(
            site=self._name, lines=ledger.lines_from(request.first), head=ledger.head_text(), key=ledger.key_text()
        )

    def answer(self, request: m.Request) -> m.Reply:
        """Answer one of `PRIVATE`, spending at most once. Raises `RefusedError` over budget, before patients are read."""
        part = self._part(request)
        touch = _touch(request, part, self._study.classifier.arms)
        stored = self._answers.find(request)
        if stored is not None:
            self._settle(touch, stored)
            return stored
        self._ledger.resume(self._study.digest, touch.phase, touch.class_name, touch.round)
        self._refuse_if_too_much(touch)
        reservation = self._ledger.reserve(
            self._study.digest, touch.phase, touch.class_name, touch.round, [touch.event]
        )
        reply = self._compute(request, part)
        self._answers.keep(request, reply)
        self._ledger.spend(reservation)
        self._ledger.release(reservation, digest_of_reply(reply))
        return reply

    def _part(self, request: m.Request) -> Part:
        match request:
            case m.TrainGan():
                return self.budget.part("generators", request.class_name)
            case m.EmbedClass():
                return self.budget.part("embeddings", request.class_name)
            case m.TrainClassifier():
                return self.budget.part("classifier")
            case m.ScorePrivately():
                return self.budget.part("scores")
        raise RefusedError(f"{type(request).__name__} has no place in a private study")

    def _settle(self, touch: _Touch, reply: m.Reply) -> None:
        """Spend what a kill left unspent: the answer was kept, and now it goes out."""
        reservation = self._ledger.standing_for(self._study.digest, touch.phase, touch.class_name, touch.round)
        if reservation is not None:
            self._ledger.spend(reservation)
            self._ledger.release(reservation, digest_of_reply(reply))

    def _refuse_if_too_much(self, touch: _Touch) -> None:
        privacy, study = self._study.privacy, self._study.digest
        if self._policy.epsilon_total_max is None and self._is_planned(touch):
            return
        bounds: list[tuple[str | None, float | None]] = [
            (study, privacy.epsilon),
            (None, self._policy.epsilon_total_max),
        ]
        for scope, epsilon in bounds:
            if epsilon is None or privacy.delta is None:
                continue
            problem = self._ledger.would_exceed(
                [touch.event], touch.class_name, scope, epsilon, privacy.delta, overlap=privacy.overlap
            )
            if problem is not None:
                self._ledger.refuse(study, touch.phase, touch.class_name, touch.round, problem)
                raise RefusedError(problem)

    def _is_planned(self, touch: _Touch) -> bool:
        """Whether all that is spent, reserved and asked for is part of the plan, whose composition is within the budget.

        A part of a composition never costs more than the whole, so then nothing needs to be composed (seconds each time).
        """
        allowed: dict[tuple[str | None, Event], int] = {}
        for part in self.budget.parts:
            key = (part.class_name, part.whole.times(1))
            allowed[key] = allowed.get(key, 0) + part.whole.steps
        for class_name, event in [*self._ledger.counted(self._study.digest), (touch.class_name, touch.event)]:
            key = (class_name, event.times(1))
            allowed[key] = allowed.get(key, 0) - event.steps
            if allowed[key] < 0:
                return False
        return True

    def _compute(self, request: m.Request, part: Part) -> m.Reply:
        match request:
            case m.TrainGan():
                return self._train_gan(request, part)
            case m.EmbedClass():
                return self._embed(request, part)
            case m.TrainClassifier():
                return self._train_classifier(request, part)
            case m.ScorePrivately():
                return self._score(request, part)
        raise RefusedError(f"{type(request).__name__} has no place in a private study")

    def _label(self, class_name: str) -> int:
        return self._study.classes.index(class_name)

    def _train_gan(self, request: m.TrainGan, part: Part) -> m.GanUpdate:
        study, label = self._study, self._label(request.class_name)
        state = new_gan_state(study, self._device, "discriminator", self._name, request.class_name)
        previous: Mapping[str, npt.NDArray[np.float32]] = self._states.before(request.class_name, request.round) or {}
        if previous:
            state.restore(dict(previous))
        ladder = Ladder.from_arrays(study.privacy.d_steps, previous)
        load_parameters(state.generator, request.weights)
        losses = train_private_gan_round(
            state,
            self._store.images,
            self._cohort.train[label],
            study.gan,
            _step(part),
            self._mechanism,
            torch_generator(study.seed, "gan", self._name, request.class_name, request.round),
            study.privacy.engine,
            ladder,
        )
        arrays = {**state.arrays(), **ladder.as_arrays()}
        self._states.save(request.class_name, request.round, arrays, study.digest)
        return m.GanUpdate(
            site=self._name,
            images=self.declared[label],
            loss_g=losses.generator,
            loss_d=losses.discriminator,
            seconds=0.0,  # how long it took hangs on how many patients were drawn
            payload=request.payload,
            weights=rounded(parameters_of(state.generator), request.payload),
        )

    def _embed(self, request: m.EmbedClass, part: Part) -> m.Embedding:
        label = self._label(request.class_name)
        noisy = embedding_sum(
            self._store.images,
            self._cohort.train[label],
            features_of(self._study).to(self._device),
            self._mechanism,
            part.per_round.sigma,
        )
        return m.Embedding(site=self._name, images=self.declared[label], arrays={"sum": noisy.astype(np.float64)})

    def _model(self, weights: m.Arrays) -> torch.nn.Module:
        model = build_classifier(self._study)
        load_parameters(model, weights)
        return model.to(self._device)

    def _train_classifier(self, request: m.TrainClassifier, part: Part) -> m.ClassifierUpdate:
        study, settings = self._study, self._study.classifier
        images, labels = self.shards.read() if recipe(request.arm).synthetic else (None, None)
        model = self._model(request.weights)
        train_private_round(
            model,
            self._store.images,
            self._store.labels,
            [rows for of_class in self._cohort.train for rows in of_class],
            images,
            labels,
            settings=settings,
            learning_rate=sigmoid_decay(settings.learning_rate, request.round - 1, settings.rounds),
            steps=part.per_round.steps,
            step=_step(part),
            mechanism=self._mechanism,
            engine=study.privacy.engine,
            generator=torch_generator(study.seed, "classifier", self._name, request.arm, request.round),
            class_sizes=self.declared,
            device=self._device,
        )
        return m.ClassifierUpdate(
            site=self._name,
            images=self._cohort.total,
            loss=0.0,
            seconds=0.0,  # how long it took hangs on how many patients were drawn
            weights=parameters_of(model),
        )

    def _score(self, request: m.ScorePrivately, part: Part) -> m.NoisyScores:
        patients = [rows for of_class in self._cohort.test for rows in of_class]
        picks = self._mechanism.pick(np.array([len(rows) for rows in patients], np.int64))
        rows = np.array([own[pick] for own, pick in zip(patients, picks, strict=True)], np.int64)
        probabilities = predict(
            self._model(request.weights), self._store.images[rows], device=self._device, precision=self._study.precision
        )
        sums = count_scores(probabilities, self._store.labels[rows])
        released = self._mechanism.release(sums, sensitivity=SENSITIVITY, sigma=part.per_round.sigma)
        return m.NoisyScores(site=self._name, arrays={name: value.double().numpy() for name, value in released.items()})


def _touch(request: m.Request, part: Part, arms: Sequence[str]) -> _Touch:
    """The request as the ledger counts it, in the three phases of its contract.

    Rounds are counted over the arms: round r of arm a (0, 1, ...) of n is ``(r - 1) n + a + 1``. Embeddings are round 0.
    """
    number = getattr(request, "round", 0 if isinstance(request, m.EmbedClass) else 1)
    if isinstance(request, m.TrainClassifier | m.ScorePrivately):
        number = (number - 1) * len(arms) + list(arms).index(request.arm) + 1
    return _Touch(phase=part.phase, class_name=part.class_name, round=number, event=part.per_round)


def _step(part: Part) -> PrivateStep:
    event = part.per_round
    return PrivateStep(q=event.q, sigma=event.sigma, clip=event.clip, expected=part.expected)
