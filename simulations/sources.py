"""Which code made a result: a digest of all that decides the numbers of a run."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
FEDERATED = ("client/app.py", "server/app.py")
CENTRAL = ("simulations/central/run.py",)
# The rest starts runs and writes about them.
_DECIDING = ("client/", "none_core/", "server/", "tasks/", "simulations/central/")


@cache
def digest(entries: tuple[str, ...] = FEDERATED, root: Path = ROOT) -> str:
    """Return a digest of some files and of those of ours that they import, wherever they do.

    Comments, docstrings and layout make no difference to it, nor does code that is not reached.

    Parameters
    ----------
    entries : tuple of str
        Files, relative to `root`.
    root : Path
        The checkout.
    """
    total = hashlib.sha256()
    for name, tree in sorted(reached(entries, root).items()):
        for node in ast.walk(tree):
            _forget_docstring(node)
        total.update(f"{name}\n{ast.unparse(tree)}\n".encode())
    return total.hexdigest()[:12]


def reached(entries: Iterable[str], root: Path = ROOT) -> dict[str, ast.Module]:
    """Return the files that decide, from some of them on: by name, parsed."""
    found: dict[str, ast.Module] = {}
    waiting = list(entries)
    while waiting:
        name = waiting.pop()
        if name not in found and name.startswith(_DECIDING) and (root / name).is_file():
            found[name] = ast.parse((root / name).read_text(encoding="utf-8"))
            waiting.extend(_imported(found[name]))
    return found


def _imported(tree: ast.Module) -> Iterator[str]:
    """Files that the imports of a module may mean: whether there are such is not looked at."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            parts = name.split(".")
            for depth in range(1, len(parts) + 1):
                stem = "/".join(parts[:depth])
                yield from (f"{stem}.py", f"{stem}/__init__.py")


def _forget_docstring(node: ast.AST) -> None:
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
        node.body[:1] = [] if len(node.body) > 1 else [ast.Pass()]
