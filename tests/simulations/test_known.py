"""Runs of other machines, taken over from their tables."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from simulations import known, matrix_report, results, sources
from simulations.__main__ import main
from simulations.matrix import Matrix
from tests.simulations.synthetic import invent

TEXT = """
seeds = [0, 1]
malicious = [4]
[base]
experiment = { rounds = 6 }
[tasks.mnist5k]
[partitions.iid]
[reporters.honest]
[attacks.none]
attack.name = "none"
[attacks.t2]
attack = { name = "dba", obeys_filter = false }
[defenses.undefended]
defense.name = "undefended"
[defenses.none]
defense.name = "none-strategy"
[[cells]]
attacks = ["none", "t2"]
defenses = "all"
[[bars]]
name = "T2"
where = { attack = "t2", defense = "none" }
asr_final_max = 1
"""


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Matrix:
    """Make a matrix, all of which has been run on another machine."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.toml").write_text(TEXT)
    there = Matrix(Path("plan.toml"), tmp_path / "there")
    for cell in there.cells():
        invent(cell.folder, cell.experiment.identity(), 0.05, 0.01)
    matrix_report.write(there, there.cells(), Path("docs"))
    return Matrix(Path("plan.toml"), tmp_path / "here")


def test_a_row_says_what_the_run_did(plan: Matrix, tmp_path: Path) -> None:
    rows = known.read(Path("docs"))

    assert len(rows) == 8
    for folder in (tmp_path / "there").iterdir():
        assert rows[folder.name] == matrix_report.measured(results.load(folder))


def test_the_page_of_taken_rows_is_the_page_of_the_runs(plan: Matrix, capsys: Any) -> None:
    command = ["matrix", "plan.toml", "--known", "docs", "--out", "here", "--quiet"]

    assert main([*command, "--list"]) == 0
    assert "8 cells are 8 runs, 8 of them finished" in capsys.readouterr().out
    assert main([*command, "--docs", "again"]) == 0  # finds nothing to run

    assert not list(Path("here").glob("*/result.json"))
    for name in ("results.md", "results.csv", "results-timing.csv", "results-bars.csv"):
        assert Path("again", name).read_text() == Path("docs", name).read_text()


def test_only_what_this_code_has_made_is_taken(plan: Matrix) -> None:
    table = Path("docs/results.csv")
    rows = list(csv.DictReader(table.read_text().splitlines()))
    rows[0]["code"], rows[1]["state"] = "000000000000", "failed"
    with table.open("w") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)

    assert known.read(Path("docs")).keys() == {row["run"] for row in rows[2:]}


@pytest.mark.parametrize("text", [None, "run,state\n", "task,run,state,code\nmnist,a,finished,0\n"])
def test_a_folder_without_such_rows_is_refused(plan: Matrix, text: str | None, capsys: Any) -> None:
    Path("empty").mkdir()
    if text is not None:
        Path("empty/results.csv").write_text(text)

    assert main(["matrix", "plan.toml", "--known", "empty", "--out", "here"]) == 2

    error = " ".join(capsys.readouterr().err.split())
    assert f"empty holds no run that this code ({sources.digest()}) has made" in error
    assert f"runs of other code there: {int(bool(text) and 'code' in text)}" in error


def test_a_folder_that_is_not_there_is_named(plan: Matrix, capsys: Any) -> None:
    assert main(["matrix", "plan.toml", "--known", "nowhere", "--out", "here"]) == 2

    assert "nowhere" in capsys.readouterr().err
