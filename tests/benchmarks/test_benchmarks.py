"""Benchmarks at tiny sizes: what they write, not how long anything takes."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import central, detection, privacy, probes, reports, rounds, stealth
from benchmarks.outcome import Bar, Outcome, Row
from none_core.accounting import epsilon
from none_core.trigger_inversion import Finding, Triggers
from simulations import results
from simulations.config import build as experiment_of
from tasks import models
from tests.simulations.synthetic import entry
from tests.tasks.test_data import write_idx


def written(outcome: Outcome, folder: Path) -> dict[str, Any]:
    outcome.show()
    content: dict[str, Any] = json.loads(outcome.write(folder / "new" / "x.json").read_text())
    assert content.keys() == {"benchmark", "method", "machine", "rows", "holds"}
    assert {"cores", "threads", "torch", "processor", "load"} <= content["machine"].keys()
    figures = [list(row["figures"]) for row in content["rows"]]
    assert all(names == figures[0] for names in figures)
    return content


@pytest.mark.parametrize(("value", "holds"), [(1.3, True), (1.31, False)])
def test_a_bar_holds_up_to_its_limit_and_decides_for_all(
    tmp_path: Path, value: float, holds: bool
) -> None:
    rows = [Row("a", {"x": 1}), Row("b", {"x": None}, (Bar("x", value, 1.3), Bar("y", 0, 1)))]

    content = written(Outcome("name", "how", rows), tmp_path)

    first, second = content["rows"][1]["bars"]
    assert first == {"figure": "x", "value": value, "limit": 1.3, "holds": holds}
    assert second["holds"]
    assert content["holds"] is holds


def test_report_compares_with_a_forward_pass_and_counts_bytes(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (8, 1, 28, 28), generator=generator).byte()
    case = reports.Case("tiny", "mnist-cnn", images, torch.arange(8))

    row = reports.measure(case, "channels last", repeats=2)
    figures = written(Outcome("report", reports.METHOD, [row]), tmp_path)["rows"][0]["figures"]

    assert len(row.samples["forward s"]) == len(row.samples["report s"]) == 2
    assert [bar.figure for bar in row.bars] == ["ratio", "bytes"]
    # A flat npy header alone is 128 bytes, and the report has three fields.
    assert 3 * 128 < figures["bytes"] < reports.REPORT_BYTES
    assert figures["share of the model"] == pytest.approx(figures["bytes"] / 1_724_320)


def test_full_mnist_share_is_6000_digits_without_the_data_set(tmp_path: Path) -> None:
    large = reports.cases(tmp_path)[1]

    assert large.images.shape == (6000, 1, 28, 28)
    assert large.labels.shape == (6000,)
    assert "repeated" in large.name


@pytest.mark.parametrize("detector", ["mixture", "contrast"])
def test_detect_reads_and_detects_in_a_process_of_its_own(tmp_path: Path, detector: str) -> None:
    rows = detection.measure(detector, "mnist-cnn", [5], samples=40)

    (row,) = written(Outcome("detect", detection.METHOD, rows), tmp_path)["rows"]
    figures = row["figures"]
    assert figures["read s"] > 0
    assert figures["detect s"] > 0
    assert 0 <= figures["growth MB"] <= figures["peak MB"]
    assert row["bars"] == []


def test_only_mixture_is_asked_about_a_thousand_clients() -> None:
    assert detection.measure("linearity", "mnist-cnn", [1000], samples=40) == []


def test_the_bars_of_detection_are_those_of_the_largest_case() -> None:
    figures = {"read s": 8.0, "detect s": 2.5, "peak MB": 700.0}

    bars = detection._row("mixture", "resnet18", 1000, figures).bars

    assert [bar.holds for bar in bars] == [False, True]
    assert detection._row("mixture", "resnet18", 100, figures).bars == ()


def test_central_ranks_as_the_published_loop_does(tmp_path: Path) -> None:
    rows = written(central.run(2000, "cifar-cnn"), tmp_path)["rows"]
    assert [row["case"] for row in rows] == [
        "loop, 2,000 samples",
        "report, 500 samples",
        "report, 2,000 samples",
    ]
    assert rows[2]["figures"]["differing"] == 0
    assert rows[2]["figures"]["of the loop"] < 1
    assert [bar["figure"] for bar in rows[2]["bars"]] == [
        "seconds of the loop's",
        "MB of a quarter's",
        "differing",
    ]


def test_a_typical_round_sets_evaluation_apart() -> None:
    entries = [
        {"round": 2, "train": train, "query": 1.0, "decide": 0.5, "evaluate": 2.0}
        for train in (1.0, 2.0, 30.0)
    ]

    figures = rounds.typical_round(entries, statistics.median)

    assert figures["train"] == 2
    assert figures["round"] == 3.5
    assert figures["all"] == 5.5
    assert figures["rounds"] == 3


def test_a_run_without_a_round_to_measure_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="more rounds"):
        rounds.typical_round([], statistics.median)


def test_round_runs_both_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in set(rounds.RUNS) - {rounds.PLAIN, rounds.QUIET}:
        monkeypatch.delitem(rounds.RUNS, name)

    content = written(rounds.run(None, rounds=2, repeats=1), tmp_path)

    plain, quiet = content["rows"]
    assert plain["figures"]["ratio"] == 1
    assert plain["figures"]["query s"] == 0
    assert quiet["figures"]["query s"] > 0
    assert quiet["figures"]["rounds"] == 1
    assert [bar["figure"] for bar in quiet["bars"]] == ["ratio"]


def test_stealth_brings_the_attackers_nearer(tmp_path: Path) -> None:
    overrides = ["experiment.clients=5", "attack.malicious=2", "train.local_epochs=1"]
    content = written(stealth.run(None, [0.0, 4.0], rounds=2, overrides=overrides), tmp_path)

    free, near = (row["figures"]["attackers / honest"] for row in content["rows"])
    assert near < free
    assert len(content["rows"][0]["samples"]["ASR"]) == 2


@pytest.mark.parametrize("out", ["folder", "one.json"])
def test_command_writes_where_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    outcome = Outcome("detect", "how", [Row("a", {"x": 1})])
    monkeypatch.setattr(detection, "run", lambda clients: outcome)

    assert command.main(["detect", "--clients", "3", "--out", str(tmp_path / out)]) == 0

    file = tmp_path / out if out.endswith(".json") else tmp_path / out / "detect.json"
    assert json.loads(file.read_text())["holds"] is True


def test_probes_are_judged_by_cost(tmp_path: Path) -> None:
    small = ("experiment.clients=3", "attack.malicious=1", "train.local_epochs=1")
    outcome = probes.run(None, costs=((2, 2), (3, 2)), rounds=4, overrides=small)

    content = written(outcome, tmp_path)
    assert [row["case"] for row in content["rows"]] == ["2 x 2", "3 x 2"]
    for row in content["rows"]:
        assert row["figures"]["s"] > 0
        assert 0 <= row["figures"]["false"] <= 1
        assert len(row["samples"]["s"]) == 2 * 2  # honest clients, probed rounds


def test_a_probe_is_timed_beside_an_epoch_of_full_mnist(tmp_path: Path) -> None:
    for part, count in (("train", 700), ("t10k", 50)):
        images = np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        write_idx(tmp_path / "MNIST" / "raw" / f"{part}-images-idx3-ubyte", images)
        write_idx(tmp_path / "MNIST" / "raw" / f"{part}-labels-idx1-ubyte", labels)
    small = ("experiment.clients=3", "attack.malicious=1", "train.local_epochs=1")
    rows = probes.run(tmp_path, costs=((2, 2),), rounds=1, overrides=small).rows
    assert [row.case for row in rows] == ["2 x 2", "full MNIST, defaults"]
    assert list(rows[1].figures) == list(rows[0].figures)
    assert rows[1].figures["ratio"] == rows[1].figures["s"] / rows[1].figures["local epoch s"]


def test_probes_look_at_other_data_with_normalisation_too(tmp_path: Path) -> None:
    draw = np.random.default_rng(0).integers
    arrays: dict[str, Any] = {}
    for part, number in (("train", 430), ("test", 43)):
        arrays[f"x_{part}"] = draw(0, 256, (number, 32, 32, 3), dtype=np.uint8)
        arrays[f"y_{part}"] = np.arange(number, dtype=np.uint8) % 43
    (tmp_path / "gtsrb").mkdir()
    np.savez(tmp_path / "gtsrb" / "gtsrb32.npz", **arrays)
    small = ("experiment.clients=3", "attack.malicious=1", "train.local_epochs=1")
    other = (*small, 'task.dataset="gtsrb"', "task.held_out=true")
    content = written(probes.run(tmp_path, ((1, 1),), rounds=1, overrides=other), tmp_path)
    assert content["method"].startswith("gtsrb, 3 clients, DBA by 1 of them")
    assert [row["case"] for row in content["rows"]] == ["1 x 1"]


def test_an_average_keeps_the_types_of_what_is_averaged() -> None:
    updates = [{"w": torch.tensor([1.0, 2.0]) * k, "n": torch.tensor(k)} for k in (1, 2, 4)]
    average = stealth.averaged(updates)
    assert torch.equal(average["w"], torch.stack([u["w"] for u in updates]).mean(0))
    assert average["n"].dtype == torch.int64
    assert int(average["n"]) == 2


@pytest.mark.parametrize("cost", ["30", "30x", "0x8", "30x-8", "axb"])
def test_a_cost_that_is_none_is_refused(cost: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["probes", "--costs", cost])
    assert f"{cost} is not STEPSxIMAGES, such as 30x8" in capsys.readouterr().err


def test_what_is_probed_and_at_which_cost_can_be_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def run(root: object, costs: object, overrides: object) -> Outcome:
        asked.extend([root, costs, overrides])
        return Outcome("probes", "how", [Row("a", {"x": 1})])

    monkeypatch.setattr(probes, "run", run)
    arguments = ["probes", "--costs", "30x8", "60x4", "--set", "a.b=1", "--out", str(tmp_path)]
    assert command.main(arguments) == 0
    assert asked == [None, [(30, 8), (60, 4)], ["a.b=1"]]


def test_a_probe_is_judged_as_the_detector_does() -> None:
    size = np.array([0.1, 0.11, 0.005, 0.09])
    found = Finding(
        size,
        np.ones(4),
        np.zeros((4, 3)),
        np.ones(4, dtype=bool),
        Triggers.unknown(4, torch.zeros(1, 2, 2)),
    )
    strength, attacked = probes.judged(found)
    assert attacked.tolist() == [False, False, True, False]
    assert strength[2] > 10


def test_privacy_replays_a_run_with_noise_and_bounds_what_is_said(tmp_path: Path) -> None:
    sections = {"experiment": {"name": "t", "clients": 4, "rounds": 1}}
    sections |= {"task": {"train_images": 800}, "attack": {"name": "dba", "malicious": 1}}
    identity = experiment_of(sections).identity()
    history = {"rounds": [entry(0), entry(1)], "truth": {"malicious": [0], "poisoned": 1}}
    results.write(tmp_path, results.assemble(identity, history))
    (tmp_path / "checkpoints").mkdir()
    state = models.build("mnist-cnn", (1, 28, 28), 10, seed=0).state_dict()
    torch.save(state, tmp_path / "checkpoints" / "round-0001.pt")

    outcome = privacy.run(tmp_path, [1], [0.0, 1.0], 1e-5, seeds=2)
    exact, noisy = (row["figures"] for row in written(outcome, tmp_path)["rows"])
    sizes = written(privacy.expose(tmp_path), tmp_path)["rows"]

    assert exact["epsilon of one"] is None
    assert noisy["epsilon of one"] == noisy["epsilon of 1"] == epsilon(1.0, 1, 1e-5)
    assert 0 <= noisy["found of 1"] <= 1
    assert len(sizes) == 6
    assert sizes[0]["case"] == "predictions alone, 200 samples"
    figures = [row["figures"] for row in sizes]
    assert all(each["bytes"] > 0 for each in figures)
    assert figures[-1]["bits at most"] >= max(each["bits at most"] for each in figures[:-1])
    assert figures[1]["a sample"] == pytest.approx(figures[1]["bits at most"] / 200, rel=1e-3)
