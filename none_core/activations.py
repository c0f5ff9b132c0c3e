"""Activation reports: what a client tells the server about how the model behaves on its data.

A report is built in one pass over the data with memory that does not depend on the number of
samples, merges with other reports, and travels as a few small byte arrays. Every report that comes
from outside is read by :func:`decode_report` and by nothing else.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from none_core.modes import evaluating
from none_core.neurons import NeuronMap, Reader
from none_core.refusal import Refusal

LABEL_HISTOGRAMS = "label-histograms"
LINEAR_SHARE = "linear-share"
PREDICTION_EXTREMES = "prediction-extremes"
TRIGGER_SHIFT = "trigger-shift"
STATISTICS = (LABEL_HISTOGRAMS, LINEAR_SHARE, PREDICTION_EXTREMES, TRIGGER_SHIFT)

_SUM_UNITS = 1 << 16  # sums of values are kept in units of 2**-16
_OFFSET_STEPS = 127  # ... and travel in 127 steps either way from the histogram's own sum

CONFIDENT = 0.9  # a sample counts as "predicted k" by the contrast rule above this probability ...
UNLIKELY = 0.1  # ... and as "not k" below this one

MOST_SHIFT = 1000.0  # standard deviations that a trigger may be said to move a neuron
_MOST_PROBES = 16  # per class in one report; their summed shifts still fit a float16

_MOST_POSITIONS = 1 << 24  # in one channel of one sample; keeps sums over clients inside int64


class HistogramGrid:
    """The one grid on which every report counts activation values: signed and roughly logarithmic.

    Bins are read off the bits of a float32: its sign, its exponent and the top bit of its mantissa.
    That makes two bins an octave, with edges 1, 1.5, 2, 3, 4, 6, ..., symmetric about zero, without
    a logarithm and with the same result on every machine. Values nearer to zero than
    :attr:`SMALLEST` share one bin on each side of zero, so the sign of a value is never lost (-0.0
    counts as zero); values beyond :attr:`LARGEST`, and infinities, fall into the outermost bins,
    NaN into the lowest.

    Because everybody uses this grid, histograms merge without agreeing on a range first.
    """

    OCTAVES = 15
    SMALLEST = 2.0**-3
    LARGEST = SMALLEST * 2.0**OCTAVES
    PER_SIGN = 2 * OCTAVES + 2
    BINS = 2 * PER_SIGN

    #: Edges in ascending order, (BINS + 1,). Bin b holds edges[b] <= value < edges[b + 1] from zero
    #: upwards and edges[b] < value <= edges[b + 1] below. The outermost edges stand for infinity.
    _MAGNITUDES = np.append(SMALLEST * np.outer(2.0 ** np.arange(OCTAVES), [1, 1.5]), LARGEST)
    EDGES = np.concatenate(
        [[-1.5 * LARGEST], -_MAGNITUDES[::-1], [0.0], _MAGNITUDES, [1.5 * LARGEST]]
    )
    #: The value that stands for each bin: its middle, (BINS,).
    CENTRES = (EDGES[:-1] + EDGES[1:]) / 2
    #: How far a value can be from the middle of its bin, (BINS,).
    HALF_WIDTHS = np.diff(EDGES) / 2

    @classmethod
    def bins(cls, values: Tensor) -> Tensor:
        """Bin of every value.

        Parameters
        ----------
        values : Tensor
            float32, any shape.

        Returns
        -------
        Tensor
            int32 bin numbers in 0..BINS-1, same shape.
        """
        bits = values.contiguous().view(torch.int32)
        # The exponent's eight bits and the mantissa's first, counted from SMALLEST upwards.
        magnitude = (bits & 0x7FFFFFFF) >> 22
        magnitude = (magnitude - (2 * (127 - 3) - 1)).clamp_(0, cls.PER_SIGN - 1)
        return torch.where(values >= 0, magnitude + cls.PER_SIGN, cls.PER_SIGN - 1 - magnitude)


class ReportError(Refusal):
    """A report that was refused."""

    what = "activation report"


@dataclass(frozen=True)
class ReportSpec:
    """What a report has to look like: agreed between server and client before anything is sent.

    Attributes
    ----------
    neurons : int
        Number of neurons J of the model's :class:`~none_core.neurons.NeuronMap`.
    labels : int
        Number of classes K.
    statistics : frozenset of str
        Names out of :data:`STATISTICS`; may be empty (then the report holds predictions only).
    """

    neurons: int
    labels: int
    statistics: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        """Check the values."""
        unknown = set(self.statistics) - set(STATISTICS)
        if unknown:
            raise ValueError(f"unknown statistics {sorted(unknown)}; known are {list(STATISTICS)}")
        if self.neurons < 1 or self.labels < 2:
            raise ValueError(
                f"a report needs at least one neuron and two labels, got {self.neurons} neurons "
                f"and {self.labels} labels"
            )

    def fields(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Kind ("count", "histogram", "sum", "real" or "half") and shape of every array."""
        j, k = self.neurons, self.labels
        fields: dict[str, tuple[str, tuple[int, ...]]] = {"predictions": ("count", (k, k))}
        if LABEL_HISTOGRAMS in self.statistics:
            fields["histograms"] = ("histogram", (k, j, HistogramGrid.BINS))
            fields["sums"] = ("sum", (k, j))
        if LINEAR_SHARE in self.statistics:
            fields["at_least_zero"] = ("count", (j,))
            fields["positions"] = ("count", (j,))
        if PREDICTION_EXTREMES in self.statistics:
            fields["confident_count"] = ("count", (k,))
            fields["confident_max"] = ("real", (k, j))
            fields["unlikely_count"] = ("count", (k,))
            fields["unlikely_sum"] = ("real", (k, j))
            fields["unlikely_square_sum"] = ("real", (k, j))
        if TRIGGER_SHIFT in self.statistics:
            fields["probes"] = ("count", (k,))
            fields["mask_size"] = ("real", (k,))
            fields["mask_success"] = ("real", (k,))
            fields["shift"] = ("half", (k, j))
        return fields


@dataclass(frozen=True, eq=False)
class Report:
    """Statistics of a model's neurons over one client's samples.

    Attributes
    ----------
    spec : ReportSpec
    arrays : dict of str to ndarray
        One array per field of ``spec.fields()``, counts as int64, reals as float64. Histograms
        are uint32, but those of a received report are held as narrow as they came: read them as
        ``report["histograms"]``, which is always uint32.

        - ``predictions`` (K, K): samples by local label and by the model's prediction;
        - ``histograms`` (K, J, BINS): samples by local label, neuron and bin of its value, where a
          neuron's value is its maximum over space;
        - ``sums`` (K, J): sums of those values (cut off at the grid's ends) in units of 2**-16, so
          that they are integers and merge exactly;
        - ``at_least_zero``, ``positions`` (J,): values >= 0 and values in all, over samples *and*
          positions;
        - ``confident_count`` (K,), ``confident_max`` (K, J): samples predicted k with p > 0.9 and
          the maximum of each neuron over them (-inf where there are none);
        - ``unlikely_count`` (K,), ``unlikely_sum``, ``unlikely_square_sum`` (K, J): the same for
          samples with p_k < 0.1;
        - ``probes`` (K,): how often a trigger to class k was looked for, ``mask_size`` and
          ``mask_success`` (K,), ``shift`` (K, J): sums over these probes of the mask's share of the
          input, of the share of images that it turns, and of how far it moves each neuron's mean,
          in the neuron's standard deviations.
    """

    spec: ReportSpec
    arrays: dict[str, NDArray[Any]] = field(repr=False)

    def __getitem__(self, name: str) -> NDArray[Any]:
        """Array of one field, in a type in which it can be added to others."""
        array = self.arrays[name]
        return array.astype(np.uint32, copy=False) if name == "histograms" else array

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """Samples per local label, (K,)."""
        counts: NDArray[np.int64] = self["predictions"].sum(1)
        return counts

    @property
    def accuracy(self) -> float:
        """Share of samples whose prediction is their local label; NaN without samples."""
        total = int(self.counts.sum())
        return float(np.trace(self["predictions"]) / total) if total else float("nan")

    @cached_property
    def _grid_sums(self) -> NDArray[np.floating[Any]]:
        """Samples and sums of their bins' centre, centre**2 and half width, (K, J, 4)."""
        histograms = self.arrays["histograms"]
        # float32 is exact for counts below 2**24, and this is the hot spot of reading a report.
        dtype: type[np.floating[Any]] = np.float32
        if int(self.counts.max(initial=0)) >= 1 << 24:
            dtype = np.float64
        grid = HistogramGrid
        columns = [np.ones(grid.BINS), grid.CENTRES, grid.CENTRES**2, grid.HALF_WIDTHS]
        table = np.stack(columns, axis=1).astype(dtype)
        sums: NDArray[np.floating[Any]] = np.empty((*histograms.shape[:2], table.shape[1]), dtype)
        for counts, out in zip(histograms, sums, strict=True):  # by label, or copies become large
            np.matmul(counts.astype(dtype), table, out=out)
        return sums

    def moments(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Mean and variance of every neuron per label; NaN for labels without samples.

        The mean comes from the sums: exact up to 2**-17 where the report was built, and up to 1/254
        of the mean half width of the bins involved where it was received, both up to the rounding
        of float32; values beyond the grid's ends count as the ends. The variance comes from the
        histograms, with every sample at the middle of its bin.

        Returns
        -------
        tuple of ndarray
            Two float32 arrays (K, J).
        """
        with np.errstate(invalid="ignore", divide="ignore"):
            total = self.counts[:, None]
            mean = (self["sums"] / (_SUM_UNITS * total)).astype(np.float32)
            _, first, second, _ = np.moveaxis(self._grid_sums, -1, 0) / total
            variance = np.maximum(second - first**2, 0).astype(np.float32)
        return mean, variance

    def trigger_shift(
        self,
    ) -> tuple[NDArray[np.bool_], NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        """Return what trigger inversion found: probed (K,), size, success (K,) and shift (K, J).

        Means over the probes; NaN for classes that were not looked for.
        """
        with np.errstate(invalid="ignore", divide="ignore"):
            size, success = (
                (self[name] / self["probes"]).astype(np.float32)
                for name in ("mask_size", "mask_success")
            )
            shift = (self["shift"] / self["probes"][:, None]).astype(np.float32)
        return self["probes"] > 0, size, success, shift

    def with_trigger_shift(
        self,
        probed: NDArray[np.bool_],
        size: NDArray[np.float64],
        success: NDArray[np.float64],
        shift: NDArray[np.float64],
    ) -> Report:
        """Return the report with the result of one probe in it; arguments as `trigger_shift`'s."""
        found = {"mask_size": size, "mask_success": success, "shift": shift}
        rows = {n: np.where(_like(probed, a), a, 0.0) for n, a in found.items() if a.size}
        return Report(self.spec, self.arrays | {"probes": probed.astype(np.int64)} | rows)

    def tail_shares(self, threshold: float) -> NDArray[np.float64]:
        """Share of samples with a value >= threshold per label and neuron, (K, J).

        Exact at a non-negative edge of the grid (zero among them); elsewhere the bin of the
        threshold is split in proportion, so the error is at most the share of that one bin.
        """
        edges = HistogramGrid.EDGES
        part = np.clip((edges[1:] - threshold) / np.diff(edges), 0, 1)
        with np.errstate(invalid="ignore", divide="ignore"):
            shares: NDArray[np.float64] = (self["histograms"] @ part) / self.counts[:, None]
        return shares

    def quantiles(self, q: float) -> NDArray[np.float64]:
        """Return the q-quantile of every neuron per label, (K, J), linear inside its bin.

        It lies in the same bin as the exact (lower) quantile of the samples, so the error is at
        most the width of that bin: max(SMALLEST, |value| / 2). Values beyond the grid's ends are
        read as 1 to 1.5 times LARGEST. NaN for labels without samples.
        """
        if not 0 <= q <= 1:
            raise ValueError(f"q must be in [0, 1], got {q}")
        cumulative = self["histograms"].cumsum(-1, dtype=np.float64)
        total = self.counts[:, None, None].astype(np.float64)
        # The rank of the lower quantile, 1-based: at least one sample lies at or below it.
        rank = np.maximum(np.ceil(q * total), 1)
        index = np.minimum((cumulative < rank).sum(-1), HistogramGrid.BINS - 1)[..., None]
        below = np.where(index > 0, np.take_along_axis(cumulative, np.maximum(index - 1, 0), -1), 0)
        inside = np.take_along_axis(self["histograms"], index, -1)
        with np.errstate(invalid="ignore", divide="ignore"):
            share = np.where(total > 0, (rank - below) / inside, np.nan)
        edges = HistogramGrid.EDGES
        quantile: NDArray[np.float64] = (
            edges[index] + share * (edges[index + 1] - edges[index])
        ).squeeze(-1)
        return quantile

    def merge(self, other: Report) -> Report:
        """Report over the samples of both: counts add, maxima are kept, sums add.

        Associative and commutative: exactly for counts and maxima, up to float64 rounding for the
        two sums of ``prediction-extremes``.

        Raises
        ------
        ValueError
            If the reports' specs differ, or a histogram could hold more than 2**32 - 1 samples.
        """
        if self.spec != other.spec:
            raise ValueError(f"reports of different shape do not merge: {self.spec}, {other.spec}")
        if int((self.counts + other.counts).max()) > np.iinfo(np.uint32).max:
            raise ValueError("the reports hold too many samples together for 32-bit histograms")
        combine = {name: np.add for name in self.arrays} | {"confident_max": np.maximum}
        return Report(
            self.spec, {name: combine[name](self[name], other[name]) for name in self.arrays}
        )

    def encode(self) -> dict[str, NDArray[np.uint8]]:
        """Wire form: one flat uint8 array per field.

        Counts, maxima and the sums of ``prediction-extremes`` travel without loss, ``shift`` with
        the eleven significant bits of a float16. ``sums`` travel
        as one signed byte each: how far the mean is from the histogram's, in 1/127 of the mean half
        width of the bins. A received mean therefore cannot contradict its histogram.
        """
        fields = self.spec.fields()
        return {
            name: _pack(self._offsets() if kind == "sum" else self[name], kind)
            for name, (kind, _) in fields.items()
        }

    def _offsets(self) -> NDArray[np.int8]:
        _, centres, _, half_widths = np.moveaxis(self._grid_sums.astype(np.float64), -1, 0)
        deviation = self["sums"] / _SUM_UNITS - centres
        share = np.divide(
            deviation, half_widths, out=np.zeros(deviation.shape), where=half_widths > 0
        )
        offsets: NDArray[np.int8] = np.rint(np.clip(share, -1, 1) * _OFFSET_STEPS).astype(np.int8)
        return offsets

    def _with_sums_from(self, offsets: NDArray[np.int8]) -> Report:
        _, centres, _, half_widths = np.moveaxis(self._grid_sums.astype(np.float64), -1, 0)
        share = np.clip(offsets / _OFFSET_STEPS, -1, 1)
        sums = np.rint((centres + share * half_widths) * _SUM_UNITS).astype(np.int64)
        self.arrays["sums"] = sums
        return self


class ReportBuilder:
    """Builds a :class:`Report` batch by batch.

    Parameters
    ----------
    spec : ReportSpec
    """

    def __init__(self, spec: ReportSpec) -> None:
        self.spec = spec
        dtypes = {
            "count": torch.int64,
            # Half the memory of int64, and far more samples than a pass can hold.
            "histogram": torch.int32,
            "sum": torch.int64,
            "real": torch.float64,
            "half": torch.float64,
        }
        self._arrays = {
            name: torch.zeros(shape, dtype=dtypes[kind])
            for name, (kind, shape) in spec.fields().items()
        }
        if PREDICTION_EXTREMES in spec.statistics:
            self._arrays["confident_max"].fill_(-torch.inf)

    @torch.no_grad()
    def add(self, reads: Sequence[Tensor], logits: Tensor, labels: Tensor) -> None:
        """Count one batch.

        Parameters
        ----------
        reads : sequence of Tensor
            One (n, C, *positions) tensor per layer, as a reader of the neuron map returns them.
        logits : Tensor
            Model outputs, (n, K).
        labels : Tensor
            Local labels, (n,), 0..K-1.
        """
        k = self.spec.labels
        if logits.ndim != 2 or logits.shape[1] != k:
            raise ValueError(f"logits must be (n, {k}), got {tuple(logits.shape)}")
        predictions = logits.argmax(1)
        pairs = (labels * k + predictions).cpu()
        self._arrays["predictions"].view(-1).add_(torch.bincount(pairs, minlength=k * k))
        if LINEAR_SHARE in self.spec.statistics:
            self._add_linear_share(reads)
        if self.spec.statistics & {LABEL_HISTOGRAMS, PREDICTION_EXTREMES}:
            values = spatial_maximum(reads).cpu()
            if LABEL_HISTOGRAMS in self.spec.statistics:
                self._add_histograms(values, labels.cpu())
            if PREDICTION_EXTREMES in self.spec.statistics:
                self._add_extremes(values, logits.softmax(1).cpu())

    def _add_histograms(self, values: Tensor, labels: Tensor) -> None:
        neurons = torch.arange(self.spec.neurons)
        cells = (labels[:, None] * self.spec.neurons + neurons) * HistogramGrid.BINS
        cells += HistogramGrid.bins(values)
        limit = float(HistogramGrid.EDGES[-1])
        fixed = values.nan_to_num(-limit).clamp_(-limit, limit).mul_(_SUM_UNITS).round_().long()
        self._arrays["sums"].index_add_(0, labels, fixed)
        flat = self._arrays["histograms"].view(-1)
        flat.scatter_add_(0, cells.view(-1), torch.ones((), dtype=flat.dtype).expand(cells.numel()))

    def _add_linear_share(self, reads: Sequence[Tensor]) -> None:
        flat = [read.flatten(2) if read.ndim > 2 else read[..., None] for read in reads]
        self._arrays["at_least_zero"] += torch.cat([(r >= 0).sum((0, 2)) for r in flat]).cpu()
        self._arrays["positions"] += torch.cat(
            [torch.full((r.shape[1],), r.shape[0] * r.shape[2]) for r in flat]
        )

    def _add_extremes(self, values: Tensor, probabilities: Tensor) -> None:
        arrays = self._arrays
        sample, label = (probabilities > CONFIDENT).nonzero(as_tuple=True)  # one label per sample
        counts = torch.bincount(label, minlength=self.spec.labels)
        arrays["confident_count"] += counts
        for k in counts.nonzero().flatten().tolist():
            highest = values[sample[label == k]].amax(0).double()
            torch.maximum(arrays["confident_max"][k], highest, out=arrays["confident_max"][k])
        unlikely = probabilities < UNLIKELY
        arrays["unlikely_count"] += unlikely.sum(0)
        # Nearly all samples are unlikely to be of a label: it is quicker to take off the others.
        mostly = 2 * unlikely.sum(0) >= len(values)
        rows = torch.where(mostly, ~unlikely, unlikely).T.contiguous()
        powers = values.double()
        for name in ("unlikely_sum", "unlikely_square_sum"):
            if name == "unlikely_square_sum":
                powers.square_()
            total = powers.sum(0)
            for k, off in enumerate(mostly.tolist()):
                part = powers[rows[k]].sum(0)
                arrays[name][k] += total - part if off else part

    def report(self, min_count: int = 1) -> Report:
        """Return the report so far, without labels that have fewer than ``min_count`` samples.

        Such labels say too much about single people: all their counts become zero. ``linear-share``
        and ``prediction-extremes`` are not split by label and cover all samples; with fewer than
        ``min_count`` samples in all, or in a class, they are emptied likewise.
        """
        arrays: dict[str, NDArray[Any]] = {n: a.numpy().copy() for n, a in self._arrays.items()}
        rare = arrays["predictions"].sum(1) < min_count
        total = int(arrays["predictions"].sum())
        arrays["predictions"][rare] = 0
        if "histograms" in arrays:
            arrays["histograms"][rare] = 0
            arrays["sums"][rare] = 0
            arrays["histograms"] = arrays["histograms"].view(np.uint32)
        if "positions" in arrays and total < min_count:
            arrays["positions"][:] = arrays["at_least_zero"][:] = 0
        if "confident_max" in arrays:
            few = arrays["confident_count"] < min_count
            arrays["confident_max"][few] = -np.inf
            arrays["confident_count"][few] = 0
            few = arrays["unlikely_count"] < min_count
            for name in ("unlikely_sum", "unlikely_square_sum", "unlikely_count"):
                arrays[name][few] = 0
        return Report(self.spec, arrays)


def spatial_maximum(reads: Sequence[Tensor]) -> Tensor:
    """Value of every neuron for every sample, (n, J) float32: the maximum over all positions."""
    return torch.cat([_maximum(read) for read in reads], dim=1).float()


def _maximum(read: Tensor) -> Tensor:
    if read.ndim == 4 and not read.is_contiguous():
        # Channels last: there amax is slow unless their number suits its vectors.
        return functional.adaptive_max_pool2d(read, 1).flatten(1)
    return read.flatten(2).amax(2) if read.ndim > 2 else read


def build_report(
    model: nn.Module,
    neuron_map: NeuronMap,
    batches: Iterable[tuple[Tensor, Tensor]],
    spec: ReportSpec,
    min_count: int = 1,
    reader: Reader | None = None,
) -> Report:
    """Run ``model`` over ``batches`` once and report its neurons.

    Parameters
    ----------
    model : nn.Module
        A model of the architecture that ``neuron_map`` was traced from; runs in evaluation mode.
    neuron_map : NeuronMap
    batches : iterable of (inputs, labels)
        Inputs as the model takes them, labels (n,) int64 in 0..K-1, on the model's device.
    spec : ReportSpec
    min_count : int
        Labels with fewer samples are left out.
    reader : callable, optional
        ``neuron_map.reader(model)``, for those who keep it: making one traces the model.

    Returns
    -------
    Report
    """
    builder = ReportBuilder(spec)
    reader = reader or neuron_map.reader(model)
    with evaluating(model), torch.inference_mode():
        for inputs, labels in batches:
            logits, reads = reader(inputs)
            builder.add(reads, logits, labels)
    return builder.report(min_count)


def decode_report(
    fields: Mapping[str, NDArray[Any]], spec: ReportSpec, *, sender: str, max_samples: int
) -> Report:
    """Read a report that came from outside: the only place where untrusted reports are looked at.

    Nothing larger than the report's agreed size is ever allocated, and what is returned is
    consistent in itself: every histogram sums to its label's count, shares do not exceed one,
    sums of squares fit their sums. Whether it is *true* is for the detectors to decide.

    Parameters
    ----------
    fields : mapping of str to ndarray
        Flat uint8 arrays as :meth:`Report.encode` makes them.
    spec : ReportSpec
        What was asked for.
    sender : str
        Named in errors.
    max_samples : int
        Largest credible number of samples in one report.

    Raises
    ------
    ReportError
        With sender, field and reason.
    """
    wanted = spec.fields()
    if missing := sorted(wanted.keys() - fields.keys()):
        raise ReportError(sender, missing[0], "is missing")
    if extra := sorted(fields.keys() - wanted.keys(), key=repr):
        raise ReportError(sender, repr(extra[0])[:80], "was not asked for")
    arrays: dict[str, NDArray[Any]] = {}
    for name, (kind, shape) in wanted.items():
        try:
            arrays[name] = _unpack(fields[name], kind, shape)
        except ValueError as error:
            raise ReportError(sender, name, str(error)) from None
    offsets = arrays.pop("sums", None)
    report = Report(spec, arrays)
    _check_consistency(report, sender, max_samples)
    return report if offsets is None else report._with_sums_from(offsets)


def _check_consistency(report: Report, sender: str, max_samples: int) -> None:
    def demand(condition: object, name: str, reason: str) -> None:
        if not condition:
            raise ReportError(sender, name, reason)

    # In float64: a sum of hostile int64 counts can wrap around to anything.
    total = float(report["predictions"].sum(dtype=np.float64))
    demand(total > 0, "predictions", "holds no sample")
    demand(
        total <= max_samples,
        "predictions",
        f"claims {total:.0f} samples, more than the {max_samples} allowed",
    )
    if LABEL_HISTOGRAMS in report.spec.statistics:
        demand(
            (report._grid_sums[..., 0] == report.counts[:, None]).all(),
            "histograms",
            "do not sum to the number of samples of their label",
        )
    if LINEAR_SHARE in report.spec.statistics:
        demand(
            (report["at_least_zero"] <= report["positions"]).all(),
            "at_least_zero",
            "exceeds the number of positions",
        )
        demand(
            (report["positions"] <= max_samples * _MOST_POSITIONS).all(),
            "positions",
            f"claims more than {max_samples} samples of {_MOST_POSITIONS} positions",
        )
    if PREDICTION_EXTREMES in report.spec.statistics:
        # Values are float32, so their squares and the sums of these are finite in float64.
        limit = float(np.finfo(np.float32).max)
        demand(
            # A sample is confidently predicted as one class at most.
            report["confident_count"].sum(dtype=np.float64) <= max_samples,
            "confident_count",
            f"claims more than {max_samples} samples",
        )
        demand(
            (report["unlikely_count"] <= max_samples).all(),
            "unlikely_count",
            f"claims more than {max_samples} samples",
        )
        empty = report["confident_count"] == 0
        maxima = report["confident_max"]
        demand(
            np.isneginf(maxima[empty]).all() and (np.abs(maxima[~empty]) <= limit).all(),
            "confident_max",
            "is not finite where there are samples, or not -inf where there are none",
        )
        count = report["unlikely_count"][:, None].astype(np.float64)
        sums, squares = report["unlikely_sum"], report["unlikely_square_sum"]
        demand(
            (np.abs(sums) <= count * limit).all(),
            "unlikely_sum",
            "is not finite, or not zero where there are no samples",
        )
        demand(
            ((squares >= 0) & (squares <= count * limit**2)).all(),
            "unlikely_square_sum",
            "is negative, not finite, or not zero where there are no samples",
        )
        with np.errstate(over="ignore"):
            demand(
                (sums**2 <= squares * count * (1 + 1e-6) + 1e-6).all(),
                "unlikely_square_sum",
                "is smaller than its sum allows",
            )
    if TRIGGER_SHIFT in report.spec.statistics:
        probes = report["probes"]
        demand((probes <= _MOST_PROBES).all(), "probes", f"claims more than {_MOST_PROBES} probes")
        for name in ("mask_size", "mask_success"):
            demand(
                ((report[name] >= 0) & (report[name] <= probes)).all(),
                name,
                "is not a share, or not zero where nothing was probed",
            )
        demand(
            (np.abs(report["shift"]) <= MOST_SHIFT * probes[:, None]).all(),
            "shift",
            f"is not finite, beyond {MOST_SHIFT:g}, or not zero where nothing was probed",
        )


def _like(rows: NDArray[Any], array: NDArray[Any]) -> NDArray[Any]:
    """View one value per row so that it broadcasts over the array's other dimensions."""
    return rows.reshape(-1, *[1] * (array.ndim - 1))


# --- wire form ------------------------------------------------------------------------------------
# One width byte, then zlib over the little-endian byte planes: all lowest bytes, then all second
# bytes, and so on. Counts are small, so the upper planes are runs of zeros.

_REAL_WIDTH = 8
_HALF_WIDTH = 2
_OFFSET_WIDTH = 1
_WIDTHS = {
    "count": (1, 2, 4, 8),
    "histogram": (1, 2, 4),
    "real": (_REAL_WIDTH,),
    "sum": (_OFFSET_WIDTH,),
    "half": (_HALF_WIDTH,),
}


def _pack(array: NDArray[Any], kind: str) -> NDArray[np.uint8]:
    if kind == "real":
        width, data = _REAL_WIDTH, array.astype("<f8")
    elif kind == "half":
        width, data = _HALF_WIDTH, array.astype("<f2")
    elif kind == "sum":
        width, data = _OFFSET_WIDTH, array
    else:
        largest = int(array.max(initial=0))
        width = next(w for w in _WIDTHS[kind] if largest < 1 << 8 * w)
        data = array.astype(f"<u{width}")
    planes = np.ascontiguousarray(data.reshape(-1, 1).view(np.uint8).T)
    # Run lengths and Huffman codes only: on histograms smaller and faster than full matching.
    stream = zlib.compressobj(strategy=zlib.Z_RLE)
    packed = bytes([width]) + stream.compress(planes.tobytes()) + stream.flush()
    return np.frombuffer(packed, np.uint8)


def _unpack(packed: NDArray[Any], kind: str, shape: tuple[int, ...]) -> NDArray[Any]:
    if not isinstance(packed, np.ndarray) or packed.dtype != np.uint8 or packed.ndim != 1:
        raise ValueError("is not a flat uint8 array")
    if packed.size < 2:
        raise ValueError("is empty")
    width = int(packed[0])
    if width not in _WIDTHS[kind]:
        raise ValueError(f"has an unknown width of {width} bytes")
    size = math.prod(shape) * width
    if packed.size > size + size // 100 + 100:  # zlib adds less to what does not compress
        raise ValueError("is longer than what it holds")
    stream = zlib.decompressobj()
    try:
        data = stream.decompress(packed[1:].tobytes(), size + 1)
    except zlib.error as error:
        raise ValueError(f"does not decompress ({error})") from None
    if len(data) != size or not stream.eof or stream.unused_data:
        raise ValueError(f"does not hold the expected {size} bytes")
    planes = np.frombuffer(data, np.uint8).reshape(width, -1)
    letter = {"count": "u", "histogram": "u", "real": "f", "half": "f", "sum": "i"}[kind]
    array = np.ascontiguousarray(planes.T).view(f"<{letter}{width}").reshape(shape)
    if kind == "count":
        if width == 8 and (array > np.iinfo(np.int64).max).any():
            raise ValueError("holds a count beyond 63 bits")
        return array.astype(np.int64)
    return array.astype(np.float64) if kind == "half" else array
