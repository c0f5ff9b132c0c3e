"""Who is better than our defence, and by what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from simulations.matrix import Matrix
from simulations.matrix_peers import beaten
from simulations.matrix_report import Findings

TEXT = """
seeds = [0, 1]
malicious = [4]
[tasks.mnist5k]
[partitions.iid]
[reporters.honest]
[attacks.none]
attack.name = "none"
[attacks.t2]
attack = { name = "dba", obeys_filter = false }
[defenses.undefended]
defense.name = "undefended"
[defenses.NONE]
defense.name = "none-strategy"
[defenses.fedmedian]
defense.name = "fedmedian"
[defenses.multikrum]
defense = { name = "multikrum", f = 3 }
[[cells]]
attacks = ["none", "t2"]
defenses = "all"
[peers]
defense = "NONE"
others = ["fedmedian", "multikrum"]
"""
Scores = dict[str, dict[int, tuple[float, float]]]  # defence -> seed -> ASR, BA of the last round
BAD = {0: (90.0, 97.0), 1: (90.0, 97.0)}


@pytest.fixture
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    path = tmp_path / "plan.toml"
    path.write_text(TEXT)
    plan = Matrix(path, tmp_path / "out")

    def judge(scores: Scores, worst: Scores | None = None) -> Any:
        def rows(self: Findings, point: Any) -> dict[int, dict[str, float]]:
            last, five = (each.get(point.defense, {}) for each in (scores, worst or scores))
            return {
                seed: {"asr_final": asr, "ba_final": ba}
                | {"asr_worst_last5": five[seed][0], "ba_worst_last5": five[seed][1]}
                for seed, (asr, ba) in last.items()
            }

        monkeypatch.setattr(Findings, "rows", rows)
        assert plan.file.peers is not None
        return beaten(Findings(plan, plan.cells()), plan.file.peers)

    return judge


@pytest.mark.parametrize(
    ("ours", "peer", "reason"),
    [
        ((0.0, 97.0), (5.0, 95.0), None),
        ((0.4, 97.0), (0.0, 97.0), None),
        ((0.6, 97.0), (0.0, 97.0), "ASR"),
        ((0.0, 96.6), (1.0, 97.0), None),
        ((0.0, 96.4), (1.0, 97.0), "BA"),
    ],
)
def test_no_peer_may_have_a_lower_asr_or_with_the_lowest_a_higher_ba(
    judge: Any, ours: Any, peer: Any, reason: str | None
) -> None:
    rows, judged, unknown = judge(
        {"undefended": BAD, "NONE": {0: ours}, "multikrum": {0: peer}, "fedmedian": BAD}
    )

    assert (judged, unknown) == (1, 0)
    assert [row["better by"] for row in rows] == ([f"{reason}, last round"] if reason else [])
    if rows:
        assert rows[0]["best peer"] == "multikrum"
        assert rows[0]["where"] == "mnist5k, iid, t2, 4 malicious clients"
        assert rows[0]["peers run"] == "2 of 2"


def test_a_peer_that_pays_for_its_asr_does_not_hide_a_better_one(judge: Any) -> None:
    peers = {"multikrum": {0: (0.4, 94.0)}, "fedmedian": {0: (0.8, 97.0)}}

    rows, _, _ = judge({"undefended": BAD, "NONE": {0: (0.7, 96.0)}, **peers})

    assert [(row["best peer"], row["better by"]) for row in rows] == [
        ("fedmedian", "BA, last round")
    ]


def test_only_seeds_that_both_were_run_with_are_compared(judge: Any) -> None:
    ours = {0: (0.5, 97.0), 1: (30.0, 97.0)}
    peers = {"multikrum": {0: (0.5, 97.0)}, "fedmedian": BAD}

    assert judge({"undefended": BAD, "NONE": ours, **peers}) == ([], 1, 0)


def test_the_worst_of_the_last_rounds_counts_too(judge: Any) -> None:
    last = {"undefended": BAD, "NONE": {0: (0.5, 97.0)}, "fedmedian": BAD}
    last["multikrum"] = {0: (0.5, 97.0)}

    rows, _, _ = judge(last, last | {"NONE": {0: (3.0, 96.0)}})

    assert [row["better by"] for row in rows] == ["ASR, worst of the last 5"]
    assert rows[0]["NONE: BA / ASR"] == "96.00 / 3.00"


@pytest.mark.parametrize(
    ("scores", "judged", "unknown"),
    [
        ({"NONE": {0: (0.0, 97.0)}}, 0, 1),
        ({"NONE": {0: (0.0, 97.0)}, "undefended": BAD, "multikrum": BAD}, 0, 1),
        ({"NONE": {0: (9.0, 97.0)}, "undefended": BAD, "multikrum": {0: (0.0, 97.0)}}, 1, 0),
        ({"NONE": {0: (0.0, 97.0)}, "undefended": {0: (30.0, 97.0)}}, 0, 0),
    ],
)
def test_a_place_is_judged_when_all_peers_have_been_run_or_one_is_better(
    judge: Any, scores: Any, judged: int, unknown: int
) -> None:
    rows, places, open_ = judge(scores)

    assert (places, open_, len(rows)) == (judged, unknown, judged)
