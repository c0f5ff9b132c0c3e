"""Runs in parallel: what is finished stays, what fails is told, and nothing is left behind."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from simulations import config, identity, pool
from tests.simulations import pooled

QUIET = Console(quiet=True)
ROOT = Path(__file__).parents[2]


def experiment(out: Path, seed: int, rounds: int = 1) -> config.Experiment:
    document = {
        "experiment": {"name": "toy", "seed": seed, "rounds": rounds},
        "run": {"workers": 1, "checkpoints": False},
    }
    what = identity.folder(config.build(document).identity())
    document["run"]["output"] = str(out / what)
    return config.build(document)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def test_each_run_gets_its_folder_and_is_not_run_again(tmp_path: Path) -> None:
    runs = [experiment(tmp_path, seed) for seed in (0, 1)]
    log = io.StringIO()

    assert pool.run([*runs, runs[0]], tmp_path, Console(file=log), 2, pooled.write) == {}

    assert names(tmp_path) == sorted(Path(run.run.output).name for run in runs)
    for run in runs:
        folder = Path(run.run.output)
        assert json.loads((folder / "result.json").read_text())["seed"] == run.experiment.seed
        assert names(folder) == ["result.json", "timing.json"]
    assert "0 of 2 runs are finished; about " in log.getvalue()
    assert "2/2  toy  BA  90.0%  ASR  10.0%" in log.getvalue()
    before = [(Path(run.run.output) / "result.json").stat().st_mtime_ns for run in runs]
    assert pool.run(runs, tmp_path, QUIET, 2, pooled.fail_on_seed_1) == {}
    assert before == [(Path(run.run.output) / "result.json").stat().st_mtime_ns for run in runs]


def test_one_that_fails_is_told_its_log_is_kept_and_the_others_go_on(tmp_path: Path) -> None:
    runs = [experiment(tmp_path, seed) for seed in (1, 2, 0)]
    broken, killed, good = (Path(run.run.output) for run in runs)

    failures = pool.run(runs, tmp_path, QUIET, 1, pooled.fail_on_seed_1)

    assert failures == {
        broken.name: "ValueError: the data are gone",
        killed.name: "ended by signal 9",
    }
    assert names(tmp_path) == sorted(["failed", good.name])
    log = (tmp_path / "failed" / broken.name / "cell.log").read_text()
    assert log.startswith("trying\nTraceback")
    assert pool.failed(broken)
    assert pool.run(runs, tmp_path, QUIET, 1, pooled.write) == {}
    assert pool.finished(broken)
    assert not pool.failed(broken)


def test_a_folder_without_a_result_is_run_and_others_are_left_alone(tmp_path: Path) -> None:
    run, older = experiment(tmp_path, 0), tmp_path / "older-12345678"
    for folder in (Path(run.run.output), older):
        folder.mkdir()
        (folder / "notes.txt").write_text("mine")

    pool.run([run], tmp_path, QUIET, 1, pooled.write)

    assert names(Path(run.run.output)) == ["result.json", "timing.json"]
    assert names(older) == ["notes.txt"]


def test_only_one_at_a_time_works_in_a_folder(tmp_path: Path) -> None:
    with pool._alone(tmp_path), pytest.raises(pool.BusyError, match="another process runs"):
        pool.run([experiment(tmp_path, 0)], tmp_path, QUIET, 1, pooled.write)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_at_any_moment_what_is_finished_stays_and_nothing_runs_on(
    tmp_path: Path, how: signal.Signals
) -> None:
    code = (
        "import signal\nfrom pathlib import Path\nfrom tests.simulations import pooled, test_pool\n"
        "if __name__ == '__main__':\n"
        # A shell has what it starts in the background ignore it, and so would this.
        "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"    out = Path({str(tmp_path)!r})\n"
        "    runs = [test_pool.experiment(out, seed) for seed in (0, 1)]\n"
        "    test_pool.pool.run(runs, out, test_pool.QUIET, 1, pooled.hang_on_seed_1)\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, str(script)], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL
    )
    pid = int(eventually(lambda: [p.read_text() for p in tmp_path.glob(".running-*/pid")])[0])

    process.send_signal(how)
    process.wait(120)

    first, second = (Path(experiment(tmp_path, seed).run.output) for seed in (0, 1))
    assert eventually(lambda: not Path(f"/proc/{pid}").exists())
    assert pool.finished(first)
    assert not second.exists()
    if how != signal.SIGKILL:
        assert list(tmp_path.glob(".running-*")) == []
    assert pool.run([experiment(tmp_path, 1)], tmp_path, QUIET, 1, pooled.write) == {}
    assert list(tmp_path.glob(".running-*")) == []


def eventually(look):
    """Look again and again until something is there."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if found := look():
            return found
        time.sleep(0.1)
    raise AssertionError("it did not happen within a minute")


def test_the_longest_runs_first_and_equals_keep_their_order(tmp_path: Path, monkeypatch) -> None:
    started = []
    monkeypatch.setattr(
        pool._Pool, "run", lambda self, queue, display: started.extend(queue) or queue.clear()
    )
    runs = [experiment(tmp_path, seed, rounds) for seed, rounds in ((0, 1), (1, 1), (2, 9))]

    pool.run(runs, tmp_path, QUIET, 1)

    assert [run.experiment.seed for run in started] == [2, 0, 1]
