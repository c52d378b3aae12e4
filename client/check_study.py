"""What a site brings along, held against the newest plan: versions, policy, store, disk, device, audit log.

::

    plans/, policy.yaml, store/, audit.jsonl, free space, torch --one small function each--> Finding
    without a plan: the same things, as far as they can be judged by themselves

Nothing is written.
"""

from __future__ import annotations

import contextlib
import platform
import shutil
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import numpy as np
from packaging.requirements import Requirement

from xfed.client.approval import Plans, ReceivedPlan
from xfed.client.audit import verify_audit
from xfed.client.finding import Finding, failed, ok, warning
from xfed.client.home import SiteHome
from xfed.client.policy import Policy, violations
from xfed.client.store import SPLITS, Store, open_store
from xfed.common.bundle import DIGEST
from xfed.common.config import Study
from xfed.common.errors import (
    CheckpointError,
    DataError,
    DeviceError,
    RefusedError,
    StorageError,
    XfedError,
)
from xfed.common.identity import software
from xfed.common.plan import Plan

__all__ = [
    "bytes_needed",
    "check_audit",
    "check_device",
    "check_disk",
    "check_plan",
    "check_policy",
    "check_store",
    "check_versions",
    "newest_plan",
]

SPARE_BYTES = 256 * 2**20
"""Logs, sessions of secure sums, scores: small beside models and images."""


def newest_plan(home: SiteHome) -> ReceivedPlan | None:
    """The plan that was received last, or None. Raises `IdentityError` when a stored plan was changed."""
    plans = Plans(home.folder, home.ca_pem, home.federation, home.name, home.public_key).all()
    return plans[-1] if plans else None


def check_plan(home: SiteHome, received: ReceivedPlan | None) -> Finding:
    """Whether a plan is there, is for this site and this version, and is approved."""
    if received is None:
        remedy = "start the client (xfed-client start); when the coordinator has started the study, run this again"
        return warning("plan", "no plan has been received yet: the checks below know of no study", remedy)
    plan = received.plan
    name = f"plan {plan.digest[:12]} of study {plan.study.name}"
    if plan.members.get(home.name) != home.public_key:
        what = f"{name} does not name {home.name} with its present key"
        return failed("plan", RefusedError, what, "ask the coordinator to start the study again: that makes a new plan")
    if received.approved is None:
        remedy = f"read it, then approve it: xfed-client approve --dir {home.folder}"
        return warning("plan", f"{name} waits for this hospital's approval", remedy)
    return ok("plan", f"{name}, approved {received.approved}")


def check_versions(home: SiteHome, plan: Plan | None) -> Finding:
    """Whether the installed packages fit together, and with the plan and the kit."""
    bad = [line for text in requires("xfed") or () if (line := _unmet(Requirement(text))) is not None]
    here = f"Python {platform.python_version()}, {software()}, " + ", ".join(
        f"{package} {version(package)}" for package in ("torch", "flwr") if _installed(package) is not None
    )
    if bad:
        remedy = "install xfed anew in a fresh virtual environment: pip install xfed"
        return failed("versions", XfedError, f"{'; '.join(bad)} ({here})", remedy)
    if plan is not None and plan.bundle != DIGEST:
        what = (
            f"the plan is for {plan.software} (bundle {plan.bundle[:12]}), installed is {here} (bundle {DIGEST[:12]})"
        )
        return failed("versions", RefusedError, what, "install the same xfed at the coordinator and at all sites")
    if home.kit.software != software():
        what = f"the kit was made by {home.kit.software}, installed is {here}"
        return warning("versions", what, "ask the coordinator which version the federation runs")
    return ok("versions", here)


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _unmet(requirement: Requirement) -> str | None:
    if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
        return None
    found = _installed(requirement.name)
    if found is None:
        return f"{requirement.name} is not installed"
    if not requirement.specifier.contains(found, prereleases=True):
        return f"{requirement.name} is {found}, xfed needs {requirement.specifier}"
    return None


def check_policy(policy: Policy, plan: Plan | None) -> Finding:
    """Whether the policy allows all that the plan asks for."""
    if plan is None:
        return ok("policy", "policy.yaml can be read")
    problems = violations(policy, plan.study)
    if problems:
        remedy = "tell the coordinator what this hospital does not allow; or, if the hospital does, change policy.yaml"
        return failed("policy", RefusedError, "\n".join(problems), remedy)
    return ok("policy", f"policy.yaml allows all of study {plan.study.name}")


def check_store(folder: Path, policy: Policy | None, study: Study | None) -> Finding:
    """Whether the image store opens, fits the study, and has images to train on and to judge by."""
    store = open_store(folder)
    again = f"import again with the study's size and classes: xfed-client import SOURCE --store {folder}"
    if study is not None and (store.classes != study.classes or store.size != study.image_size):
        what = (
            f"{folder} holds {store.size} px images of {', '.join(store.classes)}; the study wants {study.image_size} px of "
            f"{', '.join(study.classes)}"
        )
        return failed("store", DataError, what, again)
    counts = _taking_part(store, policy)
    per_split = dict(zip(SPLITS, counts.sum(axis=1).tolist(), strict=True))
    what = f"{store.size} px, " + ", ".join(f"{split} {count:,}" for split, count in per_split.items())
    if not per_split["train"]:
        return failed("store", DataError, f"there is no image to train on ({what})", f"bring more images, and {again}")
    empty = [split for split, count in per_split.items() if not count]
    if empty:
        remedy = f"bring more images, and {again}; without them this site adds nothing to the scores"
        return warning("store", f"no image is in {' and '.join(empty)} ({what})", remedy)
    least = 1 if study is None else study.gan.minimum_images
    if study is not None and study.unlabelled and per_split["train"] < least:
        words = f"under {least} training images, so this site leaves out the generator ({what})"
        return warning("store", words, "bring more images; without them this site adds nothing to the generator")
    rare = [f"{name} {held}" for name, held in zip(store.classes, counts[0].tolist(), strict=True) if held < least]
    if rare and not (study is not None and study.unlabelled):
        remedy = "nothing, if that is known: other sites may hold these classes; otherwise bring more images"
        words = f"under {least} training images, so this site leaves out their generators: {', '.join(rare)} ({what})"
        return warning("store", words, remedy)
    return ok("store", what)


def _taking_part(store: Store, policy: Policy | None) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """Images per split and class, int64 [3, C], without the cells that the policy's small counts leave out."""
    from dataclasses import replace

    from xfed.client.reply_bounds import splits_taking_part  # brings torch along

    smallest = 0 if policy is None else policy.smallest_count
    return replace(store, splits=splits_taking_part(store.labels, store.patients, store.splits, smallest)).counts()


def check_disk(home: SiteHome, study: Study | None, policy: Policy | None) -> Finding:
    """Whether the free space is enough for what the study will write here."""
    free = shutil.disk_usage(home.folder).free
    need, held = SPARE_BYTES, 0
    if study is not None:
        need = bytes_needed(study, policy or Policy(), _largest_class(home.folder / "store"))
        held = _bytes_under(home.folder / "studies" / study.digest[:16])
    need = max(SPARE_BYTES, need - held)
    what = f"{_size(free)} are free for {home.folder}, about {_size(need)} are needed"
    remedy = "free some space, or move the site's folder to a larger disk"
    if free < need:
        return failed("disk", StorageError, what, remedy)
    return warning("disk", what, remedy) if free < 2 * need else ok("disk", what)


def bytes_needed(study: Study, policy: Policy, largest_class: int) -> int:
    """About the most bytes that a study keeps at a site: training states, answers, synthetic archive, and some to spare.

    `largest_class`: training images of this site's largest class. How many the other sites hold is not known here; they are
    taken to hold as many each.
    """
    import torch  # with what it brings: takes seconds

    from xfed.common import dcgan, pggan
    from xfed.common.registry import CLASSIFIERS, GENERATORS

    gan, classifier, archive = study.gan, study.classifier, study.archive
    with torch.device("meta"):  # sizes without memory
        generator = _parameters(GENERATORS[gan.family](study.image_size, gan.width, gan.latent))
        family = pggan if study.unlabelled else dcgan
        discriminator = _parameters(family.Discriminator(study.image_size, gan.width, None))
        model = _parameters(CLASSIFIERS[classifier.model](study.image_size, len(study.classes), classifier.width, 0.0))
    # per generator: two rounds of D and of both optimizers' two moments, two answers; one more of each while it is written
    state = 3 * discriminator + 2 * generator
    floats = len(study.generators) * (2 * state + 2 * generator) + state + generator
    floats += (len(classifier.arms) + study.unlabelled) * 2 * model + model
    images = archive.per_class
    if archive.balance == "match":
        images = max(archive.minimum, round(archive.target * largest_class * study.sites.count))
    images = min(images * len(study.labels), policy.max_archive_images)
    return 4 * floats + images * (study.image_size**2 + 8) + SPARE_BYTES


def _parameters(module: object) -> int:
    return sum(parameter.numel() for parameter in module.parameters())  # type: ignore[attr-defined]


def _largest_class(folder: Path) -> int:
    try:
        return int(open_store(folder).counts()[0].max(initial=0))
    except DataError:
        return 0


def _bytes_under(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # a running client replaces and removes files
            total += path.lstat().st_size
    return total


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def check_device(study: Study | None) -> Finding:
    """Whether the device that the plan wants is there and computes."""
    import torch

    from xfed.common.devices import bfloat16_is_native, choose_device

    demand = "auto" if study is None else study.runtime.device
    try:
        device = choose_device(demand)
    except DeviceError as error:
        remedy = (
            "ask the coordinator for a plan with runtime.device auto; or bring GPU, driver and a CUDA build of PyTorch"
        )
        return failed("device", DeviceError, str(error), remedy)
    if device.type != "cuda":
        if Path("/dev/nvidia0").exists() and demand == "auto":
            what = f"there is a GPU, but PyTorch {torch.__version__} cannot use it: the CPU computes"
            return warning(
                "device", what, "install a CUDA build of PyTorch and the driver (nvidia-smi must list the card)"
            )
        what = "the CPU computes"
    else:
        try:
            torch.ones(2, device=device).sum().item()
            free, whole = torch.cuda.mem_get_info(device)
        except RuntimeError as error:
            remedy = "see nvidia-smi: another process may fill the card, or the driver wants a restart"
            return failed("device", DeviceError, f"the GPU does not compute ({error!s:.200})", remedy)
        what = f"{torch.cuda.get_device_name(device)}, {_size(free)} of {_size(whole)} free"
        if free < 2**30:
            return warning("device", what, "see nvidia-smi: another process fills the card")
    if study is not None and study.precision == "bfloat16" and not bfloat16_is_native(device):
        return warning("device", f"{what}; bfloat16, which the study wants, is emulated here", "expect it to be slow")
    return ok("device", what)


def check_audit(path: Path) -> Finding:
    """Whether nobody changed the audit log."""
    if not path.exists():
        return ok("audit", "there is no audit log yet: nothing was asked of this site")
    problems = verify_audit(path)
    if problems:
        remedy = f"find out who changed {path}; put it back from a copy, or move it aside to begin a new one"
        return failed("audit", CheckpointError, "\n".join(problems[:5]), remedy)
    return ok("audit", f"{path.name} is untouched")
