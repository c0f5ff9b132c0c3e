"""Check the audit trail of a run, or undo one of its resets: ``python -m none_core.audit``.

    python -m none_core.audit verify results/run/audit.jsonl
    python -m none_core.audit undo results/run/audit.jsonl --round 7

Verifying checks the chain and the signature, that the checkpoints beside the trail are the models
that were released, and that a round's resets and repairs explain all by which the released model
differs from the aggregated one. A trail proves as much as its key: whoever holds the private one
can write another. ``--key`` names a public key that you got elsewhere than beside the trail.

Exit status: 0 intact, 1 altered, 2 unreadable, 3 unsigned, as a run leaves it that was killed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError  # nosec B403
from typing import Any

import torch
from cryptography.exceptions import InvalidSignature
from torch import Tensor

from none_core import files, snapshot, trail
from none_core.snapshot import SnapshotError
from none_core.trail import CLOSED, OPENED, RELEASED, RESUMED, ROUND, Record, TrailError
from none_core.undo import Undo

INTACT, ALTERED, UNREADABLE, UNSIGNED = range(4)


@dataclass
class Verdict:
    """What became of a trail.

    Attributes
    ----------
    status : int
        ``INTACT``, ``ALTERED``, ``UNREADABLE`` or ``UNSIGNED``.
    reason : str
        One sentence.
    notes : list of str
        What could not be checked, or needs explaining.
    rounds : dict of int to dict of str to dict
        The records of each round that counts, by kind; those that were repeated later are left out.
    """

    status: int
    reason: str
    notes: list[str] = field(default_factory=list)
    rounds: dict[int, dict[str, Record]] = field(default_factory=dict)


class _AlteredError(Exception):
    """Something does not fit: what, in one sentence."""


def verify(file: Path, key: Path | None = None) -> Verdict:
    """Check a trail, and what a run left beside it.

    Parameters
    ----------
    file : Path
        The trail.
    key : Path, optional
        The public key that must have signed it; by default the one beside the trail.
    """
    try:
        records, torn, problem = trail.read(file)
        if not records:
            return Verdict(UNREADABLE, f"{file} is no audit trail: {problem or 'it is empty'}")
        mine = trail.public_key(key or file.with_suffix(".pub"))
    except (OSError, TrailError) as error:
        return Verdict(UNREADABLE, str(error))
    verdict = Verdict(INTACT, "")
    try:
        if problem:
            raise _AlteredError(problem)
        verdict.rounds = _rounds_that_count(records)
        if records[0].get("public_key") != mine.public_bytes_raw().hex():
            raise _AlteredError("line 1 names another public key than the one to check with")
        for record in records:
            if record["kind"] == CLOSED:
                _check_signature(record, mine)
        checked, explained = _check_models(file, verdict)
    except _AlteredError as altered:
        return Verdict(ALTERED, f"altered: {altered}", verdict.notes)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return Verdict(ALTERED, f"altered: no run writes such records ({error!r})", verdict.notes)
    if torn:
        verdict.notes.append(
            f"the last line is torn after {len(torn)} bytes: the run was killed while writing it"
        )
    last = max(verdict.rounds, default=0)
    verdict.reason = (
        f"{len(records)} records up to round {last}, {checked} checkpoints are the models that "
        f"were released, {explained} times resets or repairs explain how the aggregated one differs"
    )
    if records[-1]["kind"] == CLOSED and not torn:
        verdict.reason = f"intact and signed: {verdict.reason}"
    else:
        verdict.status = UNSIGNED
        verdict.reason = (
            f"unsigned: {verdict.reason}; without a last record the run was killed, still goes on, "
            f"or the end was cut off"
        )
    return verdict


def undo(file: Path, server_round: int, out: Path, key: Path | None = None) -> Verdict:
    """Write the model as it was before a round's reset; the verdict says what came of it."""
    verdict = verify(file, key)
    if verdict.status in (ALTERED, UNREADABLE):
        return verdict
    record = verdict.rounds.get(server_round, {}).get(ROUND, {})
    if not _changes(record):
        those = [n for n, found in verdict.rounds.items() if _changes(found.get(ROUND, {}))]
        known = f"rounds {', '.join(map(str, those))} did" if those else "no round did"
        return Verdict(UNREADABLE, f"round {server_round} changed nothing: {known}")
    missing = [p for p in _files(file, server_round) if not p.exists()]
    if missing:
        return Verdict(UNREADABLE, f"{missing[0]} is not there any more")
    before = _model_before(file, server_round)[1]
    try:
        files.replace(out, lambda stream: torch.save(before, stream))
    except OSError as error:
        return Verdict(UNREADABLE, f"cannot write {out}: {error.strerror}")
    names = ", ".join(f"{r['layer']}:{r['neuron']}" for r in record["reset"]) or "nothing"
    if record.get("repaired_rows"):
        names += f", and repaired rows of {', '.join(record['repaired_rows'])}"
    return Verdict(INTACT, f"{out} is the model before round {server_round} reset {names}")


def _changes(record: Record) -> bool:
    """Whether a round says that it changed the aggregated model."""
    return bool(record.get("reset") or record.get("repaired_rows"))


def _rounds_that_count(records: Sequence[Record]) -> dict[int, dict[str, Record]]:
    """Sort records by round; what a resumed run repeats replaces what it repeats."""
    if records[0]["kind"] != OPENED or any(r["kind"] == OPENED for r in records[1:]):
        raise _AlteredError("a trail begins with the one record that opens it")
    rounds: dict[int, dict[str, Record]] = {}
    for record in records[1:]:
        if record["kind"] == RESUMED:
            rounds = {n: found for n, found in rounds.items() if n <= record["after"]}
        elif record["kind"] in (ROUND, RELEASED):
            number = int(record["round"])
            found = rounds.setdefault(number, {})
            if record["kind"] in found or number < max(rounds):
                raise _AlteredError(f"line {record['number'] + 1} repeats round {number}")
            found[record["kind"]] = record
        elif record["kind"] != CLOSED:
            raise _AlteredError(f"line {record['number'] + 1} is of a kind that no run writes")
    return rounds


def _check_signature(record: Record, key: Any) -> None:
    try:
        key.verify(bytes.fromhex(record["signature"]), trail.signed_part(record))
    except (InvalidSignature, KeyError, TypeError, ValueError):
        line = record["number"] + 1
        raise _AlteredError(f"line {line} is not signed with the key to check with") from None


def _check_models(file: Path, verdict: Verdict) -> tuple[int, int]:
    """Compare checkpoints with what was released, and resets with what they changed."""
    checked, explained, absent = 0, 0, []
    before: str | None = None
    for server_round, found in verdict.rounds.items():
        record = found.get(ROUND, {})
        if RELEASED not in found:
            continue
        previous, before = before, found[RELEASED]["model"]
        if not trail.checkpoint_of(file, server_round).exists():
            absent.append(server_round)
            continue
        released = _load(trail.checkpoint_of(file, server_round))
        if trail.digest_of_model(released) != found[RELEASED]["model"]:
            raise _AlteredError(f"the checkpoint of round {server_round} is not what was released")
        checked += 1
        if not record:
            continue
        if record["released"] is None:  # no model came out of the round
            record = record | dict.fromkeys(("aggregated", "released"), previous)
        if record["released"] != found[RELEASED]["model"]:
            raise _AlteredError(f"round {server_round} released another model than it decided on")
        if not _changes(record):
            if record["released"] != record["aggregated"]:
                raise _AlteredError(f"round {server_round} reset nothing, but changed the model")
        elif trail.undo_of(file, server_round).exists():
            _check_reset(file, server_round, record)
            explained += 1
        else:
            verdict.notes.append(f"what round {server_round} changed is not kept any more")
    if absent:
        verdict.notes.append(f"without a checkpoint, so not compared: {len(absent)} rounds")
    return checked, explained


def _check_reset(file: Path, server_round: int, record: Record) -> None:
    way_back, before = _model_before(file, server_round)
    if trail.digest_of_model(before) != record["aggregated"]:
        raise _AlteredError(f"undoing round {server_round} does not lead to the aggregated model")
    recorded = {name: set(rows) for name, rows in record.get("repaired_rows", {}).items()}
    for neuron in record["reset"]:
        for name, row in neuron["rows"].items():
            recorded.setdefault(name, set()).add(row)
    changed = Undo.between(before, _load(trail.checkpoint_of(file, server_round)))
    for name, rows in changed.rows.items():
        if unexplained := set(rows.tolist()) - recorded.get(name, set()):
            raise _AlteredError(
                f"round {server_round} changed row {min(unexplained)} of {name}, which belongs to "
                f"nothing that it says it reset or repaired"
            )
    if {n: r.tolist() for n, r in way_back.rows.items()} != {
        n: r.tolist() for n, r in changed.rows.items()
    }:
        raise _AlteredError(f"what is kept of round {server_round} is not what it changed")


def _files(file: Path, server_round: int) -> tuple[Path, Path]:
    return trail.checkpoint_of(file, server_round), trail.undo_of(file, server_round)


def _model_before(file: Path, server_round: int) -> tuple[Undo, dict[str, Tensor]]:
    checkpoint, kept = _files(file, server_round)
    try:
        way_back = snapshot.restored(snapshot.read(kept), [Undo])
        return way_back, way_back.apply(_load(checkpoint))
    except (SnapshotError, AttributeError, KeyError, IndexError, RuntimeError, TypeError) as error:
        raise _AlteredError(f"{kept} does not lead back: {error!r:.200}") from None


def _load(checkpoint: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(checkpoint, weights_only=True, map_location="cpu")
    except (OSError, RuntimeError, ValueError, EOFError, UnpicklingError) as error:
        raise _AlteredError(f"{checkpoint} cannot be read: {error!r:.200}") from None
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise _AlteredError(f"{checkpoint} holds no state dict")
    return state


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    arguments = _parser().parse_args(argv)
    if arguments.command == "verify":
        verdict = verify(arguments.file, arguments.key)
    else:
        name = f"before-reset-{arguments.round:04d}.pt"
        out = arguments.out or arguments.file.parent / name
        verdict = undo(arguments.file, arguments.round, out, arguments.key)
    print(verdict.reason, file=sys.stderr if verdict.status else sys.stdout)
    for note in verdict.notes:
        print(f"note: {note}")
    return verdict.status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m none_core.audit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, says in (("verify", "check a trail"), ("undo", "write the model before a reset")):
        command = commands.add_parser(name, help=says)
        command.add_argument("file", type=Path, metavar="FILE", help="audit.jsonl of a run")
        command.add_argument("--key", type=Path, help="public key (default: beside FILE)")
    command.add_argument("--round", type=int, required=True, metavar="N")
    command.add_argument("--out", type=Path, help="file to write (default: beside FILE)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
