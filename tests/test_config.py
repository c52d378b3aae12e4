"""Study files: what is right is read, what is wrong is named, nothing else ever comes out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from tests.conftest import ROOT, TINY, tiny
from xfed.common.config import Study, load_study, parse_study
from xfed.common.errors import ConfigError

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_shipped_studies_are_valid_and_say_their_command(path: Path) -> None:
    study = load_study(path)
    assert study.name == path.stem
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any("xfed-sim run configs/" in line or "make demo" in line for line in header)
    assert any("Expect" in line for line in header)


def test_the_digest_is_of_results_not_of_speed() -> None:
    base = tiny()
    assert tiny(runtime={"workers": 7, "device": "cpu"}).digest == base.digest
    for change in (
        {"seed": 1},
        {"gan": {"ema": 0.5}},
        {"classes": ["a", "b"], "data": {"phantom": {}}},
        {"precision": "bfloat16"},
    ):
        assert tiny(**change).digest != base.digest
    # what is written into the run folder is the same study
    assert parse_study(yaml.safe_load(yaml.safe_dump(base.resolved())), "copy").digest == base.digest
    assert parse_study(json.loads(json.dumps(base.resolved())), "copy").digest == base.digest


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gan": {"rouns": 3}}, ["gan.rouns", "no such field"]),
        ({"gan": {"rounds": 0}}, ["gan.rounds", "greater than or equal to 1", "0"]),
        ({"gan": {"ema": 1.0}}, ["gan.ema", "less than 1"]),
        ({"gan": {"learning_rate_g": float("nan")}}, ["gan.learning_rate_g"]),
        ({"image_size": 48}, ["image_size", "32, 64, 128 or 256"]),
        ({"name": "../etc"}, ["name"]),
        ({"classes": ["A", "a"]}, ["class names must differ"]),
        ({"classes": ["only"]}, ["two classes"]),
        ({"classes": ["a/b", "c"]}, ["folder name"]),
        ({"data": {"splits": {"train": 0.9, "validation": 0.2, "test": 0.1}}}, ["add up to 1"]),
        ({"data": {"label_map": {"x": "Luggage"}}}, ["Luggage", "Cardiomegaly"]),
        ({"sites": {"missing": {9: ["Normal"]}}}, ["no site 9"]),
        ({"sites": {"missing": {1: ["Luggage"]}}}, ["Luggage"]),
        ({"classifier": {"arms": []}}, ["arms"]),
        ({"classifier": {"arms": ["DS1", "DS1"]}}, ["once"]),
        ({"classifier": {"model": "alexnet"}}, ["classifier.model", "googlenet"]),
        ({"federation": {"quorum": 0}}, ["federation.quorum"]),
    ],
)
def test_every_mistake_names_file_field_and_remedy(change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny(**change)
    text = str(caught.value)
    assert text.startswith("tests")
    for word in words:
        assert word in text


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_study({"name": "x", "gan": {"rounds": 0, "batch": 1}, "extra": 1}, "f")
    assert all(word in str(caught.value) for word in ("gan.rounds", "gan.batch", "extra"))


@pytest.mark.parametrize("text", ["", "just words", "- a\n- b", "{", "a: [1", "\x00"])
def test_files_that_are_no_study(tmp_path: Path, text: str) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"s\.yaml"):
        load_study(path)


def test_overrides(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump(TINY))
    study = load_study(path, ["gan.rounds=9", "classifier.synthetic_share=null", "data.phantom.patients={Normal: 3}"])
    assert study.gan.rounds == 9
    assert study.classifier.synthetic_share is None
    assert study.data.phantom.patients == {"Normal": 3}
    for wrong in ("gan.rounds", "=3", "gan..rounds=3", "name.first=x", "gan.rounds=[", "gan=3"):
        with pytest.raises(ConfigError):
            load_study(path, [wrong])


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = [
    (section, field)
    for section in ("data", "sites", "gan", "archive", "classifier", "federation")
    for field in type(getattr(tiny(), section)).model_fields
]


@settings(max_examples=150, deadline=None)
@given(ANYTHING)
def test_any_value_gives_a_study_or_a_config_error(value: Any) -> None:
    try:
        parse_study(value, "f")
    except ConfigError:
        return
    raise AssertionError(f"{value!r} must not be a study")


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(FIELDS), ANYTHING)
def test_any_value_in_any_field_gives_a_study_or_a_config_error_naming_it(field: tuple[str, str], value: Any) -> None:
    section, name = field
    try:
        study = tiny(**{section: {name: value}})
    except ConfigError as error:
        told = str(error)
    else:
        assert isinstance(study, Study)
        assert parse_study(study.resolved(), "again").digest == study.digest
        return
    assert section in told


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_in_a_file_give_a_config_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("bytes") / "s.yaml"
    path.write_bytes(data)
    with pytest.raises(ConfigError):
        load_study(path)


def test_the_reference_lists_every_field() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()

    def fields(model: type[BaseModel], prefix: str) -> list[str]:
        found = []
        for name, field in model.model_fields.items():
            inner = field.annotation
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                found += fields(inner, f"{prefix}{name}.")
            else:
                found.append(prefix + name)
        return found

    missing = [name for name in fields(Study, "") if f"`{name}`" not in text]
    assert not missing
