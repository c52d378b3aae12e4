"""A federation and joined sites in this process: keys, kits and a store, without a server."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.conftest import tiny
from xfed.client.home import SiteHome, ask_to_enrol, found_home, install_kit
from xfed.client.store import write_store
from xfed.common.bundle import DIGEST
from xfed.common.config import Study
from xfed.common.plan import Plan, new_plan, read_request
from xfed.common.randomness import numpy_generator
from xfed.server.federation import Federation, found_federation

OPEN_POLICY = "allow_non_private: true\nminimum_images: 1\nsmallest_count: 0\n"


def federation_of(folder: Path, *names: str) -> tuple[Federation, list[SiteHome]]:
    """A federation in `folder`/federation whose members are `names`, each in `folder`/<name> with a policy that allows all."""
    federation = found_federation(folder / "federation", name="tests", address="127.0.0.1:9092")
    homes = []
    for name in names:
        found_home(folder / name, name)
        _, kit = federation.approve(read_request(ask_to_enrol(folder / name).path))
        homes.append(install_kit(folder / name, kit))
        (folder / name / "policy.yaml").write_text(OPEN_POLICY)
    return federation, homes


def joined_site(folder: Path) -> SiteHome:
    """One joined site."""
    return federation_of(folder, "ward")[1][0]


def store_for(home: SiteHome, study: Study) -> None:
    """33 noise images in the site's store: 20, 12 and 1 of the three classes."""
    rng = numpy_generator(7, "site")
    write_store(
        home.folder / "store",
        classes=study.classes,
        images=rng.integers(0, 255, (33, 32, 32), dtype=np.uint8),
        labels=np.repeat(np.arange(3), [20, 12, 1]),
        patients=np.arange(33),
        splits=(np.arange(33) % 4 // 2).astype(np.int8),
    )


def plan_of(federation: Federation, study: Study | None = None) -> tuple[Plan, str]:
    """The plan of a study for all members, and its signature."""
    members = {name: member.public_key for name, member in federation.active_members().items()}
    plan = new_plan(study or tiny(), federation=federation.name, members=members, bundle=DIGEST)
    return plan, federation.sign("plan", plan.values())
