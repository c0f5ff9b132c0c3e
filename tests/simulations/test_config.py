"""Experiments: what is accepted, and that every refusal says what is wrong."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from simulations.__main__ import EXPERIMENTS
from simulations.config import SECTIONS, ConfigError, Experiment, load
from tasks.config import from_run_config, parse, to_run_config

FIELDS = [
    (section, key, field)
    for section, model in SECTIONS.items()
    for key, field in model.model_fields.items()
]
BY_NAME = pytest.mark.parametrize(
    ("section", "key", "field"), FIELDS, ids=[f"{section}.{key}" for section, key, _ in FIELDS]
)
ROOT = EXPERIMENTS.parents[1]
SINGLE = [file for file in EXPERIMENTS.glob("*.toml") if "\n[[" not in file.read_text()]


def write(folder: Path, text: str = "") -> Path:
    file = folder / "experiment.toml"
    file.write_text('[experiment]\nname = "toy"\n' + text)
    return file


def refusal(model: type[BaseModel], section: str, values: Any) -> str:
    with pytest.raises(ConfigError) as error:
        parse(model, section, values)
    message = str(error.value)
    assert "\n" not in message
    return message


@BY_NAME
def test_a_value_of_a_wrong_type_is_named_with_what_is_legal(section, key, field) -> None:
    message = refusal(SECTIONS[section], section, valid(section) | {key: {"a": 1}})

    assert message.startswith(f'{section}.{key} = {{"a": 1}} is not legal: expected ')
    annotation = field.annotation
    if get_origin(annotation) is Literal:
        assert all(choice in message for choice in get_args(annotation))


@BY_NAME
def test_every_key_is_documented(section, key, field) -> None:
    assert field.description


@pytest.mark.parametrize(
    ("section", "key", "value", "legal"),
    [
        ("experiment", "rounds", 0, "a whole number >= 1"),
        ("experiment", "rounds", 2.5, "a whole number >= 1"),
        ("experiment", "clients", True, "a whole number >= 2"),
        ("experiment", "seed", "1", "a whole number >= 0"),
        ("experiment", "name", "../up", "letters, digits, '.', '_' and '-'"),
        ("train", "lr", 0, "a number > 0"),
        ("train", "lr", float("nan"), "a number > 0"),
        ("train", "momentum", 1.0, "a number >= 0 and < 1"),
        ("attack", "poison_rate", 1.01, "a number >= 0 and <= 1"),
        ("attack", "scale", float("inf"), "a number >= 1"),
        ("attack", "obeys_filter", 1, "true or false"),
        ("attack", "trigger", [[[0, "x"]]], "a list of parts, each a list of [row, column] pixels"),
        ("attack", "trigger", "not JSON", "a list of parts"),
        ("task", "dataset", "imagenet", '"mnist", "fashion-mnist", "cifar10", "gtsrb"'),
        ("task", "model", "vgg", 'one of "mnist-cnn", "cifar-cnn", "cifar-cnn-bn", "resnet18"'),
        ("task", "train_images", 0, "a whole number >= 1"),
        ("defense", "trim_beta", 0.5, "a number >= 0 and < 0.5"),
        ("defense", "rlr_threshold", 0, "a whole number >= 1"),
        ("defense", "flame_noise", -0.1, "a number >= 0"),
        ("run", "output", "", "the path of a folder"),
    ],
)
def test_a_value_out_of_range_is_named_with_the_range(section, key, value, legal) -> None:
    message = refusal(SECTIONS[section], section, valid(section) | {key: value})

    assert message.startswith(f"{section}.{key} = ")
    assert legal in message


@given(st.sampled_from(sorted(SECTIONS)), st.text("abcdefgh_", min_size=1))
def test_an_unknown_key_names_those_that_there_are(section: str, key: str) -> None:
    known = SECTIONS[section].model_fields
    if key not in known:
        message = refusal(SECTIONS[section], section, valid(section) | {key: 1})
        assert message.startswith(f"{section}.{key} is not a known key")
        assert all(name in message for name in known)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[atack]", r"\[atack\] is not a known section: there are \[experiment\], \[task\]"),
        ("[attack]\nname='dba'\nmalicious = 10", r"attack.malicious = 10 .* < 10 \(experiment"),
        ("[attack]\ntarget = 10", r"attack.target = 10 .* >= 0 and < 10 \(the classes"),
        ("[task]\ndataset = 'gtsrb'\n[attack]\ntarget = 43", "attack.target = 43 .* < 43 .the cl"),
        ("[attack]\ntrigger = [[[0, 28]]]", r"attack.trigger .* mnist5k: .*28x28 .*\(0, 28\)"),
        ("[attack]\ntrigger = [[]]", "attack.trigger is not legal for mnist5k: a trigger needs"),
        ("[task]\nmodel = 'cifar-cnn'", "task.model is not legal for mnist5k: .*colour"),
        ("[defense]\nname = 'multikrum'\nf = 4", r"defense.f = 4 .* <= 3 \(multikrum .* 2f \+ 3"),
        ("[defense]\nname = 'bulyan'\nf = 2", r"defense.f = 2 .* <= 1 \(bulyan .* 4f \+ 3"),
        ("[defense]\nliars = 5", r"defense.liars = 5 .* <= 4 \(a minority of experiment.clients"),
        ("[defense]\nname = 'rlr'\nrlr_threshold = 11", r"defense.rlr_threshold = 11 .* <= 10"),
        ("clients = ", "is not valid TOML"),
    ],
)
def test_what_does_not_fit_together_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(write(tmp_path, text))


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*nothing.toml: No such file"):
        load(tmp_path / "nothing.toml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("attack.name", "expected section.key=VALUE"),
        ("rounds=3", "expected section.key=VALUE"),
        ("attack.name=dba", r"attack.name = dba .*TOML value \(text in double quotes\)"),
        ("attack.malicious=4\nother = 3", "expected a TOML value"),
        ("attack.malicious=-1", "attack.malicious = -1 is not legal: expected a whole number >= 0"),
    ],
)
def test_an_override_that_cannot_be_read_is_refused(tmp_path, override, message) -> None:
    with pytest.raises(ConfigError, match=message):
        load(write(tmp_path), [override])


def test_overrides_win_and_paths_become_absolute(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path, "rounds = 7\n[run]\ndata_root = 'data'\n")

    experiment = load(file, ["experiment.rounds = 9", 'defense.name="fedmedian"'])

    assert experiment.experiment.rounds == 9
    assert experiment.defense.name == "fedmedian"
    assert experiment.run.output == str(tmp_path / "results" / "toy")
    assert experiment.run.data_root == str(tmp_path / "data")
    assert "run" not in experiment.identity()


def test_the_flat_form_holds_scalars_and_reads_back(tmp_path: Path) -> None:
    file = write(tmp_path, "[attack]\ntrigger = [[[0, 0], [0, 1]], [[3, 0]]]\n")
    experiment = load(file, ["train.weight_decay=1e-5"])

    flat = experiment.run_config()

    assert {type(value) for value in flat.values()} <= {str, int, float, bool}
    assert flat["attack.trigger"] == "[[[0, 0], [0, 1]], [[3, 0]]]"
    assert "task.model" not in flat
    read_back = {name: from_run_config(flat, name, model) for name, model in SECTIONS.items()}
    assert Experiment(**read_back) == experiment
    # Flower's defaults cannot be null, so an empty text stands for one.
    with_empty = flat | {"task.model": "", "run.data_root": ""}
    assert from_run_config(with_empty, "task", SECTIONS["task"]) == experiment.task


@pytest.mark.parametrize("file", sorted(SINGLE), ids=lambda file: file.stem)
def test_the_experiments_of_the_repository_are_legal(file: Path) -> None:
    assert file.read_text().startswith("# ")
    assert load(file).experiment.name == file.stem


def test_flower_has_a_default_for_every_key() -> None:
    """`flwr run` refuses to set a key that the project's own defaults do not list."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    defaults = pyproject["tool"]["flwr"]["app"]["config"]
    listed = {f"{section}.{key}" for section, keys in defaults.items() for key in keys}

    assert listed == {f"{section}.{key}" for section, key, _ in FIELDS}
    flat = {f"{section}.{k}": v for section, keys in defaults.items() for k, v in keys.items()}
    for section, model in SECTIONS.items():
        stated = from_run_config(flat, section, model)
        assert stated == parse(model, section, valid(section) | required(stated))
    assert to_run_config({"task": SECTIONS["task"]()}).items() <= flat.items()


def valid(section: str) -> dict[str, Any]:
    """Return values for what has no default."""
    return {"experiment": {"name": "toy"}, "run": {"output": "results"}}.get(section, {})


def required(section: BaseModel) -> dict[str, Any]:
    """Return the values of the keys that have no default."""
    fields = type(section).model_fields.items()
    return {key: getattr(section, key) for key, field in fields if field.is_required()}
