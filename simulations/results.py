"""What a run leaves, and how it becomes ``result.json``: one file that says all about the run.

The file repeats bit for bit when the same experiment is run again on the same machine. What does
not repeat, the seconds, is in ``timing.json`` beside it.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from simulations import sources

HISTORY = "history.json"
RESULT = "result.json"
TIMING = "timing.json"
MEMORY = "memory.json"  # of a deployment in containers: what they used at most
LAST = 5  # rounds that the worst case is taken over
SCORES = ("ba", "asr", "recovered")

Round = Mapping[str, Any]


class ResultError(RuntimeError):
    """A folder does not hold what a run leaves."""


def assemble(configuration: Mapping[str, Any], history: Mapping[str, Any]) -> dict[str, Any]:
    """Put the result of a run together.

    Parameters
    ----------
    configuration : mapping
        The experiment's identity, section by section.
    history : mapping
        What the ServerApp wrote: ``"rounds"``, the first of which is the initial model, and
        ``"truth"``; and ``"privacy"`` if clients added noise to their reports or declined: by
        client how many private answers it gave, their "noise", "delta" and what they cost together
        ("epsilon"), which statistics it withheld, and how often it declined, as it says itself.

    Returns
    -------
    dict
        The content of ``result.json``.
    """
    rounds = history["rounds"]
    return {
        "configuration": configuration,
        "rounds": rounds,
        "final": {score: rounds[-1][score] for score in SCORES},
        "worst_last5": worst(rounds[1:] or rounds),
        "truth": history["truth"],
        "filter": filtered(rounds, history["truth"]["poisoned"]),
        "certificates": certificates(rounds),
        **{name: history[name] for name in ("privacy",) if name in history},
        "versions": versions(),
    }


def worst(rounds: Sequence[Round], last: int = LAST) -> dict[str, float]:
    """Return the lowest BA and recovered accuracy, and the highest ASR, of the last rounds."""
    pick = {"ba": min, "asr": max, "recovered": min}
    return {score: pick[score](entry[score] for entry in rounds[-last:]) for score in SCORES}


def filtered(rounds: Sequence[Round], poisoned: int) -> dict[str, Any]:
    """Judge the poisoned-sample filter over all rounds.

    Returns
    -------
    dict
        How many samples were dropped and how many of these were poisoned; precision is None when
        nothing was dropped, recall when nothing was poisoned.
    """
    dropped = sum(entry["filtered"]["dropped"] for entry in rounds)
    hits = sum(entry["filtered"]["poisoned"] for entry in rounds)
    return {
        "dropped": dropped,
        "poisoned": hits,
        "precision": hits / dropped if dropped else None,
        "recall": hits / poisoned if poisoned else None,
    }


def certificates(rounds: Sequence[Round]) -> dict[str, int]:
    """Count the decisions about neurons, by how far they can be trusted, over all rounds."""
    return {
        standing: sum(entry["standings"][standing] for entry in rounds)
        for standing in ("certified", "supported", "contested")
    }


def suspects(result: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Return whose samples ever looked poisoned to the detector, and who is malicious."""
    named = {client for entry in result["rounds"] for client in entry["suspected"]}
    return sorted(named), sorted(result["truth"]["malicious"])


def left_out(result: Mapping[str, Any]) -> list[int]:
    """Return whose updates were ever left out, by quarantine."""
    return sorted({client for entry in result["rounds"] for client in entry["quarantined"]})


def versions(entries: tuple[str, ...] = sources.FEDERATED) -> dict[str, str]:
    """Return the versions that numbers may depend on, and a digest of our own code.

    Parameters
    ----------
    entries : tuple of str
        The files that a run begins with, see `sources.digest`.
    """
    packages = ("none-defense", "flwr", "torch", "numpy", "scipy")
    found = {"code": sources.digest(entries), "python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # run from a checkout that is not installed
            continue
    return found


def load(folder: Path) -> dict[str, Any]:
    """Read the result of a run, with its timing under the key ``"timing"``.

    Returns
    -------
    dict
        The content of ``result.json``, and of ``timing.json``: ``"seconds"`` of the whole run, and
        ``"rounds"`` with the seconds of each round's phases; all by the clock.

    Raises
    ------
    ResultError
        When one of them is not there, or is not JSON.
    """
    return read(folder) | {"timing": read(folder, TIMING)}


def read(folder: Path, name: str = RESULT) -> dict[str, Any]:
    """Read a JSON file of a run's folder.

    Raises
    ------
    ResultError
        When it is not there, or is not JSON.
    """
    try:
        content: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultError(f"cannot read {folder / name}: {error.strerror}") from None
    except ValueError as error:
        raise ResultError(f"{folder / name} is not valid JSON: {error}") from None
    return content


def write(folder: Path, content: Mapping[str, Any], name: str = RESULT) -> Path:
    """Write a JSON file of a run's folder."""
    return write_text(folder / name, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> Path:
    """Write a file so that it is never seen half-written; one that exists is replaced."""
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=f".{path.name}.", encoding="utf-8", delete=False
    ) as file:
        temporary = Path(file.name)
        try:
            file.write(text)
            file.flush()
            temporary.chmod(0o644)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    return path
