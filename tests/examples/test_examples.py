"""Every example, from a copy outside the repository, with the library as the wheel holds it.

The figures are those of a seed; what is asserted is that the backdoor works without NONE's lines
and hardly with them, at no cost in accuracy.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ("message_api", "client_fn", "start_server", "plain_pytorch", "own_model")
SECONDS = 60.0  # of processor time: how long that takes depends on who else is at work

ROW = re.compile(r"^(without|with NONE) +accuracy +([\d.]+)% +backdoor +([\d.]+)%$", re.MULTILINE)
WHERE = "import none_core, sys; print(none_core.__file__, file=sys.stderr)"


@dataclass
class Place:
    """A folder outside the repository."""

    examples: Path
    library: Path  # the wheel's content

    def python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run Python among the examples; the library comes from the wheel and nowhere else."""
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("PYTHON")},
            "PYTHONPATH": str(self.library),
            "HOME": str(self.examples),
            "FLWR_HOME": str(self.examples / ".flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "OMP_NUM_THREADS": "1",
        }
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=self.examples,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,  # a busy machine
            check=False,
        )


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Build the wheel without a network, unpack it, and copy the examples beside it."""
    folder = tmp_path_factory.mktemp("elsewhere")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(
        ROOT / "none_core", source / "none_core", ignore=shutil.ignore_patterns("__pycache__")
    )
    built = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "library")
    shutil.copytree(
        ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("__pycache__")
    )
    return Place(folder / "examples", folder / "library")


def test_there_is_no_example_that_is_not_tested() -> None:
    runnable = {p.stem for p in (ROOT / "examples").glob("*.py") if "__main__" in p.read_text()}
    assert runnable == set(EXAMPLES)


def test_the_wheel_is_what_is_imported(place: Place) -> None:
    """And it holds the library alone."""
    done = place.python(
        "-c", "import none_core, none_core.flower.legacy; print(none_core.__file__)"
    )
    assert done.stdout.strip() == str(place.library / "none_core" / "__init__.py"), done.stderr
    assert {p.name for p in place.library.iterdir() if "dist-info" not in p.name} == {"none_core"}
    assert (place.library / "none_core" / "py.typed").exists()


@pytest.mark.timeout(620)
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_backdoor_works_without_none_and_hardly_with_it(place: Place, name: str) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = place.python(f"{name}.py")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    rows = {row[1]: (float(row[2]), float(row[3])) for row in ROW.finditer(done.stdout)}
    assert set(rows) == {"without", "with NONE"}, done.stdout
    assert rows["without"][1] > 80
    assert rows["with NONE"][1] < 30
    assert rows["with NONE"][0] > rows["without"][0] - 5
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < SECONDS


def test_the_plain_loop_names_the_four_attackers(place: Place) -> None:
    assert "left out of the average: 0 1 2 3" in place.python("plain_pytorch.py").stdout


# --- what the README shows ------------------------------------------------------------------------


def diffs(text: str) -> dict[str, list[str]]:
    """Added lines of every diff in a text, by the example that it names."""
    found = {}
    for block in re.findall(r"```diff\n(.*?)```", text, re.DOTALL):
        name = re.search(r"^# examples/(\w+)\.py$", block, re.MULTILINE)
        assert name, block
        found[name[1]] = [line[1:].strip() for line in block.splitlines() if line[:1] == "+"]
    return found


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_lines_in_the_readme_are_those_of_the_example(name: str) -> None:
    added = diffs((ROOT / "README.md").read_text(encoding="utf-8"))
    lines = {line.strip() for line in (ROOT / f"examples/{name}.py").read_text().splitlines()}
    assert added.keys() == set(EXAMPLES)
    assert 0 < len([line for line in added[name] if " import " not in line]) <= 5
    assert [line for line in added[name] if line not in lines] == []
