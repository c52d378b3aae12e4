"""One hospital: its folder, and what it does when it is asked.

::

    site/
      site.json       name, whether examples may be shown           (the hospital's settings)
      study.json      the approved study                            (a request for any other digest is refused)
      store/          decoded images: read here, sent nowhere
      state/          gan-<class>-<round>.safetensors: D and both optimizers, the last two rounds; never sent
      answers/        what was computed, to be sent again after a kill
      archive/        synthetic shards received, named by digest
      key             the site's private key; members.json: who else takes part, with their public keys
      ledger.jsonl    private studies: what was spent, for ever (xfed.client.ledger); declared.json: public class sizes
      secure/         keys of secure sums under way; never sent

    request --check study--> stored answer? --> train / score --> state, then answer, to disk --> reply
                                                                     (in a secure study: the answer stays, a masked one leaves)

The order on disk is the guarantee: the state of round r is written before its answer, and the state of round r - 1 is still
there until round r + 1, so a kill between the two repeats round r from the same state and the same random stream: the same bits.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from xfed.client.answers import Answers
from xfed.client.attacks import attack_archive
from xfed.client.gan_states import GanStates
from xfed.client.ledger import open_ledger
from xfed.client.measures import measure_archive
from xfed.client.open_training import OpenTraining, class_position, generator_rows, ready_model
from xfed.client.policy import Policy
from xfed.client.private_site import PRIVATE, PrivateSite
from xfed.client.reply_bounds import splits_taking_part
from xfed.client.secure import SecureSums
from xfed.client.shards import Shards
from xfed.client.store import Store, open_store
from xfed.client.vote import vote
from xfed.common import messages as m
from xfed.common.classifier import predict
from xfed.common.config import Study, parse_study
from xfed.common.devices import choose_device
from xfed.common.durable import write_json
from xfed.common.errors import DataError, RefusedError, XfedError
from xfed.common.generator_family import shares_of
from xfed.common.identity import load_private_key, new_key, public_text
from xfed.common.metrics import score_sums, to_arrays
from xfed.common.summable import SUMMABLE
from xfed.common.version import SOFTWARE

__all__ = ["Site", "SiteSettings", "found_site"]


@dataclass(frozen=True, kw_only=True)
class SiteSettings:
    """What the hospital decides for itself."""

    name: str
    share_examples: bool = False


def found_site(folder: Path, settings: SiteSettings, study: Study) -> str:
    """Write a simulated site's settings, key and study; the store is made by an import. Returns its public key."""
    write_json(folder / "site.json", {"name": settings.name, "share_examples": settings.share_examples})
    write_json(folder / "study.json", study.resolved())
    path = folder / "key"
    return public_text(load_private_key(path).public_key() if path.is_file() else new_key(path).public_key())


class Site:
    """A hospital that answers requests about one study. Raises `DataError` when its folder is incomplete.

    `work` is the study's own folder at the site (study.json, state, answers, archive); in a simulation, which has one
    study and no policy, it is the site's folder itself.
    """

    def __init__(self, folder: Path, work: Path | None = None, policy: Policy | None = None) -> None:
        self.folder = folder
        self.work = work or folder
        self._policy = policy or Policy.permissive()
        try:
            settings = json.loads((folder / "site.json").read_text())
            self.settings = SiteSettings(
                name=settings["name"], share_examples=policy.share_examples if policy else settings["share_examples"]
            )
            path = self.work / "study.json"
            self.study = parse_study(json.loads(path.read_text()), str(path))
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{folder} is not a site's folder ({error}); found one before answering") from error
        self._answers = Answers(self.work / "answers")
        self._states = GanStates(self.work / "state")
        self._shards = Shards(self.work / "archive", self.study)

    @cached_property
    def store(self) -> Store:
        """The images that take part, opened when first needed. Raises `DataError` when the store does not fit the study."""
        store = self._whole_store()
        splits = splits_taking_part(store.labels, store.patients, store.splits, self._policy.smallest_count)
        return dataclasses.replace(store, splits=splits)

    def _whole_store(self) -> Store:
        store = open_store(self.folder / "store")
        if store.classes != self.study.classes or store.size != self.study.image_size:
            raise DataError(
                f"{store.folder} holds {store.size} px images of {', '.join(store.classes)}; the study wants "
                f"{self.study.image_size} px of {', '.join(self.study.classes)}. Import again with the study's size and classes."
            )
        return store

    @cached_property
    def members(self) -> dict[str, str]:
        """The sites that take part (name to OpenSSH public key), as the approved plan names them."""
        path = self.work / "members.json"
        try:
            return {str(name): str(key) for name, key in json.loads(path.read_text()).items()}
        except (OSError, ValueError, AttributeError) as error:
            raise DataError(
                f"{path} cannot be read ({error}): a secure sum needs to know the other sites' keys"
            ) from error

    @cached_property
    def _secure(self) -> SecureSums:
        key = load_private_key(self.folder / "key")
        return SecureSums(self.work / "secure", self.settings.name, self.study.digest, key, self.members)

    def answer(self, request: m.Request) -> m.Reply:
        """As `act`, with errors as a `Refusal` that says why not."""
        try:
            return self.act(request)
        except XfedError as error:
            return m.Refusal(site=self.settings.name, error=type(error).__name__, reason=str(error))

    def act(self, request: m.Request) -> m.Reply:
        """Do what is asked. Raises `XfedError`: `RefusedError` where study or site forbid it."""
        if request.study != self.study.digest:
            raise RefusedError(
                f"the request is for study {request.study[:12]}, this site approved {self.study.digest[:12]}"
            )
        match request:
            case m.AdvertiseKeys():
                return self._secure.advertise(request)
            case m.ShareKeys():
                return self._secure.share(request)
            case m.Unmask():
                return self._secure.unmask(request, self._policy.minimum_summed_sites)
        if not request.session:
            if self.study.secure and type(request) in SUMMABLE and not isinstance(request, m.Describe):
                raise RefusedError("this study sums securely: the site's own answer does not leave it")
            return self._plain(request)
        if type(request) not in SUMMABLE:
            raise RefusedError(f"{type(request).__name__} cannot be part of a secure sum")
        alone = dataclasses.replace(request, session="", peers="", total=0)
        return self._secure.mask(request, alone, self._plain(alone, summed=True), len(self.study.classes))

    def _plain(self, request: m.Request, summed: bool = False) -> m.Reply:
        """The site's own answer, stored or computed. In a secure sum a site that has nothing to give gives zeros."""
        if self.study.private:
            return self._privately(request, summed)
        if isinstance(request, m.Describe):
            return self._describe(shown=summed or not self.study.secure)
        if summed and (nothing := self._nothing(request)) is not None:
            return nothing
        stored = self._answers.find(request)
        return stored if stored is not None else self._compute(request)

    def _privately(self, request: m.Request, summed: bool) -> m.Reply:
        """The answer in a private study: declared sizes, releases with noise, the archive's shards, and nothing else."""
        match request:
            case m.Describe():
                return self.private.describe()
            case m.ShowLedger():
                return self.private.show_ledger(request)
            case m.OfferArchive() | m.KeepArchive():
                return self._compute(request)
        if not isinstance(request, PRIVATE):
            raise RefusedError(f"{type(request).__name__} asks for figures without noise: this study is private")
        declared = self.private.declared
        if summed and isinstance(request, m.TrainGan) and not declared[class_position(self.study, request.class_name)]:
            return self._untrained(request)
        if (
            summed
            and isinstance(request, m.EmbedClass)
            and not declared[class_position(self.study, request.class_name)]
        ):
            nothing = np.zeros(self.study.gan.merf.features)
            return m.Embedding(site=self.settings.name, images=0, arrays={"sum": nothing})
        return self.private.answer(request)

    @cached_property
    def private(self) -> PrivateSite:
        """The site's part in a private study."""
        return PrivateSite(
            name=self.settings.name,
            work=self.work,
            study=self.study,
            policy=self._policy,
            store=lambda: self._whole_store(),
            ledger=lambda: open_ledger(self.folder, self.settings.name),
        )

    def _untrained(self, request: m.TrainGan) -> m.GanUpdate:
        return m.GanUpdate(
            site=self.settings.name,
            images=0,
            loss_g=0.0,
            loss_d=0.0,
            seconds=0.0,
            payload=request.payload,
            weights=request.weights,
        )

    def _nothing(self, request: m.Request) -> m.Reply | None:
        if isinstance(request, m.TrainGan):
            held = len(generator_rows(self.store, self.study, request.class_name))
            if held < self.study.gan.minimum_images:
                return self._untrained(request)
        if isinstance(request, m.TrainClassifier) and not len(self.store.rows("train")):
            return m.ClassifierUpdate(site=self.settings.name, images=0, loss=0.0, seconds=0.0, weights=request.weights)
        return None

    def _compute(self, request: m.Request) -> m.Reply:
        match request:
            case m.TrainGan():
                return self._kept(request, self._training.gan(request))
            case m.OfferArchive():
                return self._wanted(request)
            case m.KeepArchive():
                return self._keep_archive(request)
            case m.TrainClassifier():
                return self._kept(request, self._training.classifier(request))
            case m.ScoreClassifier():
                return self._kept(request, self._score(request))
            case m.MeasureArchive():
                return self._kept(request, self._measure(request))
            case m.VoteOnArchive():
                return self._kept(request, self._vote(request))
            case m.AttackArchive():
                return self._kept(request, self._attack(request))
            case m.ShowExamples():
                return self._show(request)
        raise RefusedError(f"this site does not know the request {type(request).__name__}")

    def _kept(self, request: m.Request, reply: m.Reply) -> m.Reply:
        self._answers.keep(request, reply)
        return reply

    @property
    def _device(self) -> torch.device:
        return choose_device(self.study.runtime.device)

    @property
    def _training(self) -> OpenTraining:
        return OpenTraining(
            name=self.settings.name,
            study=self.study,
            store=self.store,
            states=self._states,
            shards=self._shards,
            device=self._device,
        )

    def _describe(self, shown: bool) -> m.Description:
        """Who this site is; what it holds only where that may be `shown` (alone, or in a secure sum)."""
        counts = self.store.counts()
        drawn, holders = shares_of(self.study, counts[0])
        if not shown:
            counts, drawn, holders = np.zeros_like(counts), np.zeros_like(drawn), np.zeros_like(holders)
        return m.Description(
            site=self.settings.name,
            patients=len(np.unique(self.store.patients[self.store.splits >= 0])) if shown else 0,
            share_examples=self.settings.share_examples,
            software=SOFTWARE,
            counts={"counts": counts, "drawn": drawn, "holders": holders},
        )

    def _wanted(self, request: m.OfferArchive) -> m.ArchiveWanted:
        missing = self._shards.offer(request)
        return m.ArchiveWanted(site=self.settings.name, missing=",".join(map(str, missing)))

    def _keep_archive(self, request: m.KeepArchive) -> m.ArchiveKept:
        self._shards.keep(request)
        return m.ArchiveKept(site=self.settings.name, digest=request.digest)

    def _score(self, request: m.ScoreClassifier) -> m.Scores:
        if request.split not in ("validation", "test"):
            raise RefusedError(f"{request.split!r} is not a split that is scored")
        rows = self.store.rows(request.split)
        probabilities = predict(
            ready_model(self.study, request.weights, self._device),
            self.store.images[rows],
            device=self._device,
            precision=self.study.precision,
        )
        sums = score_sums(probabilities, self.store.labels[rows], self.store.patients[rows])
        return m.Scores(site=self.settings.name, sums=to_arrays(sums))

    def _measure(self, request: m.MeasureArchive) -> m.ArchiveMeasured:
        images, labels = self._shards.read()
        model = ready_model(self.study, request.weights, self._device)
        arrays = measure_archive(
            model,
            self.store,
            images,
            labels,
            device=self._device,
            precision=self.study.precision,
            scale=request.scale,
            thinning=request.thinning["times"],
        )
        return m.ArchiveMeasured(site=self.settings.name, arrays=arrays)

    def _vote(self, request: m.VoteOnArchive) -> m.ArchiveVote:
        images, _ = self._shards.read(request.root, request.images)
        own, sites = self.study, self.study.sites.count
        cast = vote(
            self.store,
            images,
            ready_model(self.study, request.weights, self._device),
            self._device,
            own.precision,
            sites=sites,
        )
        arrays = {"vetoes": cast.vetoed, "voters": np.ones(()), "calibrated": np.array(cast.calibrated)}
        return m.ArchiveVote(
            site=self.settings.name, arrays={name: array.astype(np.uint8) for name, array in arrays.items()}
        )

    def _attack(self, request: m.AttackArchive) -> m.ArchiveAttacked:
        images, labels = self._shards.read(request.root, request.images)
        kept = request.arrays["released"].astype(bool)
        drawn, _ = shares_of(self.study, self.store.counts()[0])
        arrays = attack_archive(
            self.store,
            images[kept],
            labels[kept],
            self._device,
            trained=drawn > 0,
            smallest=self._policy.smallest_count,
        )
        return m.ArchiveAttacked(site=self.settings.name, arrays=arrays)

    def _show(self, request: m.ShowExamples) -> m.Examples:
        if not self.settings.share_examples:
            raise RefusedError("this site does not show real images")
        side, count = self.store.size, min(request.count, 16)
        shown = np.zeros((len(self.study.classes), count, side, side), dtype=np.uint8)
        for label in range(len(self.study.classes)):
            rows = self.store.rows("train", label)[:count]
            shown[label, : len(rows)] = self.store.images[rows]
        return m.Examples(site=self.settings.name, arrays={"images": shown})
