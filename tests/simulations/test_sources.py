"""The digest of the code that made a result."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from simulations import results
from simulations.sources import CENTRAL, FEDERATED, digest, reached

FILES = {
    "server/app.py": '"""Starts."""\nfrom none_core import a\nimport tasks.data\n',
    "none_core/__init__.py": "",
    "none_core/a.py": 'def f(x):\n    """Add."""\n    from none_core.b import y\n    return x+y\n',
    "none_core/b.py": "y = 1\n",
    "none_core/unused.py": "z = 1\n",
    "tasks/__init__.py": "",
    "tasks/data/__init__.py": "n = 4\n",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "text", "same"),
    [
        (
            "none_core/a.py",
            "def f(x):  # adds\n    from none_core.b import y\n    return (x + y)\n",
            True,
        ),
        ("none_core/a.py", FILES["none_core/a.py"].replace("+", "-"), False),
        ("none_core/b.py", "y = 2\n", False),  # imported within a function
        ("none_core/__init__.py", "import math\n", False),
        ("tasks/data/__init__.py", "n = 5\n", False),
        ("none_core/unused.py", "z = 2\n", True),
        ("server/app.py", FILES["server/app.py"].replace("Starts", "Begins"), True),
    ],
)
def test_it_changes_with_what_is_computed(root: Path, name: str, text: str, same: bool) -> None:
    before = digest(("server/app.py",), root)

    (root / name).write_text(text)
    digest.cache_clear()
    after = digest(("server/app.py",), root)
    digest.cache_clear()

    assert (before == after) is same


def test_a_run_reaches_what_it_uses_and_not_the_other_kind_of_runs() -> None:
    federated, central = (reached(entries).keys() for entries in (FEDERATED, CENTRAL))

    assert {"none_core/attribution.py", "client/attacks/dba.py", "tasks/metrics.py"} <= federated
    assert {"server/peers/flame.py", "client/attacks/reporters/hide.py"} <= federated
    assert {"none_core/cleansing.py", "simulations/central/methods.py"} <= central
    assert not {"none_core/cleansing.py", "none_core/training.py"} & federated
    assert not {"server/app.py", "client/app.py"} & central
    assert not [name for name in central if name.startswith(("none_core/flower/", "client/"))]


def test_results_have_it() -> None:
    assert results.versions()["code"] == digest()
    assert results.versions(CENTRAL)["code"] == digest(CENTRAL) != digest()
    assert re.fullmatch("[0-9a-f]{12}", digest())
