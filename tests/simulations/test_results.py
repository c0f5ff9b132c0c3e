"""How a run becomes a result, and how it is written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from simulations import results, tables
from tests.simulations.synthetic import entry

TRUTH = {"malicious": [2, 0], "poisoned": 50}


def test_the_worst_case_is_taken_over_the_last_five_rounds() -> None:
    asr = [0.99, 0.98, 0.1, 0.3, 0.2, 0.1, 0.1]
    ba = [0.10, 0.20, 0.9, 0.9, 0.7, 0.9, 0.95]
    rounds = [entry(n, ba=b, asr=asr[n], recovered=b / 2) for n, b in enumerate(ba)]

    result = results.assemble({}, {"rounds": rounds, "truth": TRUTH})

    assert result["worst_last5"] == {"ba": 0.7, "asr": 0.3, "recovered": 0.35}
    assert result["final"] == {"ba": 0.95, "asr": 0.1, "recovered": 0.475}
    assert result["rounds"] == rounds
    assert "seconds" not in json.dumps(result)
    assert {"python", "torch", "flwr"} <= set(result["versions"])


def test_the_initial_model_is_no_round_of_a_short_run() -> None:
    rounds = [entry(0, ba=0.1), entry(1, ba=0.8), entry(2, ba=0.9)]

    assert results.assemble({}, {"rounds": rounds, "truth": TRUTH})["worst_last5"]["ba"] == 0.8


def test_the_filter_is_judged_over_all_rounds() -> None:
    dropped = [(0, 0), (30, 24), (10, 6)]
    rounds = [
        entry(n, filtered={"dropped": all_, "poisoned": hits})
        for n, (all_, hits) in enumerate(dropped)
    ]

    judged = results.filtered(rounds, poisoned=50)

    assert judged == {"dropped": 40, "poisoned": 30, "precision": 0.75, "recall": 0.6}


def test_a_filter_with_nothing_to_judge_has_no_scores() -> None:
    assert results.filtered([entry(0)], poisoned=0) == {
        "dropped": 0,
        "poisoned": 0,
        "precision": None,
        "recall": None,
    }


def test_suspects_are_those_of_any_round() -> None:
    rounds = [entry(0), entry(1, suspected=[3, 2]), entry(2, suspected=[0])]

    assert results.suspects({"rounds": rounds, "truth": TRUTH}) == ([0, 2, 3], [0, 2])


def test_who_was_left_out_in_any_round_was_left_out() -> None:
    rounds = [entry(0, quarantined=[]), entry(1, quarantined=[5, 2]), entry(2, quarantined=[1])]

    assert results.left_out({"rounds": rounds, "truth": TRUTH}) == [1, 2, 5]


@pytest.mark.parametrize(
    ("partitions", "text"), [([], "-"), ([4], "4"), ([0, 1, 2, 3, 7], "0-3, 7"), ([1, 3], "1, 3")]
)
def test_clients_are_written_as_ranges(partitions: list[int], text: str) -> None:
    assert tables.clients(partitions) == text


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch) -> None:
    path = results.write_text(tmp_path / "a.json", "old")
    assert results.write_text(path, "new").read_text() == "new"

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        results.write_text(path, "half")

    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_result_is_read_with_its_timing(tmp_path: Path) -> None:
    results.write(tmp_path, {"final": {}})
    with pytest.raises(results.ResultError, match=r"cannot read .*timing.json: No such file"):
        results.load(tmp_path)
    results.write(tmp_path, {"seconds": 1.5, "rounds": []}, results.TIMING)

    loaded = results.load(tmp_path)

    assert loaded == {"final": {}, "timing": {"seconds": 1.5, "rounds": []}}


def test_a_folder_without_a_result_is_named(tmp_path: Path) -> None:
    with pytest.raises(results.ResultError, match=r"cannot read .*result.json: No such file"):
        results.read(tmp_path)
    (tmp_path / "result.json").write_text(json.dumps({})[:1])
    with pytest.raises(results.ResultError, match=r"result.json is not valid JSON"):
        results.read(tmp_path)
