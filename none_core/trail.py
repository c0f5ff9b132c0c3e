"""The audit trail of a run: records in a chain of digests, closed with a signature.

A trail is a file with one JSON object a line. Each holds its number, the digest of the record
before it and its own: nothing can be changed, left out or put elsewhere without breaking the chain.
The last record of a run that ends is signed with Ed25519, over the head of the chain. A run that is
killed leaves a trail that can be continued, at worst with a torn last line. ``none_core.audit``
verifies.

What is hashed is the record without its digest as canonical JSON: keys sorted, no white space,
ASCII, numbers as Python's ``repr`` writes them, none of them infinite or NaN.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from torch import Tensor

from none_core.files import replace

FORMAT = 1
OPENED, ROUND, RELEASED, RESUMED, CLOSED = "opened", "round", "released", "resumed", "closed"
NOTHING = "0" * 64  # the digest before the first record
_CONTEXT = b"none_core audit trail 1\n"  # so that the signature is good for nothing else

Record = dict[str, Any]


class TrailError(RuntimeError):
    """A trail, or a key, that cannot be used: why, in one sentence."""


class Trail:
    """Writes the audit trail of a run; give it to a defence as its ``audit``.

    Call :meth:`open` or :meth:`resume` first. When the disk is full, records wait in memory until
    they can be written; :meth:`close` fails if they still cannot.

    Parameters
    ----------
    file : Path
        One JSON object a line. The public key is put beside it, under its name with ``.pub``.
    key : Path, optional
        File with the private key, mode 600, which is made on first use; by default beside
        ``file``, under its name with ``.key``. Whoever can read it can sign another trail: keep
        one elsewhere for signatures that are to convince others.
    """

    def __init__(self, file: Path, key: Path | None = None) -> None:
        self.file, self._key_file = file, key or file.with_suffix(".key")
        self._head, self._number = NOTHING, 0
        self._waiting: list[bytes] = []
        self._key: Ed25519PrivateKey | None = None

    @property
    def waiting(self) -> int:
        """Records that could not be written yet."""
        return len(self._waiting)

    def open(self, **facts: Any) -> None:
        """Begin a trail, in place of one that is there.

        Raises
        ------
        TrailError
            If the private key cannot be used.
        OSError
            If nothing can be written.
        """
        public = self._prepare_key()
        self.file.write_bytes(b"")
        self._head, self._number = NOTHING, 0
        self._append(OPENED, {"format": FORMAT, "public_key": public, **facts})
        self._write(strict=True)

    def resume(self, after: int, **facts: Any) -> None:
        """Continue the trail of a run that was stopped; a torn last line is noted and removed.

        Parameters
        ----------
        after : int
            Last complete round. Records of later ones stay, and the record that is added says that
            these rounds are repeated.

        Raises
        ------
        TrailError
            If the trail is not intact, is another key's, or knows nothing of that round.
        OSError
            If it cannot be read, or nothing can be written.
        """
        public = self._prepare_key()
        records, torn, problem = read(self.file)
        if problem:
            raise TrailError(f"{self.file} cannot be continued: {problem}")
        if not records or records[0].get("public_key") != public:
            raise TrailError(f"{self.file} cannot be continued: it was begun with another key")
        if not any(r["kind"] == RELEASED and r.get("round") == after for r in records):
            raise TrailError(f"{self.file} cannot be continued: round {after} is not in it")
        self._head, self._number = records[-1]["digest"], len(records)
        if torn:
            os.truncate(self.file, self.file.stat().st_size - len(torn))
            facts["torn"] = {"bytes": len(torn), "sha256": hashlib.sha256(torn).hexdigest()}
        elif not self.file.read_bytes().endswith(b"\n"):
            with self.file.open("ab") as file:  # the kill came between a line and its end
                file.write(b"\n")
        self._append(RESUMED, {"after": after, **facts})
        self._write(strict=True)

    def __call__(self, entry: Mapping[str, Any]) -> None:
        """Take down what a defence decided in a round."""
        self.append(ROUND, **entry)

    def append(self, kind: str, /, **facts: Any) -> None:
        """Add a record.

        Raises
        ------
        TypeError
            If it is no JSON. The trail is as it was then.
        """
        self._append(kind, facts)
        self._write(strict=False)

    def close(self, **facts: Any) -> None:
        """Add the last record, signed.

        Raises
        ------
        OSError
            If it, or records before it, cannot be written.
        """
        assert self._key is not None, "open or resume comes first"
        record, before = self._record(CLOSED, facts), (self._head, self._number)
        signature = self._key.sign(signed_part(record)).hex()
        self._append(CLOSED, {**facts, "signature": signature}, record["time"])
        try:
            self._write(strict=True)
        except OSError:
            self._waiting.pop()
            self._head, self._number = before
            raise

    def _record(self, kind: str, facts: Mapping[str, Any], time: str | None = None) -> Record:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        chained = {"kind": kind, "number": self._number, "previous": self._head}
        return {**_finite(dict(facts)), **chained, "time": time or now}

    def _append(self, kind: str, facts: Mapping[str, Any], time: str | None = None) -> None:
        record = self._record(kind, facts, time)
        record["digest"] = digest_of_record(record)
        self._waiting.append(canonical(record) + b"\n")
        self._head, self._number = record["digest"], self._number + 1

    def _write(self, strict: bool) -> None:
        """Write what waits, in one piece or not at all."""
        try:
            with self.file.open("ab", buffering=0) as file:
                size, rest = file.tell(), memoryview(b"".join(self._waiting))
                try:
                    while rest:
                        rest = rest[file.write(rest) :]
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(size)
                    raise
        except OSError as error:
            if strict:
                raise
            logging.getLogger("none_core").warning(
                "cannot write %s, %s records wait: %s", self.file, self.waiting, error.strerror
            )
            return
        self._waiting.clear()

    def _prepare_key(self) -> str:
        self._key = private_key(self._key_file)
        public = self._key.public_key()
        encoding, form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        text = public.public_bytes(encoding, form)
        replace(self.file.with_suffix(".pub"), lambda file: file.write(text))
        return public.public_bytes_raw().hex()


# --- records --------------------------------------------------------------------------------------


def canonical(record: Any) -> bytes:
    """Write a record in the one way that counts."""
    text = json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii")


def digest_of_record(record: Mapping[str, Any]) -> str:
    """SHA-256 of a record without its own digest, in hex."""
    hashed = {name: value for name, value in record.items() if name != "digest"}
    return hashlib.sha256(canonical(hashed)).hexdigest()


def signed_part(record: Mapping[str, Any]) -> bytes:
    """Return what a closing record's signature is over: all of it, with the head of the chain."""
    without = {k: v for k, v in record.items() if k not in ("digest", "signature")}
    return _CONTEXT + canonical(without)


def read(file: Path) -> tuple[list[Record], bytes, str]:
    """Read a trail as far as its chain holds.

    Returns
    -------
    tuple of list of dict, bytes and str
        The records; a torn last line, or nothing; and what is wrong with the line after the last
        record, in words, or an empty text.

    Raises
    ------
    OSError
        If the file cannot be read.
    """
    *lines, rest = file.read_bytes().split(b"\n")
    records: list[Record] = []
    for number, line in enumerate(lines):
        record, problem = _read_line(line, records)
        if record is None:
            return records, b"", f"line {number + 1} {problem}"
        records.append(record)
    if not rest:
        return records, b"", ""
    record, _ = _read_line(rest, records)
    if record is None:
        return records, rest, ""
    return [*records, record], b"", ""


def _read_line(line: bytes, before: list[Record]) -> tuple[Record | None, str]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None, "is not JSON"
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        return None, "is no record"
    if record.get("number") != len(before) or isinstance(record["number"], bool):
        return None, f"has number {record.get('number')!r:.20}, not {len(before)}"
    if record.get("previous") != (before[-1]["digest"] if before else NOTHING):
        return None, "does not follow the record before it"
    try:
        if line != canonical(record) or record.get("digest") != digest_of_record(record):
            return None, "does not have the digest that it states"
    except (ValueError, RecursionError):
        return None, "is no record"
    return record, ""


def _finite(value: Any) -> Any:
    """Copy what is to be JSON, which knows neither NaN nor infinity, with null for these."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value


# --- keys, models and where they lie --------------------------------------------------------------


def private_key(file: Path) -> Ed25519PrivateKey:
    """Read a private key, which is made if there is none.

    Raises
    ------
    TrailError
        If others may read the file, or it holds something else.
    OSError
        If it cannot be read or made.
    """
    if not file.exists():
        made = Ed25519PrivateKey.generate()
        text = made.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        replace(file, lambda stream: stream.write(text), mode=0o600)
    if file.stat().st_mode & 0o077:
        raise TrailError(f"others may read the private key {file}: chmod 600 it, or make another")
    try:
        key = serialization.load_pem_private_key(file.read_bytes(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise TrailError(f"{file} holds no private key: {error}") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise TrailError(f"{file} holds no private key of the kind Ed25519")
    return key


def public_key(file: Path) -> Ed25519PublicKey:
    """Read a public key.

    Raises
    ------
    TrailError
        If the file holds something else.
    OSError
        If it cannot be read.
    """
    try:
        key = serialization.load_pem_public_key(file.read_bytes())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise TrailError(f"{file} holds no public key: {error}") from None
    if not isinstance(key, Ed25519PublicKey):
        raise TrailError(f"{file} holds no public key of the kind Ed25519")
    return key


def digest_of_model(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of a state dict: names in order, each with its dtype, shape and bytes; in hex."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(canonical([name, str(tensor.dtype), list(tensor.shape)]) + b"\n")
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def checkpoint_of(trail: Path, server_round: int) -> Path:
    """Return where a run keeps the model that a round released, beside its trail."""
    return trail.parent / "checkpoints" / f"round-{server_round:04d}.pt"


def undo_of(trail: Path, server_round: int) -> Path:
    """Return where it keeps what leads back to the model before a round's reset."""
    return trail.parent / "undo" / f"round-{server_round:04d}.npz"
