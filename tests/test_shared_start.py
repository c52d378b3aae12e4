"""`gan.shared_rounds`: one generator of all classes first; each class's networks start from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import tiny
from xfed.client.bounds import check_request
from xfed.client.open_training import generator_rows
from xfed.client.policy import Policy
from xfed.client.store import open_store
from xfed.common.config import Study
from xfed.common.config_family import ALL
from xfed.common.errors import ConfigError, FederationError, RefusedError
from xfed.common.gan import build_generator
from xfed.common.messages import TrainGan
from xfed.common.weights import digest_of, load_arrays, parameters_of
from xfed.server import generators
from xfed.simulations.run import run_study

GAN: dict[str, Any] = {"shared_rounds": 2, "rounds": 2, "minimum_images": 2}
FAST: dict[str, Any] = {"vote": False, "attacks": False, "tstr_steps": 0}


def shared(**changes: Any) -> Study:
    """The tiny study with a shared start, without what follows the generators for the most part."""
    values: dict[str, Any] = {"gan": GAN, "archive": FAST, "classifier": {"rounds": 1, "arms": ["DS1"]}}
    return tiny(**(values | changes))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study."""
    folder = tmp_path_factory.mktemp("shared") / "run"
    run_study(shared(), folder)
    return folder


def _generators(folder: Path) -> dict[str, str]:
    return {path.stem: digest_of(load_arrays(path)[0]) for path in sorted(folder.glob("models/generator-*"))}


def test_discriminators_of_the_shared_start_stay_on_the_sites_disks(unbroken: Path) -> None:
    found = {path.name for path in unbroken.rglob("gan-*.safetensors") if "state" in path.parts}
    assert {"gan-all-000001.safetensors", "gan-all-000002.safetensors", "gan-Normal-000004.safetensors"} <= found
    assert not list(unbroken.glob("models/*all*"))


def test_every_class_starts_from_the_same_networks_of_all_classes(unbroken: Path, tmp_path: Path) -> None:
    study = shared(gan=GAN | {"steps_per_round": 1, "rounds": 1, "learning_rate_g": 1e-12, "ema": 0.0})
    run_study(study, tmp_path / "run")
    first, *others = (load_arrays(path)[0] for path in sorted(tmp_path.glob("run/models/generator-*")))
    for arrays in others:
        for name, values in arrays.items():
            np.testing.assert_allclose(values, first[name], atol=1e-6)
    fresh = parameters_of(build_generator(study, ("generator", "Normal")))
    assert max(np.abs(first[name] - fresh[name]).max() for name in fresh) > 1e-3


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_interrupted_in_the_shared_start_or_after_it_the_same_bits(
    unbroken: Path, tmp_path: Path, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds, real = [0], generators._one_round

    def cut_off(*arguments: Any) -> Any:
        rounds[0] += 1
        if rounds[0] > stop:
            raise FederationError("the power went")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(generators, "_one_round", cut_off)
        with pytest.raises(FederationError, match="the power went"):
            run_study(shared(), tmp_path / "run")
    run_study(shared(), tmp_path / "run")
    assert _generators(tmp_path / "run") == _generators(unbroken)


def test_secure_sums_give_the_same_generators_but_for_rounding(unbroken: Path, tmp_path: Path) -> None:
    run_study(shared(federation={"secure_aggregation": "on"}), tmp_path / "run")
    for path in sorted(unbroken.glob("models/generator-*")):
        ours, theirs = (load_arrays(folder / "models" / path.name)[0] for folder in (tmp_path / "run", unbroken))
        for name, values in theirs.items():
            np.testing.assert_allclose(ours[name], values, atol=2e-3)


def test_classes_count_alike_and_too_small_ones_not_at_all(unbroken: Path) -> None:
    store = open_store(unbroken / "sites" / "site-01" / "store")
    counts = store.counts()[0]
    rows = generator_rows(store, shared(), ALL)
    assert set(np.bincount(store.labels[rows]).tolist()) == {counts.max()}
    assert len(np.unique(rows)) == counts.sum()
    few = shared(gan=GAN | {"minimum_images": int(counts.min()) + 1})
    assert counts.argmin() not in store.labels[generator_rows(store, few, ALL)]
    with pytest.raises(RefusedError, match="not a generator"):
        generator_rows(store, tiny(), ALL)


@pytest.mark.parametrize(
    ("study", "name", "round", "words"),
    [
        (shared(), ALL, 3, "round"),
        (shared(), "Normal", 2, "round"),
        (shared(), "Normal", 5, "round"),
        (tiny(), ALL, 1, "class_name"),
    ],
)
def test_a_site_refuses_rounds_that_are_not_planned(study: Study, name: str, round: int, words: str) -> None:
    weights = parameters_of(build_generator(study, ("generator", name)))
    request = TrainGan(study=study.digest, class_name=name, round=round, payload="float32", weights=weights)
    with pytest.raises(RefusedError, match=words):
        check_request(request, study, Policy.permissive(), study.site_names())


def test_a_policy_bounds_the_shared_rounds_as_well() -> None:
    policy = Policy.permissive().model_copy(update={"max_generator_rounds": 2})
    from xfed.client.policy import violations

    assert not violations(policy, shared())
    assert "gan.shared_rounds" in str(violations(policy, shared(gan=GAN | {"shared_rounds": 3})))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gan": GAN | {"family": "pggan"}}, "from all classes anyway"),
        ({"classes": ["All", "Normal"], "data": {"phantom": {"patients": {"Normal": 9}}}}, "may be called"),
        ({"privacy": {"epsilon": 3.0, "delta": 1e-4}, "classifier": {"balance": "loss"}}, "no budget is planned"),
    ],
)
def test_where_a_shared_start_cannot_be_it_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        shared(**changes)
