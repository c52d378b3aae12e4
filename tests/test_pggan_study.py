"""`gan.family: pggan` as a study: one generator of all images, labels by steering, the same archive and passport as any other."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import tiny
from xfed.client.archive_score import score_archive
from xfed.client.bounds import check_request
from xfed.client.gan_states import GanStates
from xfed.client.open_training import OpenTraining, generator_rows
from xfed.client.policy import Policy, violations
from xfed.client.shards import Shards
from xfed.client.store import Store, open_store, write_store
from xfed.common import messages as m
from xfed.common.classifier import prepare
from xfed.common.config import Study
from xfed.common.errors import ConfigError, DataError, RefusedError
from xfed.common.extractors import load_extractor
from xfed.common.gan import build_generator, render
from xfed.common.generator_family import draw_latents, new_state, place_after, settings_of, shares_of, shown
from xfed.common.latent_classes import Steering, as_pixels, optimise_latents, target_row
from xfed.common.pggan import draw_latent
from xfed.common.pggan_training import train_pggan_round
from xfed.common.randomness import torch_generator
from xfed.common.registry import build_classifier, load_classifier, load_generator
from xfed.common.review_archive import open_archive as open_review
from xfed.common.weights import digest_of, load_arrays, load_parameters, parameters_of
from xfed.server import steering
from xfed.server.archive_export import export_archive
from xfed.server.archive_filter import Sieve
from xfed.server.archive_signature import verify_archive
from xfed.server.checkpoints import Checkpoints
from xfed.server.croissant import croissant
from xfed.server.export_dicom import dicom_file
from xfed.server.siblings import side_by_side, write_comparison
from xfed.simulations.run import run_study

CPU = torch.device("cpu")
WET = {"Wet heart": ["Cardiomegaly", "Pleural Effusion"]}
MEMBERS = {"ward-a": "key", "ward-b": "key"}


def unlabelled(**changes: Any) -> Study:
    """The tiny study with a PGGAN that is trained for a moment."""
    plan = {"threshold": 0.34, "steps": 20, "rounds": 4, "attempts": 8}
    gan = {
        "family": "pggan",
        "width": 1,
        "latent": 16,
        "rounds": 4,
        "steps_per_round": 4,
        "batch": 4,
        "augment": "none",
        "steering": plan,
        **changes.pop("gan", {}),
    }
    archive = {"balance": "fixed", "per_class": 8, "findings": WET, "tstr_steps": 5, **changes.pop("archive", {})}
    return tiny(gan=gan, archive=archive, classifier={"rounds": 2, "steps_per_round": 4}, **changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study of three hospitals: sums over sites are all that its coordinator saw."""
    folder = tmp_path_factory.mktemp("pggan") / "run"
    run_study(unlabelled(sites={"count": 3}), folder)
    return folder


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "archive" / "metadata.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# ---- the study file


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"privacy": {"epsilon": 3.0, "delta": 1e-4}},
            ["gan.family pggan", "deviation over the batch", "Use the DCGAN"],
        ),
        ({"gan": {"method": "dp-merf"}}, ["dp-merf", "family dcgan"]),
        ({"gan": {"r1": 1.0}}, ["gan.pggan.penalty"]),
        ({"gan": {"family": "dcgan", "width": 2}, "archive": {"findings": {}}}, ["width must be 4"]),
        ({"gan": {"family": "dcgan", "width": 4}}, ["archive.findings", "gan.family pggan"]),
        ({"archive": {"findings": {"Both": ["Normal"]}}}, ["archive.findings.Both", "two or more"]),
        ({"archive": {"findings": {"Both": ["Normal", "Nodule"]}}}, ["archive.findings.Both"]),
        ({"archive": {"findings": {"All": ["Normal", "Cardiomegaly", "Pleural Effusion"]}}}, ["not all of"]),
        ({"archive": {"findings": {"normal": ["Normal", "Cardiomegaly"]}}}, ["a name of its own"]),
        ({"archive": {"findings": {"a/b": ["Normal", "Cardiomegaly"]}}}, ["folder name"]),
        ({"gan": {"steering": {"threshold": 1.0}}}, ["gan.steering.threshold"]),
        ({"gan": {"pggan": {"fade": 2}}}, ["gan.pggan.fade"]),
        ({"classes": ["All", "Normal"], "data": {"phantom": {}}, "archive": {"findings": {}}}, ["may be called 'all'"]),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        unlabelled(**changes)
    for word in words:
        assert word in str(caught.value)


def test_names_of_generators_and_labels() -> None:
    study = unlabelled()
    assert study.generators == ("all",)
    assert study.labels == (*study.classes, "Wet heart")
    assert tiny().generators == tiny().labels == tiny().classes


# ---- the site's gate


def _train(study: Study, **changes: Any) -> m.TrainGan:
    weights = parameters_of(build_generator(study))
    return m.TrainGan(**{"study": study.digest, "class_name": "all", "round": 1, "weights": weights, **changes})


def _asked(study: Study, request: m.Request, policy: Policy | None = None) -> str:
    try:
        check_request(request, study, policy or Policy.permissive(), MEMBERS, site="ward-a")
    except RefusedError as error:
        return str(error)
    return ""


def test_the_gate_lets_the_generator_of_all_images_in_and_no_other() -> None:
    study = unlabelled()
    assert _asked(study, _train(study)) == ""
    assert "TrainGan.class_name" in _asked(study, _train(study, class_name="Normal"))
    assert "TrainGan.class_name" in _asked(study, _train(study, class_name=""))
    assert "TrainGan.round" in _asked(study, _train(study, round=5))
    assert "TrainGan.weights" in _asked(study, _train(study, weights=parameters_of(build_generator(tiny()))))
    assert "TrainGan.class_name" in _asked(tiny(), _train(tiny()))
    forbids = Policy.permissive().model_copy(update={"generator_models": ("dcgan",)})
    assert "gan.family: the study wants pggan" in _asked(study, _train(study), forbids)


def test_the_steering_classifier_is_trained_where_there_is_something_to_steer_for_its_rounds_and_never_scored() -> None:
    study, weights = unlabelled(), parameters_of(build_classifier(unlabelled()))

    def train(of: Study, round: int, arm: str = "steering") -> m.TrainClassifier:
        return m.TrainClassifier(study=of.digest, arm=arm, round=round, weights=weights)

    assert _asked(study, train(study, 4)) == ""
    assert "TrainClassifier.round" in _asked(study, train(study, 5))
    assert "TrainClassifier.round" in _asked(study, train(study, 3, "DS1")), "arms keep their own number of rounds"
    assert "TrainClassifier.arm" in _asked(tiny(), train(tiny(), 1))
    scored = m.ScoreClassifier(study=study.digest, arm="steering", round=1, split="validation", weights=weights)
    assert "ScoreClassifier.arm" in _asked(study, scored)


def test_shards_may_hold_the_combinations_of_the_approved_study_and_no_more() -> None:
    study = unlabelled()

    def keep(of: Study, label: int) -> m.KeepArchive:
        arrays = {"images": np.zeros((1, 32, 32), np.uint8), "labels": np.array([label])}
        return m.KeepArchive(study=of.digest, shard=0, digest="ab" * 32, arrays=arrays)

    assert _asked(study, keep(study, 3)) == ""
    assert "arrays[labels]" in _asked(study, keep(study, 4))
    assert "arrays[labels]" in _asked(tiny(), keep(tiny(), 3))


def test_the_policy_bounds_the_steering_classifier_only_where_there_is_one() -> None:
    policy = Policy.permissive().model_copy(update={"max_classifier_rounds": 3})
    assert any("gan.steering.rounds: the study wants 4" in text for text in violations(policy, unlabelled()))
    assert not any("steering" in text for text in violations(policy, tiny()))


# ---- training at a site


def _store(folder: Path, labels: list[int]) -> Store:
    n = len(labels)
    images = np.random.default_rng(3).integers(0, 255, (n, 32, 32), dtype=np.uint8)
    return write_store(
        folder,
        classes=unlabelled().classes,
        images=images,
        labels=np.array(labels),
        patients=np.arange(n),
        splits=np.array([0] * (n - 4) + [1, 1, 2, 2], np.int8),
    )


def _site(folder: Path, study: Study, store: Store) -> OpenTraining:
    states = GanStates(folder / "state")
    return OpenTraining(
        name="a", study=study, store=store, states=states, shards=Shards(folder / "archive", study), device=CPU
    )


def test_all_training_images_are_used_and_no_label_is_looked_at(tmp_path: Path) -> None:
    study = unlabelled()
    store = _store(tmp_path / "a", [0] * 10 + [1] * 8 + [2] * 6)
    other = _store(tmp_path / "b", [1, 2, 0] * 8)
    assert len(generator_rows(store, study, "all")) == 20, "all but validation and test"
    assert len(generator_rows(store, tiny(), "Cardiomegaly")) == 10
    with pytest.raises(RefusedError, match="not a generator"):
        generator_rows(store, study, "Normal")
    request = _train(study)
    updates = [_site(tmp_path / name, study, of).gan(request) for name, of in (("a", store), ("b", other))]
    assert digest_of(updates[0].weights) == digest_of(updates[1].weights), "labels do not change a bit"
    assert updates[0].images == 20


def test_rounds_go_on_from_the_disk_as_one_unbroken_training(tmp_path: Path) -> None:
    study = unlabelled()
    store = _store(tmp_path / "store", [0, 1, 2] * 8)
    state = new_state(study, CPU, "discriminator", "a", "all")
    start = parameters_of(build_generator(study, ("generator", "all")))
    load_parameters(state.generator, start)
    weights: Any = start
    for round in (1, 2, 3):
        rng = torch_generator(study.seed, "gan", "a", "all", round)
        rows = store.rows("train")
        train_pggan_round(state, store.images, rows, settings_of(study), rng, study.precision, step0=4 * (round - 1))
        # a site object of its own each time: what it knows of the round before is on disk
        weights = _site(tmp_path, study, store).gan(_train(study, round=round, weights=weights)).weights
        assert digest_of(weights) == digest_of(parameters_of(state.generator))


def test_too_few_images_of_all_together_and_what_counts_for_whom() -> None:
    study = unlabelled(gan={"minimum_images": 10})
    drawn, holders = shares_of(study, np.array([4, 0, 7]))
    assert drawn.tolist() == [4, 0, 7]
    assert holders.tolist() == [1, 1, 1], "the generator of all images counts for a class that the site lacks, too"
    drawn, holders = shares_of(study, np.array([4, 0, 5]))
    assert drawn.tolist() == holders.tolist() == [0, 0, 0]
    drawn, holders = shares_of(tiny(gan={"minimum_images": 5}), np.array([4, 0, 7]))
    assert (drawn.tolist(), holders.tolist()) == ([0, 0, 7], [0, 0, 1])


def test_growth_follows_from_the_round_alone_and_ends_grown() -> None:
    study = unlabelled()
    places = [place_after(study, round) for round in range(5)]
    assert [place.size for place in places if place] == [4, 4, 8, 16, 32]
    assert place_after(tiny(), 3) is None
    weights = parameters_of(build_generator(study, ("g",)))
    coarse = shown(study, weights, 1, "all", 2)
    assert coarse.shape == (2, 32, 32)
    blocks = coarse.reshape(2, 4, 8, 4, 8)
    assert (blocks == blocks[:, :, :1, :, :1]).all(), "after round 1 images are still 4 px, enlarged"
    assert np.array_equal(shown(study, weights, None, "all", 2), shown(study, weights, 4, "all", 2)) or (
        place_after(study, 4).alpha < 1  # type: ignore[union-attr]
    )


# ---- the whole study


def test_the_archive_has_every_label_and_says_how_each_image_was_found(finished: Path) -> None:
    study, rows = unlabelled(sites={"count": 3}), rows_of(finished)
    assert verify_archive(finished / "archive") == []
    manifest = json.loads((finished / "archive" / "manifest.json").read_text())
    assert list(manifest["generators"]) == ["all"]
    assert manifest["findings"] == WET
    for row in rows:
        assert float(row["probability"]) >= float(row["threshold"]) == 0.34
        wanted = WET.get(row["label"], [row["label"]])
        assert row["findings"] == "|".join(wanted)
        assert int(row["label_index"]) == study.labels.index(row["label"])
        assert 0 <= int(row["moves"]) <= 20
    for name, facts in manifest["steering"]["targets"].items():
        assert facts["accepted"] + round(facts["rejected_share"] * facts["tried"]) == facts["tried"] == 64
        assert sum(row["label"] == name for row in rows) == manifest["counts"][name] <= facts["accepted"]
        assert facts["seconds"] > 0
    assert sum(manifest["counts"].values()) == len(rows)
    assert len({row["label"] for row in rows}) >= 3


def test_any_image_is_made_again_from_the_two_models_and_the_seed(finished: Path) -> None:
    study = unlabelled(sites={"count": 3})
    generator, facts = load_generator(finished / "models" / "generator-all.safetensors")
    assert (facts["model"], facts["class"], facts["latent_prior"][:6]) == ("pggan", "all", "sphere")
    classifier = load_classifier(finished / "models" / "classifier-steering.safetensors").model
    assert not study.private
    chosen = [row for row in rows_of(finished) if int(row["moves"]) > 0][::5] or rows_of(finished)[::5]
    plan = Steering(threshold=0.34, steps=20, batch=64)
    for row in chosen:
        n = int(row["latent"])
        block = range(n // 64 * 64, n // 64 * 64 + 64)
        z = torch.cat([draw_latent(1, 16, torch_generator(study.seed, "archive", row["label"], k)) for k in block])
        wanted = dict.fromkeys(row["findings"].split("|"), True)
        found = optimise_latents(
            lambda z: as_pixels(generator(z)),
            lambda images: classifier(prepare(images)),
            z,
            target_row(study.classes, wanted),
            plan,
        )
        again = render(generator, found.latents)[n % 64]
        with Image.open(finished / "archive" / row["file_name"]) as image:
            assert np.array_equal(np.asarray(image), again), row["file_name"]


def test_report_and_passport_name_the_family_the_judge_and_the_cost(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    assert report["gan"]["family"] == "pggan"
    assert list(report["gan"]["classes"]) == ["all"]
    assert report["gan"]["classes"]["all"]["holders"] == 3
    assert [entry["sites"] for entry in report["gan"]["classes"]["all"]["rounds"]] == [1] * 4, "one sum each"
    cost = report["gan"]["cost"]
    assert (cost["steps"], cost["images_shown"]) == (16, 64)
    assert cost["seconds"].keys() == cost["bytes"].keys() == {"gan", "steering"}
    steered = report["archive"]["steering"]
    assert steered["judged_by"] == "DS1"
    assert steered["targets"].keys() == {*report["classes"], "Wet heart"}
    for name, share in report["archive"]["recognised"]["per_class"].items():
        assert steered["targets"][name]["judge"] == pytest.approx(share)
    assert report["arms"]["DS3"]["counts"].keys() == set(report["classes"])
    passport = json.loads((finished / "archive" / "passport.json").read_text())
    assert passport["steering"] == steered
    for page in (finished / "report.html", finished / "archive" / "passport.html"):
        text = page.read_text()
        assert "Judge agrees" in text
        assert "Wet heart" in text
    assert "one of all images, without labels" in (finished / "archive" / "passport.html").read_text()
    sheet = (finished / "archive" / "datasheet.md").read_text()
    assert "one generator of all images was trained" in sheet
    assert "| Wet heart |" in sheet
    assert not list((finished / "models").glob("*discriminator*"))
    released = report["privacy"]["sites"]["site-01"]["released"]
    assert {"generator of all images", "classifier of steering"} <= set(released)


def test_steering_and_judge_are_two_classifiers_that_began_apart(finished: Path) -> None:
    models = {path.stem: digest_of(load_arrays(path)[0]) for path in (finished / "models").iterdir()}
    assert models["classifier-steering"] != models["classifier-DS1"]
    study = unlabelled(sites={"count": 3})
    starts = [
        parameters_of(build_classifier(study, torch_generator(study.seed, "classifier", *more)))
        for more in ((), ("steering",))
    ]
    assert digest_of(starts[0]) != digest_of(starts[1])


def test_combinations_reach_the_sites_and_are_voted_on_and_no_arm_is_taught_from_them(finished: Path) -> None:
    study, site = unlabelled(sites={"count": 3}), finished / "sites" / "site-01"
    shards = Shards(site / "archive", study)
    _, labels = shards.read()
    manifest = json.loads((finished / "archive" / "manifest.json").read_text())
    assert (labels == 3).sum() >= manifest["counts"]["Wet heart"] > 0
    taught = OpenTraining(
        name="site-01",
        study=study,
        store=open_store(site / "store"),
        states=GanStates(site / "state"),
        shards=shards,
        device=CPU,
    )
    images, single = taught._synthetic()
    assert len(images) == len(single) == (labels < 3).sum()
    assert single.max() < 3
    assert manifest["vetoes"]["images"] == len(labels)
    assert "Wet heart" in manifest["vetoes"]["vetoed_per_class"]


def test_documents_for_machines_know_the_columns_of_steering(finished: Path) -> None:
    manifest = json.loads((finished / "archive" / "manifest.json").read_text())
    fields = {field["name"] for field in croissant(manifest)["recordSet"][0]["field"]}
    assert fields | {"synthetic"} == {*rows_of(finished)[0], "image"}
    row = next(row for row in rows_of(finished) if row["label"] == "Wet heart")
    png = (finished / "archive" / row["file_name"]).read_bytes()
    assert b"steered to Cardiomegaly and Pleural Effusion" in dicom_file(manifest, row, png, number=1)


def test_whoever_reads_the_archive_later_meets_combinations_as_labels_of_their_own(
    finished: Path, tmp_path: Path
) -> None:
    place = finished / "archive"
    seen = open_review(place)
    assert seen.classes == (*tiny().classes, "Wet heart")
    assert seen.combinations == 1
    assert {"probability", "moves", "drift"} <= seen.scores.keys()
    assert "latent" not in seen.scores
    export_archive(place, tmp_path / "out", "imagefolder")
    shown = {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()}
    assert "Wet heart" in shown
    eyes = load_extractor(finished / "models" / "classifier-DS1.safetensors")
    scored = score_archive(place, finished / "sites" / "site-01" / "store", eyes)
    assert scored["quality"].keys() == set(tiny().classes)


class _StopError(Exception):
    """A kill, for a test."""


def test_a_study_that_is_cut_short_again_and_again_ends_with_the_same_bits(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_save = Checkpoints.save
    points = [("gan", 2), ("steering", 1), ("steered-normal", 1), ("classifier", 1)]

    def save(self: Checkpoints, phase: str, round: int, *rest: Any) -> None:
        real_save(self, phase, round, *rest)
        if points and (phase, round) == points[0]:
            points.pop(0)
            raise _StopError(phase)

    monkeypatch.setattr(Checkpoints, "save", save)
    while points:
        with pytest.raises(_StopError):
            run_study(unlabelled(sites={"count": 3}), tmp_path / "again")
    run_study(unlabelled(sites={"count": 3}), tmp_path / "again")
    for path in sorted((finished / "models").iterdir()):
        assert digest_of(load_arrays(path)[0]) == digest_of(load_arrays(tmp_path / "again" / "models" / path.name)[0])
    roots = [json.loads((f / "archive" / "manifest.json").read_text()) for f in (finished, tmp_path / "again")]
    assert roots[0]["root_sha256"] == roots[1]["root_sha256"]


# ---- parts


def test_the_filter_takes_what_there_is_where_a_search_has_ended() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(60, 190, (40, 32, 32), dtype=np.uint8)

    def draw(block: int) -> np.ndarray:
        return images[32 * block : 32 * block + 32]

    sieve = Sieve(on=True)
    kept = [one for one in sieve.sift("A", 64, draw) if not one.reason]
    assert len(kept) == 40
    facts = sieve.facts()
    assert (facts["drawn"]["A"], facts["short"]["A"]) == (40, 24)
    assert list(sieve.sift("B", 5, lambda block: images[:0])) == []
    assert sieve.facts()["short"]["B"] == 5


def test_the_judge_sees_a_combination_where_its_findings_are_the_likeliest(monkeypatch: pytest.MonkeyPatch) -> None:
    study = unlabelled()
    scores = np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.4, 0.1, 0.5], [0.4, 0.5, 0.1], [0.5, 0.1, 0.4]])
    monkeypatch.setattr(steering, "predict", lambda *_, **__: scores)
    labels = np.array([0, 0, 3, 3, 3])
    weights = parameters_of(build_classifier(study))
    found = steering.agreement(study, weights, np.zeros((5, 32, 32), np.uint8), labels)
    assert found == {"Cardiomegaly": 0.5, "Normal": None, "Pleural Effusion": None, "Wet heart": pytest.approx(2 / 3)}


def test_latents_of_each_family_are_of_its_prior() -> None:
    z = draw_latents(unlabelled(), 50, torch_generator(1, "z"))
    assert torch.allclose(z.norm(dim=1), torch.full((50,), 4.0), atol=1e-4)
    z = draw_latents(tiny(), 50, torch_generator(1, "z"))
    assert float(z.abs().max()) <= 1


def _report(name: str, fid: float, judge: str = "same") -> dict[str, Any]:
    counts = {"A": {"train": 30, "validation": 5, "test": 5}, "B": {"train": 20, "validation": 5, "test": 5}}
    quality = {"fid": fid, "fid_floor": 0.1, "precision": 0.5}
    return {
        "schema": 1,
        "name": name,
        "classes": ["A", "B"],
        "totals": {"counts": counts},
        "digests": {"classifier-DS1 weights": judge},
        "arms": {"DS1": {"balanced_accuracy": 0.8}},
        "gan": {
            "family": name,
            "cost": {
                "seconds": {"gan": 3.0},
                "bytes": {"gan": 4_000_000, "steering": 1_000_000},
                "steps": 10,
                "images_shown": 160,
                "parameters": 7,
                "search_seconds": None,
            },
        },
        "archive": {
            "counts": {"A": 5, "B": 6},
            "quality": {"A": dict(quality), "B": {**quality, "fid": None if fid < 0 else fid + 1}},
            "recognised": {"per_class": {"A": 0.9, "B": 0.8}},
            "tstr": {"left_out": "not done"},
        },
    }


def test_side_by_side_takes_figures_as_they_are_and_says_when_eyes_differ(tmp_path: Path) -> None:
    table = side_by_side([_report("dcgan", 2.0), _report("pggan", 1.0)])
    rows = {row["title"]: row["values"] for row in table["rows"]}
    assert rows["Family"] == ["dcgan", "pggan"]
    assert rows["FID, mean over classes"] == [2.5, 1.5]
    assert rows["Real training images"] == [50, 50]
    assert rows["Bytes of phases 1 and 2, all sites"] == [5.0, 5.0]
    assert rows["TSTR, balanced accuracy"] == [None, None]
    assert rows["Judge agrees, B"] == [0.8, 0.8]
    assert len(table["notes"]) == 1
    page = write_comparison(tmp_path, table).read_text()
    assert "dcgan beside pggan" in page
    assert json.loads((tmp_path / "comparison.json").read_text()) == table
    other = side_by_side([_report("a", 2.0), _report("b", -1.0, "other")])
    assert any("not the same classifier" in note for note in other["notes"])
    assert {row["title"]: row["values"] for row in other["rows"]}["FID, mean over classes"] == [2.5, None]
    with pytest.raises(DataError, match="other classes"):
        side_by_side([_report("a", 1.0), {**_report("b", 1.0), "classes": ["A"]}])
    with pytest.raises(DataError, match="no generators' cost"):
        side_by_side([_report("a", 1.0), {**_report("b", 1.0), "gan": {}}])


@pytest.mark.slow
def test_two_families_are_run_and_compared_in_one_command(tmp_path: Path) -> None:
    import yaml

    from xfed.simulations.compare_families import compare

    changes: dict[str, Any] = {"archive": {"findings": {}, "per_class": 6, "balance": "fixed"}}
    studies = [unlabelled(**changes), unlabelled(gan={"family": "dcgan", "width": 4}, **changes)]
    configs = []
    for study, name in zip(studies, ("grown", "per-class"), strict=True):
        values = {**study.resolved(), "name": name}
        configs.append(tmp_path / f"{name}.yaml")
        configs[-1].write_text(yaml.safe_dump(values))
    table = compare((configs[0], configs[1]), tmp_path / "out")
    assert table["names"] == ["grown", "per-class"]
    assert not any("not the same classifier" in note for note in table["notes"]), "one judge, to the last bit"
    for name in ("grown", "per-class"):
        report = json.loads((tmp_path / "out" / name / "report.json").read_text())
        assert report["sibling"] == table
        assert "Side by side" in (tmp_path / "out" / name / "report.html").read_text()
    assert (tmp_path / "out" / "comparison.html").is_file()
