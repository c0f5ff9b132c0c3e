"""The page about a matrix, from results that might have been."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.outcome import Bar, Outcome, Row
from simulations import matrix_report, results, sources
from simulations.__main__ import main
from simulations.matrix import Matrix
from tests.simulations.synthetic import invent

TEXT = """
seeds = [0, 1]
malicious = [4, 2]

[base]
experiment = { rounds = 6 }
[tasks.mnist5k]
[partitions.iid]
[reporters.honest]
[attacks.none]
attack.name = "none"
[attacks.t1]
attack.name = "dba"
[attacks.t2]
attack = { name = "dba", obeys_filter = false }
[attacks.strong]
attack = { name = "dba", scale = 3.0 }
[defenses.undefended]
defense.name = "undefended"
[defenses.none]
defense.name = "none-strategy"
[defenses.fedmedian]
defense.name = "fedmedian"
[defenses.multikrum]
defense = { name = "multikrum", f = 3 }

[[cells]]
attacks = ["none"]
defenses = ["undefended", "none"]
[[cells]]
attacks = ["t1"]
defenses = "all"
[[cells]]
attacks = ["t2", "strong"]
defenses = ["undefended", "none", "multikrum"]
[[cells]]
attacks = ["t1"]
malicious = [2]
defenses = ["none"]

[peers]
defense = "none"
others = ["fedmedian", "multikrum"]

[[bars]]
name = "no attacker"
where = { attack = "none", defense = "none" }
ba_below_clean_max = 1
neurons_reset_max = 0
[[bars]]
name = "T1"
where = { attack = "t1", defense = "none", malicious = 4 }
asr_final_max = 1
[[bars]]
name = "attack"
where = { attack = ["t1", "strong"], defense = "undefended" }
asr_final_min = 85
[[bars]]
name = "T1, two"
where = { attack = "t1", malicious = 2 }
asr_final_max = 1
"""
# ASR, and what it costs in BA, by defence.
SCORES = {
    "undefended": (0.95, 0.0),
    "none-strategy": (0.05, 0.001),
    "fedmedian": (0.6, 0.01),
    "multikrum": (0.01, 0.02),
}


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Matrix:
    """Make a matrix of which all has been run but two attackers, and one seed of "strong"."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.toml").write_text(TEXT)
    plan = Matrix(Path("plan.toml"), tmp_path / "results")
    for cell in plan.cells():
        left_out = cell.point.malicious == 2 or (cell.point.attack, cell.seed) == ("strong", 1)
        if not left_out and not cell.folder.exists():
            what = cell.experiment.identity()
            invent(cell.folder, what, *SCORES[what["defense"]["name"]])
    return plan


def written(plan: Matrix) -> dict[str, str]:
    files = matrix_report.write(plan, plan.cells(), Path("docs"))
    return {file.name: file.read_text() for file in files if file.suffix != ".png"}


def section(page: str, heading: str) -> str:
    return page.partition(f"{heading}\n")[2].partition("\n#")[0]


def table(page: str, heading: str) -> list[dict[str, str]]:
    parts = [part.strip() for part in section(page, heading).split("\n\n")]
    first = next(part for part in parts if part.startswith("|"))
    lines = [[word.strip() for word in line.strip("|").split("|")] for line in first.splitlines()]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def test_every_cell_has_a_row_finished_or_not(plan: Matrix) -> None:
    files = written(plan)

    rows = list(csv.DictReader(files["results.csv"].splitlines()))
    assert len(rows) == len(plan.cells())
    assert [row["state"] for row in rows].count("not run") == 2 + 3
    ours = next(r for r in rows if (r["attack"], r["defense"], r["seed"]) == ("t1", "none", "0"))
    assert ours["malicious"] == "4"
    assert float(ours["asr_final"]) < 15
    assert ours["neurons_reset"] == "5"
    assert (ours["suspected_precision"], ours["suspected_recall"]) == ("100.0", "100.0")
    assert (ours["quarantined_precision"], ours["quarantined_recall"]) == ("100.0", "50.0")
    assert ours["first_quarantined"] == "0:3 1:6"
    assert ours["honest_quarantined"] == "0"
    assert (ours["filter_precision"], ours["filter_recall"]) == ("88.0", "88.0")
    assert (ours["certified"], ours["supported"], ours["contested"]) == ("75.0", "15.0", "10.0")
    assert "seconds" not in ours
    timing = list(csv.DictReader(files["results-timing.csv"].splitlines()))
    assert {row["seconds"] for row in timing} == {"60.0", "61.0", ""}


def test_honest_clients_that_were_quarantined_are_counted() -> None:
    row = matrix_report.measured(_of_rounds([[], [1, 5], [5]], malicious=[1, 2]))

    assert (row["quarantined_precision"], row["quarantined_recall"]) == (50, 50)
    assert row["honest_quarantined"] == 1
    assert row["first_quarantined"] == "1:1"
    assert row["honest_left_out"] == 1
    assert row["suspected_precision"] is None
    assert row["certified"] is None


def _of_rounds(
    quarantined: list[list[int]], malicious: list[int], asr: list[float] | None = None
) -> dict[str, Any]:
    """Make a result of rounds with these clients in quarantine, and this success."""
    rounds = [
        {"round": n, "neurons_reset": 0, "suspected": [], "quarantined": who, "bytes": {"up": 1}}
        | {"left_out": [1, 8] if n == 1 else []}
        | {"asr": (asr or [0.0] * len(quarantined))[n], "ba": 0.9 if n else 0.1}
        for n, who in enumerate(quarantined)
    ]
    return dict(matrix_report._NOTHING) | {"rounds": rounds, "truth": {"malicious": malicious}}


@pytest.mark.parametrize(
    ("asr", "out", "begin", "late"),
    [
        ([0.0] * 12, {}, None, 0),  # no effect, nobody late
        ([0.5, *[0.0] * 11], {}, None, 0),  # the initial model is nobody's doing
        ([0.0, 0.0, 0.2, *[0.0] * 9], {}, None, 0),  # one round is chance
        ([0.0, 0.0, 0.2, *[0.9] * 9], {}, 2, 2),
        ([0.0, 0.0, 0.2, *[0.9] * 9], {1: 7}, 2, 1),
        ([0.0, 0.0, 0.2, *[0.9] * 9], {1: 7, 2: 8}, 2, 1),
        ([0.0, 0.0, 0.2, *[0.9] * 9], {1: 1, 2: 7}, 2, 0),
        ([*[0.0] * 8, *[0.9] * 4], {}, 8, None),  # there is still time
        ([*[0.0] * 8, *[0.9] * 4], {1: 9, 2: 11}, 8, 0),
    ],
)
def test_an_attacker_is_late_five_rounds_after_the_attack_took_effect(
    asr: list[float], out: dict[int, int], begin: int | None, late: int | None
) -> None:
    quarantined = [[c for c, since in out.items() if n >= since] for n in range(12)]

    row = matrix_report.measured(_of_rounds(quarantined, malicious=[1, 2], asr=asr))

    assert (row["first_effective"], row["attackers_late"]) == (begin, late)


def test_a_model_that_calls_everything_the_target_is_no_effect_of_an_attack() -> None:
    result = _of_rounds([[], [], []], malicious=[1, 2], asr=[0.0, 1.0, 0.0])
    result["rounds"][1]["ba"] = 0.3

    assert matrix_report.measured(result)["first_effective"] is None


def test_nobody_is_late_where_nobody_attacks() -> None:
    row = matrix_report.measured(_of_rounds([[], [], []], malicious=[], asr=[0.0, 0.4, 0.4]))

    assert (row["first_effective"], row["attackers_late"]) == (None, 0)


def test_the_worst_rounds_are_compared_with_the_other_runs_worst(plan: Matrix) -> None:
    found = matrix_report.Findings(plan, plan.cells())
    point = next(p for p in found.points if (p.attack, p.defense) == ("t1", "none"))

    lost, more = (
        found.measure(point, name) for name in ("ba_worst_below_clean", "asr_worst_above_clean")
    )

    ours, clean = found.rows(point), found.rows(found.clean(point))
    for seed in (0, 1):
        expected = clean[seed]["ba_worst_last5"] - ours[seed]["ba_worst_last5"]
        assert lost[seed] == pytest.approx(expected)
        expected = ours[seed]["asr_worst_last5"] - clean[seed]["asr_worst_last5"]
        assert more[seed] == pytest.approx(expected)
        assert found.measure(point, "asr_worst_last5")[seed] == ours[seed]["asr_worst_last5"]


def test_rows_of_other_code_are_pointed_out(plan: Matrix) -> None:
    assert "versions of the code" not in written(plan)["results.md"]
    result = next(cell.folder for cell in plan.cells() if cell.folder.exists()) / "result.json"

    result.write_text(result.read_text().replace(sources.digest(), "000000000000"))

    files = written(plan)
    assert "(**by 2 versions of the code**" in files["results.md"]
    rows = list(csv.DictReader(files["results.csv"].splitlines()))
    assert {row["code"] for row in rows} == {sources.digest(), "000000000000", ""}


def test_benchmarks_are_shown_where_they_were_run(plan: Matrix) -> None:
    report = plan.file.report.model_copy(
        update={"benchmarks": ["bench/probes.json", "bench/b.json"]}
    )
    plan.file = plan.file.model_copy(update={"report": report})
    rows = [
        Row("10 x 4", {"s": 0.25, "ratio": None}),
        Row("defaults", {"s": 1.5, "ratio": 1.25}, (Bar("ratio", 1.25, 1.0),)),
    ]
    Outcome("probes", "How.", rows).write(Path("docs/bench/probes.json"))

    page = written(plan)["results.md"]

    assert "`python -m benchmarks probes`. How." in page
    assert table(page, "## Benchmark: probes") == [
        {"probes": "10 x 4", "s": "0.25", "ratio": "", "bar": ""},
        {"probes": "defaults", "s": "1.5", "ratio": "1.25", "bar": "ratio <= 1: **missed**"},
    ]
    assert page.index("## Benchmark: probes") < page.index("## Plots")
    assert "## Benchmark: b\n\nnot run: `python -m benchmarks b" in page
    missed = next(row for row in table(page, "## Missed") if row["run"].startswith("benchmark"))
    assert missed["run"] == "benchmark probes, defaults"
    assert (missed["wanted"], missed["mean (worst)"]) == ("ratio <= 1", "1.25")


def test_what_was_tried_is_told_where_it_is_missed(plan: Matrix) -> None:
    bars = [bar.model_copy(update={"tried": f"{bar.name}?"}) for bar in plan.file.bars]
    plan.file = plan.file.model_copy(update={"bars": bars})

    rows = table(written(plan)["results.md"], "## Missed")

    assert rows
    assert all(row["what was tried"].rstrip("?") in row["run"] for row in rows)


def test_whom_quarantine_met_is_told_over_all_runs(plan: Matrix, monkeypatch: Any) -> None:
    monkeypatch.setattr(matrix_report, "EFFECT", 0.01)  # so that some of the attacks take effect
    text = section(written(plan)["results.md"], "## What none decided")

    ours = {c.folder: c for c in plan.cells() if c.point.defense == "none" and c.folder.exists()}
    rows = [matrix_report.measured(results.load(folder)) for folder in ours]
    effective = [row for row in rows if row["first_effective"] is not None]
    assert f"In {len(rows)} runs 0 honest clients were ever quarantined, in 0 of the runs" in text
    assert effective
    assert f"In the {len(effective)} runs in which the attack took effect" in text


def test_what_is_missed_comes_first(plan: Matrix) -> None:
    page = written(plan)["results.md"]

    headings = [line for line in page.splitlines() if line.startswith("## ")]
    assert headings[0] == "## Missed"
    missed = table(page, "## Missed")
    assert [row["run"] for row in missed] == ["T1"]
    assert missed[0]["wanted"] == "ASR <= 1 %"
    assert missed[0]["missed by"] == "mean"
    summary = "3 of 5 bars are held, 1 of them on the seeds so far; 1 cannot be judged yet"
    assert summary in section(page, "## Missed")
    bars = {row["run"]: row for row in table(page, "## Bars")}
    assert {name: row["verdict"] for name, row in bars.items()} == {
        "no attacker": "held",
        "T1": "**missed**",
        "attack (t1)": "held",
        "attack (strong)": "held",
    }
    assert bars["attack (strong)"]["seeds"] == "1 of 2"
    assert "Not run yet: T1, two." in section(page, "## Bars")


def test_a_seed_that_misses_is_named(plan: Matrix) -> None:
    check = matrix_report.Check("asr_final", "max", 2.0, {0: 0.5, 4: 2.5})

    assert check.missed_by == "seed 4"
    assert check.text() == "1.50 (2.50)"
    assert matrix_report.Check("asr_final", "min", 2.0, {0: 0.5, 4: 2.5}).missed_by == "mean"
    assert matrix_report.Check("asr_final", "max", 2.5, {0: 0.5, 4: 2.5}).missed_by == ""


def test_the_tables_have_the_undefended_run_and_the_one_without_an_attacker_beside(
    plan: Matrix,
) -> None:
    page = written(plan)["results.md"]

    rows = {row["defence"]: row for row in table(page, "### mnist5k, iid, 4 malicious clients")}
    assert list(rows) == ["undefended", "none", "fedmedian", "multikrum"]
    assert list(rows["none"]) == ["defence", "no attacker", "t1", "t2", "strong"]
    assert rows["fedmedian"]["t1"] == rows["fedmedian"]["t2"] != "not run"
    assert rows["fedmedian"]["no attacker"] == "not run"
    assert rows["none"]["strong"].endswith("<br>n = 1 of 2")
    assert "Nothing is finished yet of: mnist5k, iid, 2 malicious clients.\n" in page

    cell = next(cell for cell in plan.cells() if cell.point.malicious == 2 and cell.seed == 1)
    invent(cell.folder, cell.experiment.identity(), 0.05, 0.001)
    page = written(plan)["results.md"]
    assert "Nothing is finished yet of" not in page
    two = {row["defence"]: row for row in table(page, "### mnist5k, iid, 2 malicious clients")}
    assert two["undefended"]["no attacker"] == rows["undefended"]["no attacker"]
    assert two["undefended"]["t1"] == "not run"
    assert two["none"]["t1"].endswith("n = 1 of 2")


def test_the_decisions_of_our_defence_are_told(plan: Matrix) -> None:
    rows = table(written(plan)["results.md"], "## What none decided")

    assert rows[0]["where"] == "mnist5k, iid, no attacker"
    assert rows[1]["filter: precision / recall"] == "88.0 (88.0) / 88.0 (88.0)"
    assert rows[1]["certified / supported / contested"] == (
        "75.0 (75.0) / 15.0 (15.0) / 10.0 (10.0)"
    )


def test_figures_are_drawn_of_what_was_run(plan: Matrix) -> None:
    page = written(plan)["results.md"]

    assert "(images/matrix-mnist5k-iid.png)" in page
    with Image.open("docs/images/matrix-mnist5k-iid.png") as image:
        assert min(image.size) > 200
        assert len(image.convert("RGB").getcolors(1_000_000)) > 20


def test_a_report_needs_no_run_and_one_about_nothing_is_refused(plan: Matrix, capsys: Any) -> None:
    command = ["matrix", "plan.toml", "--report-only", "--out", "results", "--docs", "pages"]

    assert main([*command, "--only", "*t1*"]) == 0
    assert "17 of 22" in Path("pages/results.md").read_text()
    shutil.rmtree("results")
    shutil.rmtree("pages")

    assert main(command) == 1
    assert "no cell is finished" in capsys.readouterr().err
    assert not Path("pages").exists()
