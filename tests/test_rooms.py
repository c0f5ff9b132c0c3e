"""The rooms of the project: who may import whom, and what no file may hold."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = (
    *("none_core", "tasks", "client", "server", "simulations", "deployment", "benchmarks"),
    "examples",
    "tests",
)
STANDARD = frozenset(sys.stdlib_module_names) | {"__future__"}
LIBRARY = frozenset({"torch", "numpy", "scipy", "jenkspy", "cryptography", "none_core"})

# What each room may import besides the standard library; None: anything.
# The longest prefix of a file's path decides.
ALLOWED: dict[str, frozenset[str] | None] = {
    "none_core/": LIBRARY,
    # Read by clients that add noise, and by nobody else: an extra.
    "none_core/accounting.py": LIBRARY | {"opacus"},
    "none_core/flower/": LIBRARY | {"flwr"},
    # Its users run it by pytest, which it asks for only in a test that is expected to fail.
    "none_core/flower/conformance.py": LIBRARY | {"flwr", "pytest"},
    "tasks/": None,
    "client/": None,
    "server/": None,
    "simulations/": None,
    "deployment/": None,
    # SuperNodes run it as a file, beside a bundle of the apps: it must not import the checkout's.
    "deployment/supernode.py": frozenset(),
    "benchmarks/": None,
    # What a user has who installed the library; the rest are the examples' own modules.
    "examples/": LIBRARY | {"flwr", "one_process", "scene", "client_fn"},
}
OUTER = frozenset({"simulations", "deployment", "benchmarks", "tests"})
# What each room may not import, by the top-level name.
FORBIDDEN: dict[str, frozenset[str]] = {
    "none_core/": OUTER | {"tasks", "client", "server"},
    "tasks/": OUTER | {"none_core", "flwr", "client", "server"},
    "client/": OUTER | {"server"},
    "server/": OUTER | {"client"},
    "simulations/": frozenset({"deployment", "tests"}),
    "deployment/": frozenset({"benchmarks", "tests"}),
    "benchmarks/": frozenset({"tests"}),
    "examples/": OUTER | {"tasks", "client", "server"},
    "tests/": frozenset(),
}
# The one import into none_core/flower from outside it: the public name of the conformance suite.
FACADES = frozenset({("none_core/conformance.py", "none_core.flower.conformance")})


def files(*suffixes: str) -> Iterator[Path]:
    """Files of the project, without what is built or measured."""
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*")):
            if path.is_file() and path.suffix in suffixes and "__pycache__" not in path.parts:
                yield path
    yield from (
        p
        for p in sorted(ROOT.iterdir())
        if p.is_file() and p.suffix in suffixes and p.name != ".git"  # a file in a worktree
    )


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


PYTHON = list(files(".py"))


def imported(source: str, path: str) -> set[str]:
    """Every module that a file imports, anywhere in it, with relative imports resolved."""
    package = path.split("/")[:-1]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module} if node.module else {f"{module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func)
            first = node.args[0]
            if called in ("__import__", "import_module", "importlib.import_module") and isinstance(
                first, ast.Constant
            ):
                found.add(str(first.value))
    return found


def complaints(source: str, path: str) -> list[str]:
    """Imports that the file at this path may not have."""
    found = []
    room = max((r for r in ALLOWED if path.startswith(r)), key=len, default="")
    allowed = ALLOWED.get(room)
    forbidden = {name for r, names in FORBIDDEN.items() if path.startswith(r) for name in names}
    core = path.startswith("none_core/") and not path.startswith("none_core/flower/")
    for module in sorted(imported(source, path)):
        top = module.split(".")[0]
        unknown = allowed is not None and top not in allowed | STANDARD
        inward = core and module.startswith("none_core.flower") and (path, module) not in FACADES
        if top in forbidden or unknown or inward:
            found.append(f"{path} imports {module}")
    return found


@pytest.mark.parametrize(
    ("path", "source", "wrong"),
    [
        ("none_core/a.py", "import os, torch, numpy as np\nfrom scipy import optimize", []),
        ("none_core/a.py", "import flwr", ["flwr"]),
        ("none_core/a.py", "import opacus.accountants", ["opacus.accountants"]),
        ("none_core/accounting.py", "def f():\n    import opacus.accountants", []),
        ("none_core/accounting.py", "import flwr", ["flwr"]),
        ("none_core/a.py", "def f():\n    from flwr.app import Message", ["flwr.app"]),
        ("none_core/a.py", "from none_core.flower import messages", ["none_core.flower"]),
        ("none_core/a.py", "from .flower import messages", ["none_core.flower"]),
        ("none_core/a.py", "import importlib\nimportlib.import_module('pandas')", ["pandas"]),
        ("none_core/detection/a.py", "from ..flower import x", ["none_core.flower"]),
        ("none_core/conformance.py", "from none_core.flower.conformance import D", []),
        ("none_core/conformance.py", "import none_core.flower.client", ["none_core.flower.client"]),
        ("none_core/conformance.py", "import flwr, pytest", ["flwr", "pytest"]),
        ("none_core/a.py", "import none_core.flower.conformance", ["none_core.flower.conformance"]),
        ("none_core/flower/conformance.py", "import pytest, flwr", []),
        ("none_core/flower/a.py", "import pytest", ["pytest"]),
        ("none_core/detection/a.py", "import sklearn.cluster", ["sklearn.cluster"]),
        ("none_core/flower/a.py", "import flwr.app\nimport none_core.flower.messages", []),
        ("none_core/flower/a.py", "import tasks.data", ["tasks.data"]),
        ("none_core/flower/a.py", "import simulations", ["simulations"]),
        ("tasks/a.py", "import pydantic, torchvision\nfrom tasks import data", []),
        ("tasks/a.py", "import flwr, none_core", ["flwr", "none_core"]),
        ("client/a.py", "import none_core, tasks, flwr, client.app", []),
        ("client/attacks/a.py", "from server.config import X", ["server.config"]),
        ("server/a.py", "import client", ["client"]),
        ("server/a.py", "import simulations.config", ["simulations.config"]),
        ("simulations/a.py", "import server, client, tasks, none_core, rich", []),
        ("simulations/a.py", "import tests.x", ["tests.x"]),
        ("examples/a.py", "import flwr.app, scene\nfrom none_core.loop import LoopDefence", []),
        ("examples/a.py", "import tasks.data, sklearn", ["sklearn", "tasks.data"]),
        ("simulations/a.py", "import deployment", ["deployment"]),
        ("deployment/a.py", "import simulations, cryptography, client.participant", []),
        ("deployment/supernode.py", "import os\nfrom deployment import x", ["deployment"]),
        ("tests/a.py", "import simulations, server, client, hypothesis", []),
    ],
)
def test_the_check_finds_what_it_should(path: str, source: str, wrong: list[str]) -> None:
    assert complaints(source, path) == [f"{path} imports {module}" for module in wrong]


def test_every_room_is_there() -> None:
    for room in ("none_core", "none_core/flower", "tasks", "client", "server", "simulations"):
        assert any(name_of(path).startswith(f"{room}/") for path in PYTHON), room
    assert len(PYTHON) > 40


def test_arrows_point_one_way() -> None:
    found = []
    for path in PYTHON:
        found += complaints(path.read_text(encoding="utf-8"), name_of(path))
    assert found == []


def test_every_module_says_what_it_is_for() -> None:
    silent = [
        name_of(path)
        for path in PYTHON
        if not ast.get_docstring(ast.parse(path.read_text("utf-8")))
    ]
    assert silent == []


# --- what no file may hold ------------------------------------------------------------------------

# Written so that this file does not hold them either.
MACHINE_PATH = re.compile(r"(?<![\w.~$}/])/(?:root|work|home/\w+|tmp/\w|Users/\w+|opt/\w+)(?:/|\b)")
REGISTRY = re.compile(
    r"(?:pypi|pythonhosted|npmjs|anaconda|conda-forge|artifactory|nexus|jfrog)[\w.-]*\.(?:org|com|io|net)",
    re.IGNORECASE,
)
TEXTS = (".py", ".toml", ".md", ".txt", ".yml", ".yaml", ".html", ".cff", ".json", ".cfg", "")


def offences(text: str) -> list[str]:
    return [m.group() for pattern in (MACHINE_PATH, REGISTRY) for m in pattern.finditer(text)]


def test_the_check_of_texts_finds_what_it_should() -> None:
    for bad in (
        "/" + "root/.cache",
        "see /" + "work/main/x.py",
        '"/' + "tmp/w/venv",
        "cd /" + "home/me",
        "https://" + "pypi" + ".org/simple",
        "files." + "pythonhosted" + ".org",
        "--index-url https://" + "artifactory.example" + ".com/x",
    ):
        assert offences(bad), bad
    for good in (
        "$HOME/" + "root",
        "a/" + "work/b",
        "https://example.org/" + "home/x",
        "/data",
        "pip install x",
    ):
        assert not offences(good), good


def test_no_file_names_this_machine_or_a_registry() -> None:
    found = []
    for path in files(*TEXTS):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            found += [f"{name_of(path)}:{number}: {offence}" for offence in offences(line)]
    assert found == []
