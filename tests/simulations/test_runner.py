"""A run from the command line to its files, with apps that only pretend to train."""

from __future__ import annotations

import html.parser
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from flwr.supercore import log
from PIL import Image

from simulations import plots
from simulations.__main__ import EXPERIMENTS, main
from tests.simulations.synthetic import leave_behind

SMALL = '[experiment]\nname = "small"\nrounds = 3\n[attack]\nname = "dba"\n'


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


def test_a_run_leaves_a_result_figures_and_a_report(file: Path, apps: Any, capsys: Any) -> None:
    assert main(["run", str(file)]) == 0

    out = file.parent / "results" / "small"
    printed = capsys.readouterr()
    assert "90.00 / 50.00 / 40.00" in printed.out
    for name in ("result.json", "report.html", "plots/evidence.png", "run.log"):
        assert str(out / name) in printed.out
    assert "round 3/3  BA  90.0%  ASR  50.0%  4 reset" in printed.err
    result = json.loads((out / "result.json").read_text())
    assert result["configuration"]["attack"]["name"] == "dba"
    assert result["final"] == {"ba": 0.9, "asr": 0.5, "recovered": 0.4}
    assert str(file.parent) not in (out / "result.json").read_text()
    for name in ("accuracy", "evidence", "activations", "trigger"):
        with Image.open(out / "plots" / f"{name}.png") as image:
            assert min(image.size) > 200
            assert len(image.convert("RGB").getcolors(1_000_000)) > 20


def test_a_run_without_evidence_shows_the_neurons_that_the_trigger_shifts(
    file: Path, apps: Any
) -> None:
    arguments = ["run", str(file), "--quiet", "--set", 'defense.name="undefended"']

    assert main([*arguments, "--out", "elsewhere"]) == 0

    drawn = {path.name for path in (file.parent / "elsewhere" / "plots").iterdir()}
    assert drawn == {"accuracy.png", "activations.png", "trigger.png"}


def test_figures_show_the_network_with_the_activation_that_was_trained(
    file: Path, apps: Any
) -> None:
    assert main(["run", str(file), "--quiet", "--set", 'task.activation="prelu"']) == 0

    assert (file.parent / "results" / "small" / "plots" / "activations.png").exists()


def test_quiet_shows_no_progress_and_nothing_of_an_earlier_run_is_kept(
    file: Path, apps: Any, no_figures: None, capsys: Any
) -> None:
    out = file.parent / "out"
    main(["run", str(file), "--out", str(out), "--quiet"])
    assert capsys.readouterr().err == ""
    (out / "notes.txt").write_text("mine")
    (out / "plots").mkdir()
    (out / "plots" / "evidence.png").write_bytes(b"old")

    main(["run", str(file), "--out", str(out), "--quiet", "--set", 'defense.name="undefended"'])

    assert not (out / "evidence.npz").exists()
    assert not (out / "plots" / "evidence.png").exists()
    assert (out / "notes.txt").read_text() == "mine"


def test_logs_go_to_the_file_and_errors_to_the_terminal_too(
    file: Path, apps: Any, no_figures: None, capsys: Any
) -> None:
    def talk(output: Path, run_config: dict[str, Any]) -> None:
        log(logging.INFO, "all is well")
        log(logging.ERROR, "client of partition 1: it broke\nTraceback")
        leave_behind(output, run_config)

    apps["main"] = talk
    handlers = logging.getLogger("flwr").handlers

    assert main(["run", str(file)]) == 0

    printed = capsys.readouterr()
    logged = (file.parent / "results" / "small" / "run.log").read_text()
    assert "INFO flwr: all is well" in logged
    assert "Traceback" in logged
    assert "all is well" not in printed.out + printed.err
    assert "error client of partition 1: it broke\n" in printed.err
    assert "Traceback" not in printed.err
    assert logging.getLogger("flwr").handlers is handlers


def test_an_app_that_fails_ends_with_1_the_reason_and_the_log(
    file: Path, apps: Any, capsys: Any
) -> None:
    def fail(output: Path, run_config: dict[str, Any]) -> None:
        raise ValueError("the data are gone")

    apps["main"] = fail

    assert main(["run", str(file)]) == 1

    log_file = file.parent / "results" / "small" / "run.log"
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == f"error: ValueError: the data are gone (log: {log_file})"
    assert "Traceback" in log_file.read_text()
    assert not log_file.with_name("result.json").exists()


def test_an_app_that_leaves_no_history_fails(file: Path, apps: Any, capsys: Any) -> None:
    apps["main"] = lambda output, run_config: None

    assert main(["run", str(file)]) == 1
    assert "history.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong", [["--set", "attack.scale=0"], ["--set", "attack.name=dba"], ["--set", "x"]]
)
def test_a_wrong_configuration_ends_with_2_and_makes_nothing(
    file: Path, apps: Any, capsys: Any, wrong: list[str]
) -> None:
    apps["main"] = None

    assert main(["run", str(file), *wrong]) == 2

    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert list(file.parent.iterdir()) == [file]


def test_a_folder_that_cannot_be_written_to_ends_with_2_before_anything_starts(
    file: Path, apps: Any, capsys: Any
) -> None:
    apps["main"] = None

    assert main(["run", str(file), "--out", str(file / "inside a file")]) == 2
    assert capsys.readouterr().err.startswith(f"error: cannot write to {file}")


def test_a_disk_that_is_too_full_ends_with_2_before_anything_starts(
    file: Path, apps: Any, capsys: Any
) -> None:
    apps["main"] = None

    assert main(["run", str(file), "--set", "experiment.rounds=1000000000"]) == 2
    assert "MB left, but the checkpoints of 1000000000 rounds need" in capsys.readouterr().err


RESUME = ["--quiet", "--set", "experiment.resume=true"]


def test_what_a_stopped_run_has_left_is_there_when_it_is_resumed(
    file: Path, apps: Any, no_figures: None
) -> None:
    output, seen = file.parent / "results" / "small", []

    def stopped(output: Path, run_config: dict[str, Any]) -> None:
        seen.append(sorted(path.name for path in output.iterdir()))
        (output / "resume.npz").write_text("what is done")
        (output / "nodes" / "0.state").touch()
        if len(seen) < 3:
            raise ValueError("killed")
        leave_behind(output, run_config)

    apps["main"] = stopped
    assert main(["run", str(file), *RESUME]) == 1
    (output / "run.log").write_text("what was logged\n")
    assert main(["run", str(file), *RESUME]) == 1
    assert "what was logged" in (output / "run.log").read_text()
    assert main(["run", str(file), *RESUME]) == 0
    assert seen == [["nodes", "run.log"], *[["nodes", "resume.npz", "run.log"]] * 2]
    assert not (output / "resume.npz").exists()  # it is finished
    assert not (output / "nodes").exists()
    assert "resume" not in json.loads((output / "result.json").read_text())["configuration"]


def test_without_resume_a_stopped_run_begins_anew(file: Path, apps: Any, no_figures: None) -> None:
    output = file.parent / "results" / "small"
    (output / "nodes").mkdir(parents=True)
    (output / "resume.npz").touch()
    seen: list[list[str]] = []

    def look(output: Path, run_config: dict[str, Any]) -> None:
        seen.append(sorted(path.name for path in output.rglob("*")))
        leave_behind(output, run_config)

    apps["main"] = look
    assert main(["run", str(file), "--quiet"]) == 0
    assert seen == [["nodes", "run.log"]]


def test_a_finished_run_is_not_run_again_by_resume(
    file: Path, apps: Any, no_figures: None, capsys: Any
) -> None:
    assert main(["run", str(file), *RESUME]) == 0
    before = (file.parent / "results" / "small" / "result.json").read_bytes()
    apps["main"] = None
    assert main(["run", str(file), *RESUME]) == 0
    assert (file.parent / "results" / "small" / "result.json").read_bytes() == before
    assert main(["run", str(file), *RESUME, "--set", "experiment.seed=1"]) == 2
    assert "holds another experiment, which is finished" in capsys.readouterr().err


def test_the_program_itself_returns_the_status(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "simulations", "run", str(tmp_path / "none.toml")]

    done = subprocess.run(command, cwd=EXPERIMENTS.parents[1], capture_output=True, text=True)

    assert done.returncode == 2
    assert (
        done.stderr == f"error: cannot read {tmp_path / 'none.toml'}: No such file or directory\n"
    )


def test_the_list_shows_each_experiment_with_its_first_comment(capsys: Any) -> None:
    assert main(["list"]) == 0

    printed = capsys.readouterr().out
    for experiment in EXPERIMENTS.glob("*.toml"):
        assert experiment.name in printed
        assert experiment.read_text().splitlines()[0].removeprefix("# ") in printed


def test_pages_are_self_contained_and_escaped(
    file: Path, apps: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["run", str(file), "--quiet", "--out", "defended"])
    monkeypatch.setattr(plots, "draw", lambda *_: [])
    main(["run", str(file), "--quiet", "--out", "plain", "--set", 'defense.name="undefended"'])

    assert main(["compare", "plain", "defended", "--out", "both"]) == 0

    report = (file.parent / "defended" / "report.html").read_text()
    compared = (file.parent / "both" / "compare.html").read_text()
    assert "&lt;b&gt;reset&lt;/b&gt; 4" in report
    assert "defense.name" in compared
    assert "attack.name" not in compared  # the same in both runs
    for page, images in ((report, 4), (compared, 1)):
        links = Links()
        links.feed(page)
        assert len(links.found) == images
        assert all(link.startswith("data:image/png;base64,") for link in links.found)
        assert "url(" not in page
        assert "@import" not in page
        assert "<script" not in page


def test_a_comparison_holds_all_runs_in_order(
    file: Path, apps: Any, no_figures: None, capsys: Any
) -> None:
    for parent in ("a", "b"):
        main(["run", str(file), "--quiet", "--out", f"{parent}/run"])

    assert main(["compare", "b/run", "a/run", "--out", "both"]) == 0

    lines = (file.parent / "both" / "compare.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["run", "b/run", "a/run"]
    assert (file.parent / "both" / "compare.png").stat().st_size > 10_000
    assert "b/run" in capsys.readouterr().out


def test_a_comparison_with_a_folder_that_holds_no_run_ends_with_2(file: Path, capsys: Any) -> None:
    assert main(["compare", "nowhere"]) == 2
    assert "nowhere/result.json: No such file" in capsys.readouterr().err


def test_a_result_repeats_bit_for_bit_whatever_the_number_of_workers(file: Path) -> None:
    short = ["--set", "experiment.rounds=1", "--set", "experiment.clients=5"]
    command = ["run", str(file), "--quiet", "--set", "train.local_epochs=1", *short]

    for workers in (1, 3):
        out = ["--set", f"run.workers={workers}", "--out", f"with-{workers}"]
        assert main([*command, *out, "--set", f"run.checkpoints={str(workers == 1).lower()}"]) == 0

    one, three = file.parent / "with-1", file.parent / "with-3"
    assert (one / "result.json").read_bytes() == (three / "result.json").read_bytes()
    assert "seconds" not in (one / "result.json").read_text()
    assert json.loads((one / "timing.json").read_text())["seconds"] > 0
    assert (one / "checkpoints" / "round-0001.pt").exists()
    assert not (three / "checkpoints").exists()


class Links(html.parser.HTMLParser):
    """Collects what a page loads or points to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
