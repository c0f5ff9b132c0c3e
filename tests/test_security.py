"""What no file may do: run code that came from outside, or go where a stranger points."""

from __future__ import annotations

import ast
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from none_core.flower import messages
from server.grid import MeteredGrid
from server.record import Folder
from tests.test_rooms import ROOMS, ROOT, name_of

# Formats that run code when they are read, and ways to run text.
MODULES = frozenset(
    {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml"}
)
CALLS = frozenset({"eval", "exec", "compile", "__import__", "os.system", "os.popen"})
# What has to be said in so many words where these are called.
SAFE = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}
# Arrays of torchvision's CIFAR-10, by an unpickler that knows nothing else.
EXCEPTIONS = frozenset({"tasks/data/cifar10.py imports pickle"})

SOURCES = [
    path
    for room in ROOMS
    if room != "tests"
    for path in sorted((ROOT / room).rglob("*.py"))
    if "__pycache__" not in path.parts
]


def dangers(source: str, path: str) -> Iterator[str]:
    """What a file does that it must not."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in MODULES:
                    yield f"{path} imports {alias.name}"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            if {alias.name for alias in node.names} != {"UnpicklingError"}:  # to be caught
                yield f"{path} imports {node.module}"
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func).replace("numpy.", "np.")
            said = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
            if called in CALLS:
                yield f"{path} calls {called}"
            if called in SAFE and said.get(SAFE[called][0]) is not SAFE[called][1]:
                yield f"{path} calls {called} without {SAFE[called][0]}={SAFE[called][1]}"
            if said.get("shell") is True:
                yield f"{path} starts a shell"


@pytest.mark.parametrize(
    ("source", "danger"),
    [
        ("import pickle", "imports pickle"),
        ("def f():\n    from yaml import load", "imports yaml"),
        ("from pickle import UnpicklingError, loads", "imports pickle"),
        ("import torch\ntorch.load(x)", "calls torch.load without weights_only=True"),
        ("torch.load(x, weights_only=False)", "calls torch.load without weights_only=True"),
        ("np.load(x)", "calls np.load without allow_pickle=False"),
        ("numpy.load(x, allow_pickle=True)", "calls np.load without allow_pickle=False"),
        ("eval(x)", "calls eval"),
        ("import os\nos.system(x)", "calls os.system"),
        ("subprocess.run(x, shell=True)", "starts a shell"),
    ],
)
def test_the_check_finds_what_it_should(source: str, danger: str) -> None:
    assert list(dangers(source, "a.py")) == [f"a.py {danger}"]


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(x, weights_only=True)",
        "from pickle import UnpicklingError",
        "np.load(x, allow_pickle=False)",
        "model.eval()",
        "re.compile(x)",
        "json.loads(x)",
        "tomllib.load(x)",
    ],
)
def test_the_check_leaves_alone_what_it_should(source: str) -> None:
    assert not list(dangers(source, "a.py"))


def test_no_file_runs_what_it_reads() -> None:
    assert len(SOURCES) > 80
    found = {
        danger for path in SOURCES for danger in dangers(path.read_text("utf-8"), name_of(path))
    }
    assert found == EXCEPTIONS


def test_flower_reads_no_pickles_in_arrays_either() -> None:
    """Validated replies reach strategies as Flower's arrays: theirs is the reading that counts."""
    ran: list[str] = []

    class Hostile:
        def __reduce__(self) -> Any:
            return ran.append, ("ran",)

    buffer = io.BytesIO()
    np.save(buffer, np.array([Hostile()], dtype=object), allow_pickle=True)
    for data in (buffer.getvalue(), pickle.dumps(Hostile())):
        with pytest.raises(ValueError, match="pickle"):
            Array("object", (1,), "numpy.ndarray", data).numpy()
    assert ran == []


def test_nothing_that_a_client_says_names_a_file(tmp_path: Path) -> None:
    """All that the server writes is named by itself, whatever is in a reply."""
    evil = "../../evil"
    truth = {"partition-id": 3, "poisoned": 1, "dropped": 0, "dropped-poisoned": 0, evil: 1}
    content = RecordDict(
        {
            evil: ArrayRecord({evil: Array(np.zeros(1))}),
            "/evil": MetricRecord({evil: 1.0}),
            "truth": ConfigRecord(truth),
            messages.DECLINED: ConfigRecord({"reason": evil}),
            messages.PRIVACY: ConfigRecord({"withheld": [evil], "epsilon": evil}),
        }
    )
    message = Message.__new__(Message)
    message.__dict__.update({"_content": content, "_error": None})
    message.__dict__["_metadata"] = type("M", (), {"src_node_id": 7})()
    grid = MeteredGrid.__new__(MeteredGrid)
    grid.partition_of, grid.truth, grid.privacy = {}, {}, {}
    grid._learn(message)
    folder = Folder(tmp_path / "a" / "b" / "out")
    folder.history([{"round": 1, "said": evil}], grid.truth, grid.privacy)
    folder.progress({"decision": evil})

    assert grid.privacy == {7: {"declined": 1}}
    assert folder.unwritten == {}
    written = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert written == {"a/b/out/history.json", "a/b/out/progress.jsonl"}


# --- the step of CI that looks up known vulnerabilities -------------------------------------------


AUDIT = ROOT / ".ci" / "audit.py"


@pytest.mark.parametrize(
    ("answer", "said", "code"),
    [
        ("raise SystemExit('ConnectionError: no network')", "skipped: ConnectionError: no net", 0),
        ("print('{\"dependencies\": []}')", "skipped: none of 0 packages", 0),
        (
            'print(\'{"dependencies": [{"name": "a", "skip_reason": "not found"}]}\')',
            "skipped: none of 1 packages could be looked up",
            0,
        ),
        (
            'print(\'{"dependencies": [{"name": "a", "version": "1", "vulns": []}]}\')',
            "1 of 1 packages looked up, 0 found",
            0,
        ),
        (
            'print(\'{"dependencies": [{"name": "a", "version": "1", "vulns": '
            '[{"id": "X-1", "aliases": [], "fix_versions": ["2"]}]}]}\')',
            "a 1: X-1, fixed in 2",
            1,
        ),
    ],
)
def test_the_audit_fails_for_what_it_finds_and_for_no_other_reason(
    tmp_path: Path, answer: str, said: str, code: int
) -> None:
    (tmp_path / "pip_audit.py").write_text(answer)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, str(AUDIT), "constraints.txt"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert said in result.stdout
    assert result.returncode == code
