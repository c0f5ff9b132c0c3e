"""What travels between server and clients, as Flower records, and reading it without trust."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from numpy.typing import NDArray

from none_core.activations import STATISTICS, Report, ReportError, ReportSpec, decode_report
from none_core.purification import SampleFilter
from none_core.refusal import shown
from none_core.trigger_inversion import Probe, Triggers
from none_core.undo import Undo

ACTION = "activations"
MESSAGE_TYPE = f"query.{ACTION}"

# Names of our records. A user's own records never start with "none.".
MODEL = "none.model"
QUERY = "none.query"
REPORT = "none.report"
FILTER = "none.filter"
PURIFIED = "none.purified"
DECLINED = "none.declined"
PRIVACY = "none.privacy"
PATTERNS = "none.patterns"

MOST_RECORDS = 100  # in one reply
_MOST_NUMBER = 1e15  # that a client may say of itself
_MOST_TEXT = 200  # characters of a text from outside that are shown


def query_content(
    arrays: ArrayRecord,
    spec: ReportSpec,
    min_count: int,
    server_round: int,
    probe: Probe | None = None,
) -> RecordDict:
    """Ask for a report about the model ``arrays`` and, with a probe, for triggers to look for."""
    query = ConfigRecord(
        {
            "statistics": sorted(spec.statistics),
            "labels": spec.labels,
            "neurons": spec.neurons,
            "min-count": min_count,
            "round": server_round,
        }
    )
    if probe is not None:
        query["probe-labels"] = list(probe.labels)
        query["probe-steps"] = probe.steps
        query["probe-images"] = probe.images
        query["probe-success"] = probe.success
        query["probe-hard"] = list(probe.hard)
        query["probe-watched"] = list(probe.watched)
    return RecordDict({MODEL: arrays, QUERY: query})


def read_query(content: RecordDict) -> tuple[ArrayRecord, ReportSpec, int]:
    """Model, what to report, and the smallest number of samples of a reported label."""
    query: Any = content.config_records[QUERY]
    spec = ReportSpec(query["neurons"], query["labels"], frozenset(query["statistics"]))
    return content.array_records[MODEL], spec, query["min-count"]


def round_of(content: RecordDict) -> int:
    """Round of a query."""
    query: Any = content.config_records[QUERY]
    return int(query["round"])


def read_probe(content: RecordDict) -> Probe | None:
    """Read what triggers to look for, if any."""
    query: Any = content.config_records[QUERY]
    if "probe-labels" not in query:
        return None
    return Probe(
        labels=tuple(query["probe-labels"]),
        steps=query["probe-steps"],
        images=query["probe-images"],
        success=query["probe-success"],
        hard=tuple(query["probe-hard"]),
        watched=tuple(query["probe-watched"]),
    )


def report_content(report: Report, query: ConfigRecord) -> RecordDict:
    """Answer a query."""
    fields = {name: Array(packed) for name, packed in report.encode().items()}
    return RecordDict({REPORT: ArrayRecord(fields), QUERY: ConfigRecord({"round": query["round"]})})


def declined_content(reason: str) -> RecordDict:
    """Answer a query by saying why there will be no report."""
    return RecordDict({DECLINED: ConfigRecord({"reason": reason})})


def read_declined(content: RecordDict) -> str | None:
    """Read why a client does not report; None if it does not say that it declines."""
    record = content.get(DECLINED)
    if not isinstance(record, ConfigRecord):
        return None
    reason = record.get("reason")
    return _printable(reason) if isinstance(reason, str) else "no reason given"


def read_privacy(content: RecordDict) -> dict[str, Any] | None:
    """Read what a client says that its answers cost; None if it says nothing, or nonsense."""
    record = content.get(PRIVACY)
    if not isinstance(record, ConfigRecord):
        return None
    said: dict[str, Any] = {n: record.get(n) for n in ("answers", "noise", "delta", "epsilon")}
    for value in said.values():
        if type(value) not in (int, float) or not 0 <= value < _MOST_NUMBER:
            return None
    withheld = record.get("withheld")
    if not isinstance(withheld, list) or len(withheld) > len(STATISTICS):
        return None
    if not set(withheld) <= set(STATISTICS):
        return None
    return {**said, "withheld": [name for name in STATISTICS if name in withheld]}


def _printable(text: str) -> str:
    """Shorten a text from outside to what may stand in a log line."""
    return "".join(c if c.isprintable() else "?" for c in text[:_MOST_TEXT])


def read_report(
    content: RecordDict, spec: ReportSpec, *, sender: str, server_round: int, max_samples: int
) -> Report:
    """Read the answer to a query of this round.

    Raises
    ------
    ReportError
        With sender, field and reason.
    """
    if len(content) > MOST_RECORDS:
        raise ReportError(sender, "report", f"holds {len(content)} records")
    record, echo = content.get(REPORT), content.get(QUERY)
    if not isinstance(record, ArrayRecord):
        raise ReportError(sender, f"record '{REPORT}'", "is missing")
    answered = echo.get("round") if isinstance(echo, ConfigRecord) else None
    if answered != server_round:
        raise ReportError(sender, "round", f"is {_shown(answered)}, not {server_round}")
    sizes = {name: 8 * int(np.prod(shape)) for name, (_, shape) in spec.fields().items()}
    fields: dict[str, NDArray[Any]] = {}
    for name, array in record.items():
        if name not in sizes:
            raise ReportError(sender, f"field {shown(name)}", "was not asked for")
        try:
            fields[name] = read_bytes(array, largest=sizes[name] + 1024)
        except ValueError as error:
            raise ReportError(sender, name, str(error)) from None
    return decode_report(fields, spec, sender=sender, max_samples=max_samples)


def patterns_record(triggers: Triggers, labels: Iterable[int]) -> ArrayRecord:
    """Show the triggers that were found for some classes: made from images, so only if allowed.

    Of each class the mask and the pattern behind it, uint8, (1 + C, *positions); (2, features) for
    inputs without positions.
    """
    arrays = {}
    for label in labels:
        mask, pattern = triggers.kept_mask[label], triggers.kept_pattern[label]
        layers = torch.cat([mask, pattern]) if pattern.ndim > 1 else torch.stack([mask, pattern])
        arrays[str(label)] = Array((255 * torch.sigmoid(layers)).round().byte().numpy())
    return ArrayRecord(arrays)


def read_patterns(
    content: RecordDict, labels: Collection[int], shape: tuple[int, ...], *, sender: str
) -> dict[int, NDArray[np.uint8]]:
    """Read what a client shows of the triggers to some classes; nothing if it shows nothing.

    Parameters
    ----------
    labels : collection of int
        Classes that it was asked about.
    shape : tuple of int
        Of one input, (C, *positions) or (features,).

    Raises
    ------
    ReportError
        With sender, field and reason.
    """
    record = content.get(PATTERNS)
    if record is None:
        return {}
    if not isinstance(record, ArrayRecord):
        raise ReportError(sender, f"record '{PATTERNS}'", "holds no arrays")
    wanted = {str(label): label for label in labels}
    layered = (1 + shape[0], *shape[1:]) if len(shape) > 1 else (2, *shape)
    found = {}
    for name, array in record.items():
        if name not in wanted:
            raise ReportError(sender, f"pattern {shown(name)}", "was not asked for")
        try:
            found[wanted[name]] = read_array(array, np.dtype(np.uint8), layered)
        except ValueError as error:
            raise ReportError(sender, f"pattern {name}", str(error)) from None
    return found


def _shown(value: Any) -> str:
    """Write a value from outside; what is no ordinary number can be as long as a message."""
    if value is None:
        return "missing"
    if isinstance(value, float) or (isinstance(value, int) and abs(value) < 1 << 63):
        return str(value)
    return f"a {type(value).__name__}"


def filter_content(
    sample_filter: SampleFilter, undo: Undo, server_round: int
) -> dict[str, ArrayRecord | ConfigRecord]:
    """Record that rides on a train message: the filter, and the way back to the model it reads."""
    arrays = {name: Array(getattr(sample_filter, name)) for name in _FILTER_FIELDS}
    for name, rows in undo.rows.items():
        arrays[f"rows:{name}"] = Array(rows)
        arrays[f"values:{name}"] = Array(undo.values[name])
    return {FILTER: ArrayRecord(arrays), QUERY: ConfigRecord({"round": server_round})}


def read_filter(record: ArrayRecord) -> tuple[SampleFilter, Undo]:
    """Inverse of :func:`filter_content`; the client trusts its server."""
    arrays = {name: array.numpy() for name, array in record.items()}
    names = [name.removeprefix("rows:") for name in arrays if name.startswith("rows:")]
    undo = Undo(
        rows={name: arrays[f"rows:{name}"] for name in names},
        values={name: torch.from_numpy(arrays[f"values:{name}"].copy()) for name in names},
    )
    return SampleFilter(**{name: arrays[name] for name in _FILTER_FIELDS}), undo


def triggers_record(triggers: Triggers) -> ArrayRecord:
    """Keep triggers in a client's own state; they are made from its data and are never sent."""
    return ArrayRecord({n: Array(getattr(triggers, n).numpy()) for n in _TRIGGER_FIELDS})


def read_triggers(record: ArrayRecord) -> Triggers:
    """Inverse of :func:`triggers_record`."""
    return Triggers(**{n: torch.from_numpy(record[n].numpy().copy()) for n in _TRIGGER_FIELDS})


def without_filter(content: RecordDict) -> RecordDict:
    """Content of a train message as the inner strategy made it."""
    if FILTER not in content:
        return content
    return RecordDict({name: r for name, r in content.items() if name not in (FILTER, QUERY)})


_TRIGGER_FIELDS = tuple(field.name for field in fields(Triggers))
_FILTER_FIELDS = ("labels", "neurons", "sign", "mean", "deviation", "threshold")


# --- arrays from outside --------------------------------------------------------------------------
# Flower's own Array.numpy() believes the header inside the bytes, which may claim any size. Here
# the header is not parsed at all: the bytes must begin with exactly the one that numpy would write.


def read_array(array: Array, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Read an array that must have this dtype and shape.

    Raises
    ------
    ValueError
        With the reason, as the rest of a sentence.
    """
    if array.stype != "numpy.ndarray":
        raise ValueError(f"is serialised as {shown(array.stype)}, not as numpy.ndarray")
    if array.dtype != str(dtype):
        raise ValueError(f"has dtype {shown(array.dtype)}, not {dtype}")
    if tuple(array.shape) != shape:
        raise ValueError(f"has shape {_shape(array)}, not {shape}")
    for order in ("C", "F"):
        header = _npy_header(dtype.str, shape, order == "F")
        if array.data.startswith(header):
            size = len(array.data) - len(header)
            wanted = int(np.prod(shape)) * dtype.itemsize
            if size != wanted:
                raise ValueError(f"holds {size} bytes, not {wanted}")
            flat = np.frombuffer(array.data, dtype, offset=len(header))
            return flat.reshape(shape, order=order)
    raise ValueError("does not hold the array that it declares")


def read_bytes(array: Array, largest: int) -> NDArray[np.uint8]:
    """Read a flat uint8 array of any length up to ``largest``.

    Raises
    ------
    ValueError
        With the reason, as the rest of a sentence.
    """
    if len(array.data) > largest:
        raise ValueError(f"holds {len(array.data)} bytes, more than the {largest} allowed")
    if len(array.shape) != 1 or not 0 <= array.shape[0] <= largest:
        raise ValueError(f"has shape {_shape(array)}, not a flat one")
    return read_array(array, np.dtype(np.uint8), (int(array.shape[0]),))  # True is a number, too


def _shape(array: Array) -> str:
    """Write the shape that an array claims to have: any number of any numbers."""
    if len(array.shape) > 8:
        return f"of {len(array.shape)} dimensions"
    return f"{tuple(array.shape)!s:.60}"


@lru_cache(maxsize=1024)
def _npy_header(descr: str, shape: tuple[int, ...], fortran: bool) -> bytes:
    buffer = io.BytesIO()
    header = {"descr": descr, "fortran_order": fortran, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()


def copied(content: RecordDict) -> RecordDict:
    """Copy records, but not the arrays in them: what is taken out of one stays in the other."""
    records: dict[str, Any] = {name: record for name, record in content.items()}
    return RecordDict({name: type(record)(dict(record)) for name, record in records.items()})


def state_of(arrays: ArrayRecord) -> dict[str, torch.Tensor]:
    """Torch state dict of a record, in its own memory."""
    return {name: torch.from_numpy(array.numpy()) for name, array in arrays.items()}


def record_of(state: Mapping[str, torch.Tensor]) -> ArrayRecord:
    """Record of a torch state dict."""
    return ArrayRecord(
        {name: Array(tensor.detach().cpu().numpy()) for name, tensor in state.items()}
    )


def sender_of(message: Message) -> str:
    """How log lines call the sender of a message."""
    return f"node {message.metadata.src_node_id}"
