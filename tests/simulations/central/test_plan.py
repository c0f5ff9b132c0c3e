"""Files of the paper's tables: what they stand for, what is refused, and their page."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from simulations import results
from simulations.__main__ import EXPERIMENTS, main
from simulations.central import report
from simulations.central.plan import Cell, Plan, Row
from tasks.config import ConfigError

HEAD = """
seeds = [3, 4]
[base]
task = { train_images = 120, test_images = 60 }
train.epochs = 1
[tasks.signs]
task.dataset = "signs"
[tasks.mnist]
task.dataset = "mnist5k"
[models.cnn]
model.name = "cifar-cnn-bn"
[models.nin]
model.name = "nin-small-bn"
[attacks.badnets]
attack = { name = "badnets", rate = 0.1 }
[attacks.nobody]
attack.name = "none"
measure = { reasr = true, sizes = [0.1], steps = 2, batch_size = 2 }
[methods.undefended]
[methods.AC]
method.name = "activation-clustering"
[methods.none]
method.name = "none"
[tables.1]
title = "scores"
shows = "scores"
[tables.2]
title = "natural"
shows = "reasr"
note = "A note."
[tables.3]
title = "accuracy"
shows = "accuracy"
[tables.8]
title = "filter"
shows = "filter"
"""
ROWS = """
[[rows]]
tables = [1, 8]
attacks = ["badnets"]
methods = "all"
[rows.bars]
undefended_asr_min = 95
asr_max = 2
ba_lost_max = 1
precision_min = 98
recall_min = 98
asr_above_best_max = 1
ba_below_best_max = 1
[[rows]]
tables = [2, 3]
attacks = ["nobody"]
methods = ["undefended", "none"]
seeds = [3]
"""
PLANS = [file for file in EXPERIMENTS.glob("*.toml") if "\n[[rows]]" in file.read_text()]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)

    def write(text: str = ROWS, head: str = HEAD) -> Path:
        path = tmp_path / "paper.toml"
        path.write_text(head + text)
        return path

    return write


def finish(cell: Cell, ba: float, asr: float | None = None, **more: Any) -> None:
    """Leave a result, without training."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    judged = {"poisoned": 10, "dropped": None, "precision": None, "recall": None}
    final = {"ba": ba} | ({} if asr is None else {"asr": asr, "recovered": 0.5})
    content = {"final": final, "filter": judged, "looks": [], "device": "cpu"}
    content |= {"versions": results.versions()}
    results.write(cell.folder, content | more)
    results.write(cell.folder, {"seconds": 2.0, "training": 1.0}, results.TIMING)


def test_rows_are_a_product_and_cells_of_two_tables_are_run_once(write: Any) -> None:
    plan = Plan(write(), Path("results"))

    assert plan.tables == [1, 2, 3, 8]
    assert [cell.name for cell in plan.cells(1)] == [
        f"signs, cnn, badnets: {method}, seed {seed}"
        for method in ("undefended", "AC", "none")
        for seed in (3, 4)
    ]
    assert {c.folder for c in plan.cells(8)} == {c.folder for c in plan.cells(1)}
    assert [cell.run.seed for cell in plan.cells(3)] == [3, 3]
    assert plan.cells(4) == []
    moved = plan.cells(1)[0].at(Path("elsewhere"))
    assert (moved.folder, moved.run) == (Path("elsewhere"), plan.cells(1)[0].run)


def test_what_a_run_reads_makes_its_folder(write: Any) -> None:
    first = Plan(write(), Path("results")).cells(1)[0].folder
    assert first.name.startswith("signs-cifar-cnn-bn-badnets-undefended-s3-")
    assert Plan(write(head=f"# other\n{HEAD}"), Path("results")).cells(1)[0].folder == first
    other = HEAD.replace("rate = 0.1", "rate = 0.2")
    assert Plan(write(head=other), Path("results")).cells(1)[0].folder != first


def test_dearer_methods_are_expected_to_take_longer(write: Any) -> None:
    effort = {c.method: c.effort for c in Plan(write(), Path("results")).cells(1)}
    assert effort["undefended"] < effort["none"] < effort["AC"]


@pytest.mark.parametrize(
    ("head", "rows", "sentence"),
    [
        (HEAD, ROWS.replace('["badnets"]', '["hope"]'), r"attacks of \[\[rows\]\] 1: hope is not"),
        (HEAD, ROWS.replace("[1, 8]", "[1, 9]"), r"rows.0.tables.1 is not legal: .* 8"),
        (
            HEAD,
            ROWS.replace("[1, 8]", "[1, 4]"),
            r"\[\[rows\]\] 1 names table 4, which is",
        ),
        (HEAD, ROWS.replace("asr_max", "asr_most"), "rows.0.bars"),
        (HEAD.replace("[base]", "[bass]"), ROWS, "bass is not legal"),
        (HEAD, ROWS.replace('"all"', '["AC", "none"]'), r'1 needs the method "undefended", for'),
        (HEAD, ROWS.replace('"all"', '["undefended", "none"]'), "needs another method to compare"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(write: Any, head: str, rows: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Plan(write(rows, head), Path("results"))


def test_what_a_table_cannot_show_is_refused_before_anything_is_run(write: Any) -> None:
    with pytest.raises(ConfigError, match=r"signs, cnn, nobody: table 1 needs an attack"):
        Plan(write(ROWS.replace("[2, 3]", "[1]")), Path("results")).cells(1)
    with pytest.raises(ConfigError, match=r"table 2 needs measure.reasr = true"):
        Plan(write(ROWS.replace("[1, 8]", "[2]")), Path("results")).cells(2)


def test_the_device_and_every_setting_of_the_method_make_the_folder(write: Any) -> None:
    first = Plan(write(), Path("results")).cells(1)
    other = Plan(write(), Path("results"), device="cuda").cells(1)
    assert not {cell.folder for cell in first} & {cell.folder for cell in other}
    settings = first[-1].run.identity()["method"]
    assert settings["retrain_rate"] == 0.05
    said = HEAD.replace('method.name = "none"', 'method = { name = "none", retrain_rate = 0.05 }')
    assert Plan(write(head=said), Path("results")).cells(1)[-1].folder == first[-1].folder


def test_nothing_is_written_about_nothing(write: Any, tmp_path: Path) -> None:
    with pytest.raises(results.ResultError, match="no run is finished"):
        report.write(Plan(write(), tmp_path / "results"), tmp_path / "docs")
    assert not (tmp_path / "docs").exists()


def test_a_run_that_is_not_legal_is_named(write: Any) -> None:
    plan = Plan(write(head=HEAD.replace("rate = 0.1", "rate = 7.0")), Path("results"))
    with pytest.raises(ConfigError, match=r"signs, cnn, badnets: undefended: attack.rate = 7"):
        plan.cells(1)


@pytest.mark.parametrize("file", PLANS, ids=lambda file: file.stem)
def test_every_run_of_the_files_here_is_legal(file: Path) -> None:
    plan = Plan(file, Path("results"))
    own = {"paper-held-out": [1, 2, 3, 4], "paper-seeds": [1]}
    assert plan.tables == own.get(file.stem, [1, 2, 3, 4, 5, 6, 8])
    assert all(plan.cells(table) for table in plan.tables)


def test_the_page_has_the_means_the_worst_and_the_bars_that_are_missed(
    write: Any, tmp_path: Path
) -> None:
    plan = Plan(write(), tmp_path / "results")
    row = Row("signs", "cnn", "badnets")
    for seed, asr in ((3, 0.99), (4, 0.94)):
        finish(plan.cell(row, "undefended", seed), 0.90, asr)
        finish(plan.cell(row, "AC", seed), 0.91, 0.05)
    judged = {"poisoned": 10, "dropped": 10, "precision": 0.9, "recall": 0.9}
    looks = [{"reset": 4}, {"reset": 0}]
    finish(plan.cell(row, "none", 3), 0.895, 0.01, filter=judged, looks=looks)

    page, table = report.write(plan, tmp_path / "docs")

    text = page.read_text()
    assert "the seeds (3, 4; for signs, cnn, nobody: 3) that are finished" in text
    assert (
        "## Bars\n\n0 are kept in every run, 4 are missed by at least one, and for 3 a run" in text
    )
    assert "| 1, 8 | signs, cnn, badnets | undefended asr | 94.00 | >= 95 |" in text
    assert "| 1, 8 | signs, cnn, badnets | ba below best | 1.50 | <= 1 |" in text
    assert "| signs, cnn, badnets | 90.00 (90.00, n = 2) / 96.50 (99.00, n = 2) |" in text
    assert "| 91.00 (91.00, n = 2) / 5.00 (5.00, n = 2) | 89.50 / 1.00 |" in text
    assert "| signs, cnn, badnets | 10 | 10 | 90.00 | 90.00 |" in text
    assert "A note." in text
    assert "not run" in text
    lines = list(csv.DictReader(table.read_text().splitlines()))
    assert len(lines) == 5
    assert lines[-1]["neurons_reset"] == "4"
    assert {line["tables"] for line in lines} == {"1 8"}
    assert {line["code"] for line in lines} == {results.versions()["code"]}
    assert "versions of the code" not in text
    finish(plan.cell(row, "none", 4), 0.9, 0.01, filter=judged, versions={"code": "other"})
    page, _ = report.write(plan, tmp_path / "docs")
    assert "**2 versions of the code have made these runs**" in page.read_text()


def test_a_table_is_run_written_and_not_run_again(
    write: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["table", "2", "--file", str(write()), "--workers", "2", "--quiet"]

    assert main([*command, "--list"]) == 0
    assert "2 cells are 2 runs, 0 of them finished" in capfd.readouterr().out
    assert main(command) == 0
    out = Path("results/paper")
    first = {p.name: p.read_bytes() for p in out.glob("*/result.json")}
    text = (out / "paper.md").read_text()
    assert "| signs, cnn, nobody | undefended | " in text
    assert "10%: " in text
    lines = list(csv.DictReader((out / "paper.csv").read_text().splitlines()))
    assert [line["asr"] for line in lines] == ["", ""]
    times = {p: p.stat().st_mtime_ns for p in out.glob("*/result.json")}
    assert main(command) == 0
    assert times == {p: p.stat().st_mtime_ns for p in out.glob("*/result.json")}
    assert first == {p.name: p.read_bytes() for p in out.glob("*/result.json")}
    assert main([*command, "--report-only"]) == 0


def test_a_run_without_its_data_fails_and_says_so(
    write: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    head = HEAD.replace('task.dataset = "signs"', 'task.dataset = "gtsrb"')
    assert main(["table", "3", "--file", str(write(head=head)), "--quiet"]) == 1
    assert 'data set "gtsrb" is read from a data folder: pass one with' in capfd.readouterr().err


def test_the_federated_table_is_a_matrix_on_the_cpu(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["table", "7", "--list"]) == 0
    assert "mnist/iid/dba/honest/4/NONE/s10" in capfd.readouterr().out
    assert main(["table", "7", "--device", "cuda"]) == 2
    assert "table 7 is a matrix, which runs on the CPU" in capfd.readouterr().err


def test_a_table_without_rows_is_refused(write: Any, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["table", "4", "--file", str(write())]) == 2
    assert "has no row of table 4" in capfd.readouterr().err
