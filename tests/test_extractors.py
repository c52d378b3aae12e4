"""Networks by path: only what is named, never a pickle; measured at hospitals and pooled by the coordinator, to equal figures."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from tests.conftest import tiny
from xfed.client.archive_score import score_archive, write_sums
from xfed.client.cli import app as client_app
from xfed.client.policy import Policy
from xfed.client.store import write_store
from xfed.common.durable import sha256_file
from xfed.common.errors import CheckpointError, ConfigError, DataError, RefusedError
from xfed.common.extractors import INCEPTION_KEY, Extractor, load_extractor
from xfed.common.features import DIMENSIONS, project, project_features
from xfed.common.frechet import feature_sums, frechet_distance
from xfed.common.randomness import torch_generator
from xfed.common.registry import build_classifier, save_classifier
from xfed.common.weights import load_arrays, parameters_of, save_arrays
from xfed.server.archive_score import score_pooled
from xfed.server.cli import app as server_app
from xfed.simulations.phantom import phantom_arrays

CLASSES = ("Cardiomegaly", "Normal", "Pleural Effusion")
STUDY = tiny()


def _classifier(folder: Path) -> Path:
    path = folder / "classifier-DS1.safetensors"
    save_classifier(path, STUDY, parameters_of(build_classifier(STUDY, torch_generator(1, "c"))), {"arm": "DS1"})
    return path


def _images(n: int = 5, size: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (n, size, size), dtype=np.uint8)


def test_a_released_classifier_gives_the_features_that_a_study_uses(tmp_path: Path) -> None:
    path = _classifier(tmp_path)
    extractor = load_extractor(path)
    model = build_classifier(STUDY, torch_generator(1, "c"))
    expected = project_features(model, _images(70), torch.device("cpu"), "float32")
    np.testing.assert_allclose(extractor.features(_images(70)), expected, rtol=1e-5, atol=1e-6)
    assert extractor.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert extractor.name == "dcnn of classifier-DS1.safetensors"
    assert extractor.features(_images(0)).shape == (0, DIMENSIONS)
    with pytest.raises(DataError, match="64 px"):
        extractor.features(_images(2, 64))


def _torchvision() -> Any:
    """torchvision's inception_v3; a build without its compiled operators lacks two names that its import wants."""
    try:
        from torchvision.models import inception_v3
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        _torchvision.library = library  # type: ignore[attr-defined] (it must live)
        import sys

        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        from torchvision.models import inception_v3
    except ImportError:
        pytest.skip("torchvision is not installed")
    return inception_v3


@pytest.mark.parametrize("auxiliary", [False, True])
def test_inception_by_its_state_dict_is_torchvisions_own_network(tmp_path: Path, auxiliary: bool) -> None:
    inception_v3 = _torchvision()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = inception_v3(weights=None, aux_logits=auxiliary, transform_input=False, init_weights=False).eval()
    assert INCEPTION_KEY in reference.state_dict()
    path = tmp_path / "inception.safetensors"
    save_file({key: value.contiguous() for key, value in reference.state_dict().items()}, path)
    extractor = load_extractor(path, sha256=sha256_file(path).upper())
    assert extractor.name == "Inception v3"
    images = _images(2)
    large = torch.nn.functional.interpolate(
        torch.from_numpy(images).float()[:, None] / 255,
        size=(299, 299),
        mode="bilinear",
        align_corners=False,
        antialias=True,
    )
    mean, deviation = (torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    seen: list[torch.Tensor] = []
    handle = reference.avgpool.register_forward_hook(lambda module, given, output: seen.append(output.flatten(1)))
    with torch.no_grad():
        reference((large.repeat(1, 3, 1, 1) - mean) / deviation)
    handle.remove()
    assert seen[0].shape == (2, 2048)
    np.testing.assert_allclose(extractor.features(images), project(seen[0]), rtol=1e-4, atol=1e-5)
    broken = dict(reference.state_dict())
    broken.pop("fc.bias")
    save_file({key: value.contiguous() for key, value in broken.items()}, path)
    with pytest.raises(CheckpointError, match="not a state dict of torchvision"):
        load_extractor(path)


def _script(path: Path, module: torch.nn.Module) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(module).save(str(path))
    return path


class _Means(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(x, 8).flatten(1)


class _Flat(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten()


class _NotFinite(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) / 0


def test_a_torchscript_module_runs_only_under_the_digest_that_was_told(tmp_path: Path) -> None:
    path = _script(tmp_path / "means.pt", _Means())
    with pytest.raises(ConfigError, match=f"--sha256 {sha256_file(path)}"):
        load_extractor(path)
    with pytest.raises(DataError, match="not the file you were told of"):
        load_extractor(path, sha256="0" * 64)
    extractor = load_extractor(path, sha256=sha256_file(path))
    images = _images(3)
    blocks = images.reshape(3, 8, 4, 8, 4).mean(axis=(2, 4)).reshape(3, 64) / 255
    np.testing.assert_allclose(extractor.features(images), project(torch.from_numpy(blocks)), rtol=1e-5, atol=1e-5)


def test_files_that_are_no_network_are_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        load_extractor(tmp_path / "absent.safetensors")
    pickled, exported = tmp_path / "weights.pth", tmp_path / "module.pt2"
    for path in (pickled, exported):
        path.write_bytes(b"\x80\x04cos\nsystem\n")
        with pytest.raises(ConfigError, match="pickles"):
            load_extractor(path, sha256=sha256_file(path))
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="safetensors"):
        load_extractor(damaged)
    other = tmp_path / "other.safetensors"
    save_arrays(other, {"x": np.zeros(3, np.float32)}, {"kind": "generator"})
    with pytest.raises(CheckpointError, match="not a classifier"):
        load_extractor(other)
    torch.save({"a": 1}, tmp_path / "saved.pt")
    with pytest.raises(CheckpointError, match="not a TorchScript module"):
        load_extractor(tmp_path / "saved.pt", sha256=sha256_file(tmp_path / "saved.pt"))
    for module, reason in ((_Flat(), "one row of features"), (_NotFinite(), "not finite")):
        path = _script(tmp_path / "odd.pt", module)
        with pytest.raises(DataError, match=reason):
            load_extractor(path, sha256=sha256_file(path)).features(_images())


def _drawn(seed: int, each: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return phantom_arrays(
        classes=CLASSES, patients=dict.fromkeys(CLASSES, each), images_per_patient=1.0, size=32, seed=seed
    )


def _store(folder: Path, seed: int, each: int) -> Path:
    images, labels, patients = _drawn(seed, each)
    _, numbers = np.unique(patients, return_inverse=True)
    write_store(
        folder, classes=CLASSES, images=images, labels=labels, patients=numbers, splits=np.zeros(len(labels), np.int8)
    )
    return folder


def _archive(folder: Path, each: int = 40, **more: Any) -> Path:
    images, labels, _ = _drawn(50, each)
    rows, files = ["file_name,label"], {}
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        name = f"images/{CLASSES[label]}/{number:04d}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / name)
        files[name] = sha256_file(folder / name)
        rows.append(f"{name},{CLASSES[label]}")
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")
    files["metadata.csv"] = sha256_file(folder / "metadata.csv")
    manifest = {"name": "a", "study": "s", "classes": list(CLASSES), "files": files, "root_sha256": "ab" * 32, **more}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def means(tmp_path: Path) -> Extractor:
    path = _script(tmp_path / "means.pt", _Means())
    return load_extractor(path, sha256=sha256_file(path))


def test_sums_of_two_hospitals_give_the_figures_of_their_pooled_images(tmp_path: Path, means: Extractor) -> None:
    archive = _archive(tmp_path / "archive")
    files, real = [], []
    for seed in (1, 2):
        store = _store(tmp_path / f"store-{seed}", seed, 30)
        scored = score_archive(archive, store, means, hospitals=2)
        files.append(tmp_path / f"{seed}.safetensors")
        write_sums(files[-1], scored, archive, Policy.permissive())
        images, labels, patients = _drawn(seed, 30)
        _, numbers = np.unique(patients, return_inverse=True)
        real.append((images, labels, numbers))
    pooled = score_pooled(archive, means, files)
    assert pooled["hospitals"] == 2
    fakes, fake_labels, _ = _drawn(50, 40)
    for label, name in enumerate(CLASSES):
        halves = [
            means.features(np.concatenate([i[(k == label) & (p % 2 == half)] for i, k, p in real])) for half in (0, 1)
        ]
        found = pooled["quality"][name]
        assert found["images_floor"] == len(halves[1]), "30 real images in the half: nothing to thin"
        assert found["equal_numbers"]
        fake = feature_sums(means.features(fakes[fake_labels == label])[: len(halves[1])])
        assert found["fid"] == pytest.approx(frechet_distance(feature_sums(halves[0]), fake), rel=1e-6)
        assert found["fid_floor"] == pytest.approx(frechet_distance(*map(feature_sums, halves)), rel=1e-6)
        assert found["ms_ssim"] is not None
    for wrong, reason in (("archive", "archive"), ("extractor", "extractor"), ("classes", "classes"), ("kind", "kind")):
        arrays, facts = load_arrays(files[1])
        save_arrays(tmp_path / "odd.safetensors", arrays, {**facts, wrong: "other"})
        with pytest.raises(DataError, match=f"differs in {reason}"):
            score_pooled(archive, means, [files[0], tmp_path / "odd.safetensors"])
    with pytest.raises(DataError, match="same sums"):
        score_pooled(archive, means, [files[0], files[0]])
    arrays, facts = load_arrays(files[1])
    save_arrays(tmp_path / "odd.safetensors", arrays, {**facts, "scale": 2 * facts["scale"]})
    with pytest.raises(DataError, match="must agree"):
        score_pooled(archive, means, [files[0], tmp_path / "odd.safetensors"])


def test_sums_obey_the_sites_policy_and_are_not_written_for_a_private_study(tmp_path: Path, means: Extractor) -> None:
    archive, store = _archive(tmp_path / "archive", each=12), _store(tmp_path / "store", 1, 8)
    scored = score_archive(archive, store, means)
    out = tmp_path / "sums.safetensors"
    write_sums(out, scored, archive, Policy())
    shown, _ = load_arrays(out)
    counts = [int(scored["arrays"][f"{label}/half{half}/count"][0]) for label in range(3) for half in (0, 1)]
    assert min(counts) < 5
    for label in range(3):
        small = min(counts[2 * label : 2 * label + 2]) < 5
        assert bool(shown[f"{label}/half0/outer"].any()) != small
    with pytest.raises(RefusedError, match="archive_scores"):
        write_sums(out, scored, archive, Policy(metrics=("counts",)))
    private = _archive(tmp_path / "private", each=12, about={"private": True})
    with pytest.raises(RefusedError, match="private study"):
        write_sums(tmp_path / "never", score_archive(private, store, means), private, Policy.permissive())
    assert not (tmp_path / "never").exists()


def test_a_changed_image_or_another_class_list_is_refused(tmp_path: Path, means: Extractor) -> None:
    archive, store = _archive(tmp_path / "archive", each=6), _store(tmp_path / "store", 1, 6)
    name = next(iter((archive / "images").rglob("*.png")))
    before = name.read_bytes()
    name.write_bytes(before[:-1] + b"x")
    with pytest.raises(DataError, match="changed"):
        score_archive(archive, store, means)
    name.unlink()
    with pytest.raises(DataError, match="is not there"):
        score_archive(archive, store, means)
    name.write_bytes(before)
    images, labels, _ = _drawn(1, 6)
    write_store(
        tmp_path / "two",
        classes=CLASSES[:2],
        images=images[labels < 2],
        labels=labels[labels < 2],
        patients=np.arange((labels < 2).sum()),
        splits=np.zeros((labels < 2).sum(), np.int8),
    )
    with pytest.raises(DataError, match="Import the images again"):
        score_archive(archive, tmp_path / "two", means)


def test_both_commands_from_network_to_pooled_figures(tmp_path: Path) -> None:
    archive, network = _archive(tmp_path / "archive", each=20), _classifier(tmp_path)
    runner, files = CliRunner(), []
    for seed in (1, 2):
        store = _store(tmp_path / f"store-{seed}", seed, 30)
        files.append(str(tmp_path / f"{seed}.safetensors"))
        arguments = ["score", str(archive), "--store", str(store), "--features", str(network), "--sums", files[-1]]
        result = runner.invoke(client_app, [*arguments, "--hospitals", "2", "--json"])
        assert result.exit_code == 0, result.output
        assert set(json.loads(result.stdout)["quality"]) == set(CLASSES)
        shown = runner.invoke(client_app, arguments)
        assert sha256_file(network)[:16] in shown.output.replace("\n", "")
    result = runner.invoke(
        server_app,
        [
            "archive",
            "score",
            str(archive),
            "--features",
            str(network),
            "--sums",
            files[0],
            "--sums",
            files[1],
            "--json",
        ],
    )
    assert result.exit_code == 0, result.output
    pooled = json.loads(result.stdout)
    assert pooled["hospitals"] == 2
    assert all(facts["fid"] > 0 for facts in pooled["quality"].values())
