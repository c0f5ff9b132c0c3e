"""Activation reports against slow loops over samples and neurons, and against hostile senders."""

from __future__ import annotations

import math
import pickle
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from torch import Tensor, nn

from none_core.activations import (
    LABEL_HISTOGRAMS,
    LINEAR_SHARE,
    PREDICTION_EXTREMES,
    STATISTICS,
    TRIGGER_SHIFT,
    HistogramGrid,
    Report,
    ReportBuilder,
    ReportError,
    ReportSpec,
    build_report,
    decode_report,
)
from none_core.detection import DETECTORS
from none_core.neurons import NeuronMap

LABELS = 3
MAX_SAMPLES = 1000
INEXACT = ("unlikely_sum", "unlikely_square_sum")  # float64 sums: their last digits depend on order

Arrays = dict[str, np.ndarray]

# --- the grid -------------------------------------------------------------------------------------

MAGNITUDES = [m * 2.0**e for e in range(-3, 12) for m in (1.0, 1.5)] + [4096.0]


def slow_bin(value: float) -> int:
    if math.isnan(value):
        return 0
    passed = 0
    for magnitude in MAGNITUDES:
        if abs(value) >= magnitude:
            passed += 1
    return 32 + passed if value >= 0 else 31 - passed


def test_edges_are_ascending_and_symmetric_and_cover_the_bins() -> None:
    edges = HistogramGrid.EDGES

    assert len(edges) == HistogramGrid.BINS + 1 == 65
    assert (np.diff(edges) > 0).all()
    assert (edges == -edges[::-1]).all()
    assert edges[33:-1].tolist() == MAGNITUDES
    assert MAGNITUDES[0] == HistogramGrid.SMALLEST
    assert MAGNITUDES[-1] == HistogramGrid.LARGEST
    assert (edges[:-1] == HistogramGrid.CENTRES - HistogramGrid.HALF_WIDTHS).all()
    assert (edges[1:] == HistogramGrid.CENTRES + HistogramGrid.HALF_WIDTHS).all()


def test_bins_at_every_edge_and_next_to_it() -> None:
    edges = np.float32([*HistogramGrid.EDGES, 0.0, -0.0])
    below, above = np.nextafter(edges, np.float32(-np.inf)), np.nextafter(edges, np.float32(np.inf))
    values = np.concatenate([edges, below, above])

    bins = HistogramGrid.bins(torch.from_numpy(values))

    assert bins.tolist() == [slow_bin(float(v)) for v in values]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.0, 32),
        (-0.0, 32),
        (1e-45, 32),  # the smallest subnormal number
        (-1e-45, 31),
        (float("inf"), 63),
        (float("-inf"), 0),
        (3e38, 63),
        (-3e38, 0),
        (float("nan"), 0),
        (-float("nan"), 0),
    ],
)
def test_bins_of_special_values(value: float, expected: int) -> None:
    assert HistogramGrid.bins(torch.tensor([value], dtype=torch.float32)).tolist() == [expected]


@given(st.lists(st.floats(width=32), min_size=1, max_size=20))
def test_bins_agree_with_walking_along_the_edges(values: list[float]) -> None:
    bins = HistogramGrid.bins(torch.tensor(values, dtype=torch.float32))

    assert bins.tolist() == [slow_bin(v) for v in values]


def test_bins_keep_the_shape_of_a_strided_view() -> None:
    values = torch.arange(-12.0, 12.0).reshape(4, 6).T[::2]

    bins = HistogramGrid.bins(values)

    assert bins.tolist() == [[slow_bin(v) for v in row] for row in values.tolist()]


# --- data and the slow oracle -------------------------------------------------------------------


@dataclass
class Samples:
    """What a reader returns for n samples, and their labels."""

    reads: list[Tensor]  # (n, C, *positions) for each layer
    logits: Tensor  # (n, LABELS)
    labels: Tensor  # (n,)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice) -> Samples:
        return Samples([r[rows] for r in self.reads], self.logits[rows], self.labels[rows])


LAYERS = ((2, (2, 2)), (1, (3,)), (2, ()))  # channels and positions
NEURONS = 5


def draw_samples(
    seed: int, n: int, kinds: Sequence[str] = ("small", "large", "edges", "special")
) -> Samples:
    """Values of many magnitudes; probabilities that are nowhere near 0.1 and 0.9."""
    rng = np.random.default_rng(seed)
    special = [0.0, -0.0, np.inf, -np.inf, 1e-45, -1e-45]

    def values(shape: tuple[int, ...]) -> Tensor:
        drawn = {
            "small": rng.normal(size=shape),
            "large": rng.normal(size=shape) * 1e4,
            "edges": rng.choice(HistogramGrid.EDGES, size=shape),
            "special": rng.choice(special, size=shape),
        }
        which = rng.choice(list(kinds), size=shape)
        return torch.from_numpy(
            sum(np.where(which == kind, drawn[kind], 0.0) for kind in kinds)
        ).float()

    logits = np.zeros((n, LABELS))
    logits[np.arange(n), rng.integers(LABELS, size=n)] = rng.choice([0.3, 2.0, 8.0], size=n)
    return Samples(
        [values((n, channels, *positions)) for channels, positions in LAYERS],
        torch.from_numpy(logits).float(),
        torch.from_numpy(rng.integers(LABELS, size=n)),
    )


def finite_samples(seed: int, n: int) -> Samples:
    return draw_samples(seed, n, ("small", "large", "edges"))


datasets = st.builds(finite_samples, st.integers(0, 2**32 - 1), st.integers(0, 12))
everything = ReportSpec(NEURONS, LABELS, frozenset(STATISTICS))
specs = st.sets(st.sampled_from(STATISTICS)).map(
    lambda s: ReportSpec(NEURONS, LABELS, frozenset(s))
)


def report_of(
    samples: Samples,
    spec: ReportSpec = everything,
    *,
    splits: Iterable[int] = (),
    min_count: int = 1,
) -> Report:
    builder = ReportBuilder(spec)
    bounds = sorted({0, len(samples), *(s for s in splits if s < len(samples))})
    for start, stop in pairwise(bounds):
        batch = samples[start:stop]
        builder.add(batch.reads, batch.logits, batch.labels)
    return builder.report(min_count)


def slow_report(samples: Samples, min_count: int = 1) -> Arrays:
    """All statistics, sample by sample, neuron by neuron, position by position."""
    k, j = LABELS, NEURONS
    out: Arrays = {
        "predictions": np.zeros((k, k)),
        "histograms": np.zeros((k, j, 64)),
        "sums": np.zeros((k, j)),
        "at_least_zero": np.zeros(j),
        "positions": np.zeros(j),
        "confident_count": np.zeros(k),
        "confident_max": np.full((k, j), -np.inf),
        "unlikely_count": np.zeros(k),
        "unlikely_sum": np.zeros((k, j)),
        "unlikely_square_sum": np.zeros((k, j)),
        "probes": np.zeros(k),
        "mask_size": np.zeros(k),
        "mask_success": np.zeros(k),
        "shift": np.zeros((k, j)),
    }
    for i in range(len(samples)):
        label = int(samples.labels[i])
        logits = samples.logits[i].tolist()
        exps = [math.exp(z) for z in logits]
        probabilities = [e / sum(exps) for e in exps]
        out["predictions"][label, logits.index(max(logits))] += 1
        for c, p in enumerate(probabilities):
            out["confident_count"][c] += p > 0.9
            out["unlikely_count"][c] += p < 0.1
        neuron = 0
        for read in samples.reads:
            for channel in read[i]:
                values = channel.flatten().tolist()
                out["positions"][neuron] += len(values)
                out["at_least_zero"][neuron] += sum(v >= 0 for v in values)
                value = max(values)
                out["histograms"][label, neuron, slow_bin(value)] += 1
                out["sums"][label, neuron] += round(min(max(value, -6144.0), 6144.0) * 2**16)
                for c, p in enumerate(probabilities):
                    if p > 0.9:
                        out["confident_max"][c, neuron] = max(
                            out["confident_max"][c, neuron], value
                        )
                    if p < 0.1:
                        with np.errstate(invalid="ignore"):  # infinity - infinity
                            out["unlikely_sum"][c, neuron] += value
                        out["unlikely_square_sum"][c, neuron] += value * value
                neuron += 1
    return leave_out(out, len(samples), min_count)


def leave_out(out: Arrays, total: int, min_count: int) -> Arrays:
    for c in range(LABELS):
        if out["predictions"][c].sum() < min_count:
            out["predictions"][c] = out["histograms"][c] = out["sums"][c] = 0
        if out["confident_count"][c] < min_count:
            out["confident_count"][c], out["confident_max"][c] = 0, -np.inf
        if out["unlikely_count"][c] < min_count:
            out["unlikely_count"][c] = 0
            out["unlikely_sum"][c] = out["unlikely_square_sum"][c] = 0
    if total < min_count:
        out["at_least_zero"][:] = out["positions"][:] = 0
    return out


def assert_same(arrays: Arrays, expected: Arrays, inexact: Sequence[str] = INEXACT) -> None:
    """Exactly equal, but for sums of floats; all differing fields are listed."""
    assert arrays.keys() == expected.keys()
    different = [
        f"{name}: {arrays[name]} instead of {expected[name]}"
        for name in arrays
        if not (
            np.allclose(arrays[name], expected[name], rtol=1e-9, atol=1e-6)
            if name in inexact
            else np.array_equal(arrays[name], expected[name])
        )
    ]
    assert not different, "\n".join(different)


# --- building -------------------------------------------------------------------------------------


@given(datasets, st.integers(1, 5), st.sets(st.integers(1, 11)))
def test_report_equals_a_loop_over_samples_and_neurons(
    samples: Samples, min_count: int, splits: set[int]
) -> None:
    report = report_of(samples, splits=splits, min_count=min_count)

    assert_same(report.arrays, slow_report(samples, min_count))


@given(datasets, specs)
def test_report_holds_the_asked_statistics_and_no_more(samples: Samples, spec: ReportSpec) -> None:
    report = report_of(samples, spec)

    names = {
        LABEL_HISTOGRAMS: {"histograms", "sums"},
        LINEAR_SHARE: {"at_least_zero", "positions"},
        PREDICTION_EXTREMES: {
            "confident_count",
            "confident_max",
            "unlikely_count",
            "unlikely_sum",
            "unlikely_square_sum",
        },
        TRIGGER_SHIFT: {"probes", "mask_size", "mask_success", "shift"},
    }
    wanted = {"predictions"}.union(*(names[s] for s in spec.statistics))
    slow = slow_report(samples)
    assert_same(report.arrays, {name: slow[name] for name in wanted})


@given(st.integers(0, 2**32 - 1), st.integers(1, 12))
def test_infinities_and_signed_zeros_are_counted(seed: int, n: int) -> None:
    samples = draw_samples(seed, n, ("special",))
    spec = ReportSpec(NEURONS, LABELS, frozenset({LABEL_HISTOGRAMS, LINEAR_SHARE}))

    report = report_of(samples, spec)

    slow = slow_report(samples)
    assert_same(report.arrays, {name: slow[name] for name in spec.fields()})


def test_nan_values_count_as_lowest_and_stay_inside_the_wire_form() -> None:
    samples = finite_samples(seed=0, n=20)
    samples.reads[2][:] = torch.nan
    spec = ReportSpec(NEURONS, LABELS, frozenset({LABEL_HISTOGRAMS, LINEAR_SHARE}))

    report = report_of(samples, spec)

    assert (report["histograms"][:, 3:, 0] == report.counts[:, None]).all()
    assert (report["at_least_zero"][3:] == 0).all()
    received = decode_report(report.encode(), spec, sender="a", max_samples=20)
    assert np.isfinite(received.moments()[0][report.counts > 0]).all()


def test_the_same_batches_give_the_same_bits() -> None:
    samples = finite_samples(seed=3, n=60)

    first = report_of(samples, splits=(7, 20, 41))
    again = report_of(samples, splits=(7, 20, 41))

    assert_same(first.arrays, again.arrays, inexact=())


def test_memory_does_not_grow_with_the_samples() -> None:
    samples = finite_samples(seed=4, n=50)
    builder = ReportBuilder(everything)
    builder.add(samples.reads, samples.logits, samples.labels)
    once = len(pickle.dumps(builder))

    for _ in range(9):
        builder.add(samples.reads, samples.logits, samples.labels)

    assert abs(len(pickle.dumps(builder)) - once) < 100


def test_reports_so_far_do_not_change_when_more_is_added() -> None:
    samples = finite_samples(seed=5, n=30)
    builder = ReportBuilder(everything)
    builder.add(samples[:10].reads, samples[:10].logits, samples[:10].labels)
    early = builder.report(min_count=4)

    builder.add(samples[10:].reads, samples[10:].logits, samples[10:].labels)

    assert_same(early.arrays, slow_report(samples[:10], min_count=4))
    assert_same(builder.report().arrays, slow_report(samples))


@pytest.mark.parametrize("label", [-1, LABELS])
def test_labels_out_of_range_are_an_error(label: int) -> None:
    samples = finite_samples(seed=6, n=4)
    samples.labels[1] = label

    with pytest.raises((ValueError, RuntimeError, IndexError)):
        report_of(samples)


def test_a_model_with_another_number_of_classes_is_an_error() -> None:
    samples = finite_samples(seed=6, n=4)
    samples.logits = torch.zeros(4, LABELS + 1)

    with pytest.raises(ValueError, match=r"logits must be \(n, 3\), got \(4, 4\)"):
        report_of(samples)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 2), "at least one neuron"),
        ((1, 1), "two labels"),
        ((1, 2, frozenset({"gradients"})), "gradients"),
    ],
)
def test_spec_refuses_what_cannot_be(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReportSpec(*arguments)


# --- building from a model ------------------------------------------------------------------------


class SmallNet(nn.Module):
    """Integer weights and inputs: every value is exact, in whatever order it is added up."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.norm = nn.BatchNorm2d(2, eps=0.25)
        self.dropout = nn.Dropout(0.5)
        self.hidden = nn.Linear(2 * 3 * 3, 3)
        self.out = nn.Linear(3, LABELS)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in (*self.conv.parameters(), *self.hidden.parameters()):
                parameter.copy_(torch.randint(-2, 3, parameter.shape, generator=generator))
            self.out.weight.copy_(torch.eye(3) / 4)
            self.norm.running_mean.copy_(torch.tensor([1.0, -2.0]))
            self.norm.running_var.fill_(0.75)  # with eps, exactly 1

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        return self.out(self.dropout(torch.relu(self.hidden(x.flatten(1)))))


def integer_images(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 3, (n, 1, 5, 5), generator=generator).float()
    return images, torch.randint(0, LABELS, (n,), generator=generator)


def read_by_hand(model: SmallNet, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """One image at a time, in evaluation mode."""
    convolved, hidden, logits = [], [], []
    for image in images:
        planes = model.conv(image[None])[0]
        planes = planes - model.norm.running_mean[:, None, None]
        convolved.append(planes)
        hidden.append(model.hidden(planes.clamp(min=0).flatten()))
        logits.append(model.out(hidden[-1].clamp(min=0)))
    return [torch.stack(convolved), torch.stack(hidden)], torch.stack(logits)


@pytest.mark.parametrize("batch_size", [1, 7, 40])
def test_build_report_reads_convolutions_and_linear_layers(batch_size: int) -> None:
    model = SmallNet()
    neurons = NeuronMap.trace(model, torch.zeros(2, 1, 5, 5))
    images, labels = integer_images(40)
    batches = zip(images.split(batch_size), labels.split(batch_size), strict=True)

    report = build_report(model, neurons, batches, everything, min_count=2)

    with torch.no_grad():
        reads, logits = read_by_hand(model, images)
    assert_same(report.arrays, slow_report(Samples(reads, logits, labels), min_count=2))
    assert report["positions"].tolist() == [40 * 9] * 2 + [40] * 3


def test_build_report_takes_a_reader_that_was_made_before() -> None:
    model = SmallNet()
    neurons = NeuronMap.trace(model, torch.zeros(2, 1, 5, 5))
    reader = neurons.reader(model)
    inputs: list[Tensor] = []

    def counting(x: Tensor) -> Any:
        inputs.append(x)
        return reader(x)

    report = build_report(model, neurons, [integer_images(40)], everything, reader=counting)

    assert len(inputs) == 1
    assert_same(
        report.arrays,
        build_report(model, neurons, [integer_images(40)], everything).arrays,
        inexact=(),
    )


def test_build_report_restores_every_modules_mode() -> None:
    model = SmallNet().train()
    model.norm.eval()  # frozen statistics
    neurons = NeuronMap.trace(model, torch.zeros(2, 1, 5, 5))
    modes = {name: module.training for name, module in model.named_modules()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def failing() -> Iterable[tuple[Tensor, Tensor]]:
        yield integer_images(4)
        raise OSError("disk")

    build_report(model, neurons, [integer_images(4)], everything)
    after_success = {name: module.training for name, module in model.named_modules()}
    with pytest.raises(OSError, match="disk"):
        build_report(model, neurons, failing(), everything)

    assert after_success == modes
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(model.state_dict()[name], state[name]) for name in state)


def test_accuracy_and_labels_that_nobody_holds() -> None:
    samples = finite_samples(seed=7, n=40)
    samples.labels[samples.labels == 1] = 2

    report = report_of(samples)

    hits = sum(
        int(row.argmax()) == int(label)
        for row, label in zip(samples.logits, samples.labels, strict=True)
    )
    assert report.accuracy == hits / 40
    assert report.counts[1] == 0
    mean, variance = report.moments()
    for statistic in (mean, variance, report.quantiles(0.5), report.tail_shares(0.0)):
        assert np.isnan(statistic[1]).all()
        assert np.isfinite(statistic[[0, 2]]).all()
    assert math.isnan(report_of(samples, min_count=41).accuracy)


# --- what a report can tell -----------------------------------------------------------------------


def one_neuron(values: Sequence[float]) -> tuple[Report, np.ndarray]:
    """Report over one neuron and one label, and the values as float32."""
    exact = np.float32(values)
    builder = ReportBuilder(ReportSpec(1, 2, frozenset({LABEL_HISTOGRAMS})))
    n = len(exact)
    builder.add(
        [torch.from_numpy(exact)[:, None]], torch.zeros(n, 2), torch.zeros(n, dtype=torch.long)
    )
    return builder.report(), exact.astype(np.float64)


def width_at(value: float) -> float:
    b = slow_bin(value)
    return float(HistogramGrid.EDGES[b + 1] - HistogramGrid.EDGES[b])


inside_grid = st.lists(
    st.one_of(
        st.floats(-6144, 6144, width=32),
        st.floats(-2, 2, width=32),
        st.sampled_from(HistogramGrid.EDGES.tolist()),
    ),
    min_size=1,
    max_size=30,
)


@given(inside_grid)
def test_built_mean_is_exact_and_variance_as_good_as_the_bins(values: list[float]) -> None:
    report, exact = one_neuron(values)

    mean, variance = report.moments()

    assert abs(mean[0, 0] - exact.mean()) <= 2**-17 + 1e-7 * abs(exact.mean())
    centres = np.array([HistogramGrid.CENTRES[slow_bin(v)] for v in exact])
    assert variance[0, 0] == pytest.approx(centres.var(), rel=1e-4, abs=1e-5 * (centres**2).max())


@given(inside_grid)
def test_received_mean_is_within_the_stated_error(values: list[float]) -> None:
    report, exact = one_neuron(values)

    received = decode_report(report.encode(), report.spec, sender="a", max_samples=30)

    half_width = np.mean([width_at(v) / 2 for v in exact])
    rounding = 2**-16 + 1e-5 * np.abs(exact).max()
    assert abs(received.moments()[0][0, 0] - exact.mean()) <= half_width / 254 + rounding
    assert received.moments()[1][0, 0] == report.moments()[1][0, 0]


@given(inside_grid, st.integers(0, 16))
def test_quantiles_lie_in_the_bin_of_the_exact_lower_quantile(values: list[float], q: int) -> None:
    report, exact = one_neuron(values)

    quantile = report.quantiles(q / 16)[0, 0]

    lower = sorted(exact)[max(math.ceil(q * len(exact) / 16), 1) - 1]
    edges = HistogramGrid.EDGES
    assert edges[slow_bin(lower)] <= quantile <= edges[slow_bin(lower) + 1]
    assert abs(quantile - lower) <= max(HistogramGrid.SMALLEST, abs(lower) / 2)


def test_quantiles_beyond_the_grid_stay_at_its_end() -> None:
    report, _ = one_neuron([-1e9, -np.inf, 1e9, np.inf])

    assert -6144 <= report.quantiles(0.0)[0, 0] <= -4096
    assert 4096 <= report.quantiles(1.0)[0, 0] <= 6144


@pytest.mark.parametrize("q", [-0.01, 1.01, float("nan")])
def test_quantiles_outside_zero_and_one_are_an_error(q: float) -> None:
    with pytest.raises(ValueError, match="q must be in"):
        one_neuron([1.0])[0].quantiles(q)


@given(inside_grid, st.sampled_from([0.0, *MAGNITUDES]))
def test_tail_shares_are_exact_at_edges_from_zero_upwards(
    values: list[float], threshold: float
) -> None:
    report, exact = one_neuron(values)

    share = report.tail_shares(threshold)[0, 0]

    assert share == sum(v >= threshold for v in exact) / len(exact)


@given(inside_grid, st.one_of(st.floats(-7000, 7000), st.sampled_from([-np.inf, np.inf])))
def test_tail_shares_err_by_the_share_of_one_bin_at_most(
    values: list[float], threshold: float
) -> None:
    report, exact = one_neuron(values)

    share = report.tail_shares(threshold)[0, 0]

    # An edge below zero belongs to the bin below it, which is split at its very end.
    split = {slow_bin(threshold), slow_bin(np.nextafter(threshold, np.inf))}
    of_split_bin = sum(slow_bin(v) in split for v in exact) / len(exact)
    true_share = sum(v >= threshold for v in exact) / len(exact)
    assert abs(share - true_share) <= of_split_bin + 1e-12


# --- triggers -------------------------------------------------------------------------------------

searched = ReportSpec(NEURONS, LABELS, frozenset({TRIGGER_SHIFT}))


def triggers(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Which classes were probed, and sizes, successes and shifts of all of them."""
    rng = np.random.default_rng(seed)
    return (
        rng.random(LABELS) < 0.7,
        rng.random(LABELS),
        rng.random(LABELS),
        rng.uniform(-1000, 1000, size=(LABELS, NEURONS)),
    )


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=4))
def test_what_was_found_is_averaged_over_the_probes(seeds: list[int]) -> None:
    reports = [report_of(finite_samples(1, 9), searched) for _ in seeds]
    found = [triggers(seed) for seed in seeds]
    whole = reports[0].with_trigger_shift(*found[0])
    for report, one in zip(reports[1:], found[1:], strict=True):
        whole = whole.merge(report.with_trigger_shift(*one))

    received = decode_report(whole.encode(), searched, sender="a", max_samples=100)

    probed, size, success, shift = received.trigger_shift()
    for k in range(LABELS):
        mine = [one for one in found if one[0][k]]
        assert probed[k] == bool(mine)
        if not mine:
            assert np.isnan(size[k])
            assert np.isnan(success[k])
            assert np.isnan(shift[k]).all()
            continue
        assert size[k] == pytest.approx(np.mean([one[1][k] for one in mine]), rel=1e-5)
        assert success[k] == pytest.approx(np.mean([one[2][k] for one in mine]), rel=1e-5)
        total = np.sum([one[3][k] for one in mine], axis=0)
        error = np.abs(shift[k] * len(mine) - total)
        assert (error <= np.abs(total) * 2.0**-11 + 1e-4).all()  # the digits of a float16


def test_the_report_itself_stays_without_them() -> None:
    report = report_of(finite_samples(1, 9))
    before = {name: array.copy() for name, array in report.arrays.items()}
    with_them = report.with_trigger_shift(*TRIGGERS)
    assert_same(report.arrays, before, inexact=())
    assert not report.trigger_shift()[0].any()
    assert with_them.trigger_shift()[0].all()
    others = before.keys() - searched.fields().keys()
    assert all(np.array_equal(with_them[name], before[name]) for name in others)


def test_a_probe_that_had_nothing_to_look_at_leaves_everything_zero() -> None:
    report = report_of(finite_samples(1, 9), searched)
    nothing = np.zeros(LABELS, dtype=bool), np.zeros(LABELS), np.zeros(LABELS), np.zeros((0, 0))
    assert_same(report.with_trigger_shift(*nothing).arrays, report.arrays, inexact=())


@pytest.mark.parametrize("probes", [1, 16])
def test_the_largest_shifts_of_the_most_probes_are_let_in(probes: int) -> None:
    report = report_of(finite_samples(1, 9), searched)
    arrays = report.arrays | {
        "probes": np.full(LABELS, probes),
        "mask_size": np.full(LABELS, float(probes)),
        "mask_success": np.full(LABELS, float(probes)),
        "shift": np.full((LABELS, NEURONS), 1000.0 * probes),
    }
    received = decode_report(Report(searched, arrays).encode(), searched, sender="a", max_samples=9)
    assert (received.trigger_shift()[3] == 1000).all()


# --- merging --------------------------------------------------------------------------------------


def joined(*parts: Samples) -> Samples:
    return Samples(
        [torch.cat(reads) for reads in zip(*(p.reads for p in parts), strict=True)],
        torch.cat([p.logits for p in parts]),
        torch.cat([p.labels for p in parts]),
    )


@given(datasets, datasets)
def test_merging_equals_reporting_on_all_data(a: Samples, b: Samples) -> None:
    merged = report_of(a).merge(report_of(b))

    assert_same(merged.arrays, slow_report(joined(a, b)))


@given(datasets, datasets, datasets, st.integers(1, 4))
def test_merging_is_commutative_and_associative(
    a: Samples, b: Samples, c: Samples, min_count: int
) -> None:
    x, y, z = (report_of(part, min_count=min_count) for part in (a, b, c))

    assert_same(x.merge(y).arrays, y.merge(x).arrays, inexact=())
    assert_same(x.merge(y).merge(z).arrays, x.merge(y.merge(z)).arrays)


def test_merging_leaves_its_arguments_alone() -> None:
    a, b = finite_samples(1, 20), finite_samples(2, 20)
    x, y = report_of(a), report_of(b)
    x.moments()

    merged = x.merge(y)

    assert_same(x.arrays, slow_report(a))
    assert_same(y.arrays, slow_report(b))
    assert merged.counts.sum() == 40


def test_merging_received_reports_counts_beyond_one_byte() -> None:
    report, _ = one_neuron([1.0] * 200)
    received = decode_report(report.encode(), report.spec, sender="a", max_samples=200)

    merged = received.merge(received)

    assert merged["histograms"].max() == 400
    assert merged.moments()[0][0, 0] == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize(
    "other",
    [
        ReportSpec(NEURONS + 1, LABELS, frozenset(STATISTICS)),
        ReportSpec(NEURONS, LABELS + 1, frozenset(STATISTICS)),
        ReportSpec(NEURONS, LABELS, frozenset({LINEAR_SHARE})),
    ],
)
def test_reports_of_different_specs_do_not_merge(other: ReportSpec) -> None:
    with pytest.raises(ValueError, match="do not merge"):
        ReportBuilder(everything).report().merge(ReportBuilder(other).report())


def test_merging_more_samples_than_a_histogram_can_count_is_an_error() -> None:
    report, _ = one_neuron([1.0])
    many = Report(
        report.spec, {n: a * (2**31 if n != "sums" else 1) for n, a in report.arrays.items()}
    )

    with pytest.raises(ValueError, match="too many samples"):
        many.merge(many)


# --- the wire form --------------------------------------------------------------------------------


@given(datasets.filter(len), specs, st.integers(1, 3))
def test_round_trip_is_exact_but_for_the_sums(
    samples: Samples, spec: ReportSpec, min_count: int
) -> None:
    report = report_of(samples, spec, min_count=min_count)
    if not report.counts.any():
        return

    encoded = report.encode()
    received = decode_report(encoded, spec, sender="a", max_samples=len(samples))

    assert all(array.dtype == np.uint8 and array.ndim == 1 for array in encoded.values())
    assert received.arrays.keys() == report.arrays.keys()
    for name, array in report.arrays.items():
        assert received[name].dtype == array.dtype
        if name != "sums":
            assert np.array_equal(received[name], array), name
    if LABEL_HISTOGRAMS in spec.statistics:
        half_widths = (report["histograms"] * HistogramGrid.HALF_WIDTHS).sum(-1)
        largest = (report["histograms"] * np.abs(HistogramGrid.CENTRES)).sum(-1)
        error = np.abs(received["sums"] - report["sums"]) / 2**16
        assert (error <= half_widths / 254 + 1e-5 * largest + 2**-16).all()


@given(datasets.filter(len))
def test_received_reports_can_be_sent_on(samples: Samples) -> None:
    report = report_of(samples)
    received = decode_report(report.encode(), everything, sender="a", max_samples=12)

    again = decode_report(received.encode(), everything, sender="b", max_samples=12)

    assert_same(again.arrays, received.arrays, inexact=())


def test_an_mnist_nets_report_is_below_100_kilobytes() -> None:
    rng = np.random.default_rng(0)
    spec = ReportSpec(570, 10, frozenset({LABEL_HISTOGRAMS}))
    builder = ReportBuilder(spec)
    # The magnitudes of such a net after a few epochs.
    means, spreads = rng.normal(size=(10, 570)), rng.uniform(0.2, 1, size=570)
    for _ in range(6):
        labels = rng.integers(10, size=1000)
        values = torch.from_numpy(means[labels] + spreads * rng.normal(size=(1000, 570))).float()
        logits = torch.nn.functional.one_hot(torch.from_numpy(labels), 10).float()
        builder.add(
            [values[:, :20, None], values[:, 20:70, None], values[:, 70:]],
            logits,
            torch.from_numpy(labels),
        )

    encoded = builder.report().encode()

    assert sum(array.nbytes for array in encoded.values()) < 100_000


# --- hostile senders ------------------------------------------------------------------------------


def packed(values: Any, width: int, kind: str = "u") -> np.ndarray:
    """Pack the wire form again, independently: the width, then the planes of bytes."""
    flat = np.asarray(values).astype(f"<{kind}{width}").ravel()
    raw = flat.tobytes()
    planes = b"".join(raw[plane::width] for plane in range(width))
    return np.frombuffer(bytes([width]) + zlib.compress(planes), np.uint8)


#: Sizes, successes and shifts of triggers to each class; the shifts travel without loss.
TRIGGERS = (
    np.ones(LABELS, dtype=bool),
    np.array([0.25, 0.125, 0.5]),
    np.array([1.0, 0.9, 0.4]),
    np.arange(LABELS * NEURONS).reshape(LABELS, NEURONS) - 3.5,
)


def honest_report() -> Report:
    return report_of(finite_samples(seed=11, n=40)).with_trigger_shift(*TRIGGERS)


def honest() -> Arrays:
    return honest_report().encode()


def decode(fields: Any) -> Report:
    return decode_report(fields, everything, sender="client 7", max_samples=MAX_SAMPLES)


def histograms(change: Callable[[np.ndarray], None]) -> Arrays:
    array = honest_report()["histograms"].astype(np.int64)
    change(array)
    return honest() | {"histograms": packed(array, 4)}


def add_one(array: np.ndarray) -> None:
    array[1, 2, 3] += 1


def swap_labels(array: np.ndarray) -> None:
    array[:] = array[::-1].copy()


def wrap_around(array: np.ndarray) -> None:
    array[0, 0, 60:62] += 2**31


def without(name: str) -> Arrays:
    return {n: a for n, a in honest().items() if n != name}


def raw(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def dictionary_stream() -> np.ndarray:
    compressor = zlib.compressobj(zdict=bytes(range(9)))
    return raw(b"\x01" + compressor.compress(bytes(9)) + compressor.flush())


def padded_stream() -> np.ndarray:
    """Megabytes of empty blocks around nothing."""
    compressor = zlib.compressobj()
    empty = b"".join(compressor.flush(zlib.Z_FULL_FLUSH) for _ in range(3))[-5:]
    return raw(b"\x01" + b"\x78\x9c" + empty * 400_000)


def cut(name: str, end: int) -> Arrays:
    return honest() | {name: honest()[name][:end]}


def appended(name: str) -> Arrays:
    return honest() | {name: np.append(honest()[name], np.uint8(0))}


def nothing_confident(maximum: float) -> Arrays:
    """No sample is confidently of class 0, but there is a maximum over them."""
    count, maxima = (honest_report()[n].copy() for n in ("confident_count", "confident_max"))
    count[0], maxima[0] = 0, maximum
    return honest() | {
        "confident_count": packed(count, 8),
        "confident_max": packed(maxima, 8, "f"),
    }


def nothing_unlikely(total: float, squares: float) -> Arrays:
    """No sample is unlikely of class 0, but there are sums over them."""
    names = ("unlikely_count", "unlikely_sum", "unlikely_square_sum")
    count, sums, square_sums = (honest_report()[n].copy() for n in names)
    count[0], sums[0], square_sums[0] = 0, total, squares
    return honest() | {
        "unlikely_count": packed(count, 8),
        "unlikely_sum": packed(sums, 8, "f"),
        "unlikely_square_sum": packed(square_sums, 8, "f"),
    }


def sent(name: str, array: Any) -> Callable[[], Any]:
    return lambda: honest() | {name: array() if callable(array) else array}


def changed(name: str, index: Any, value: Any) -> Callable[[], Any]:
    """One number of the honest report is another one."""
    kind, _ = everything.fields()[name]
    width, letter = {"real": (8, "f"), "half": (2, "f")}.get(kind, (8, "u"))

    def make() -> Arrays:
        array = honest_report()[name].astype(np.float64 if letter == "f" else object)
        array[index] = value
        return honest() | {name: packed(array, width, letter)}

    return make


# fmt: off
ALL = slice(None)
WRAPS = 2**63 - 1  # in 64 bits, twice this plus 2 + n is n
ROW = int(honest_report()["predictions"][0].sum())
AS_MANY = [[WRAPS, 0, 0], [WRAPS, 0, 0], [3, 0, 0]]
Attack = tuple[Callable[[], Any], str, str]  # how to make it, the field and the reason it is given

MESSAGES: dict[str, Attack] = {
    "missing": (lambda: without("sums"), "sums", "is missing"),
    "nothing": (dict, "at_least_zero", "is missing"),
    "extra": (sent("weights", raw(b"12")), "'weights'", "not asked for"),
    "extra with a long name": (sent("w" * 10**6, raw(b"12")), "'www", "not asked for"),
    "extra, not all text": (lambda: honest() | {7: 0, "x": 0}, "'x'", "not asked for"),
    "float64": (sent("sums", np.zeros(9)), "sums", "not a flat uint8 array"),
    "int8": (sent("sums", np.zeros(9, np.int8)), "sums", "not a flat uint8 array"),
    "two dimensions": (sent("sums", raw(b"\x0112")[None]), "sums", "not a flat uint8 array"),
    "no dimension": (sent("sums", np.array(1, np.uint8)), "sums", "not a flat uint8 array"),
    "scalar": (sent("sums", np.uint8(1)), "sums", "not a flat uint8 array"),
    "bytes": (sent("sums", b"\x0112"), "sums", "not a flat uint8 array"),
    "objects": (sent("sums", np.array([object()] * 9)), "sums", "not a flat uint8 array"),
    "none": (sent("sums", None), "sums", "not a flat uint8 array"),
}

STREAMS: dict[str, Attack] = {
    "empty": (sent("sums", raw(b"")), "sums", "is empty"),
    "width only": (sent("sums", raw(b"\x01")), "sums", "is empty"),
    "width 3": (sent("predictions", packed([0] * 9, 2) + 1), "predictions", "width of 3"),
    "width 0": (sent("predictions", raw(b"\0abc")), "predictions", "width of 0"),
    "wide histograms": (sent("histograms", packed([0] * 960, 8)), "histograms", "width of 8"),
    "wide sums": (sent("sums", packed([0] * 15, 8)), "sums", "width of 8"),
    "half reals": (sent("unlikely_sum", packed([0] * 15, 4)), "unlikely_sum", "width of 4"),
    "garbage": (sent("predictions", raw(b"\x01garbage")), "predictions", "not decompress"),
    "dictionary": (sent("predictions", dictionary_stream), "predictions", "not decompress"),
    "truncated": (lambda: cut("histograms", -5), "histograms", "not hold the expected"),
    "no checksum": (lambda: cut("sums", -4), "sums", "not hold the expected 15 bytes"),
    "trailing": (lambda: appended("sums"), "sums", "not hold the expected 15 bytes"),
    "too short": (sent("predictions", packed([1] * 8, 8)), "predictions", "expected 72 bytes"),
    "too long": (sent("predictions", packed([1] * 10, 8)), "predictions", "expected 72 bytes"),
    "padded": (sent("predictions", padded_stream), "predictions", "longer than what it holds"),
}

COUNTS: dict[str, Attack] = {
    "none": (changed("predictions", ALL, 0), "predictions", "no sample"),
    "too many": (changed("predictions", (0, 0), 1001), "predictions", "more than the 1000"),
    "negative": (changed("predictions", (0, 0), 2**64 - 5), "predictions", "beyond 63 bits"),
    "2**63": (changed("predictions", (0, 0), 2**63), "predictions", "beyond 63 bits"),
    "2**63 - 1": (changed("predictions", (0, 0), WRAPS), "predictions", "more than the 1000"),
    "label's sum wraps": (
        changed("predictions", 0, [WRAPS, WRAPS, 2 + ROW]), "predictions", "more than the 1000",
    ),
    "total wraps": (changed("predictions", ALL, AS_MANY), "predictions", "more than the 1000"),
    "histogram too full": (lambda: histograms(add_one), "histograms", "do not sum"),
    "histograms swapped": (lambda: histograms(swap_labels), "histograms", "do not sum"),
    "histogram wraps": (lambda: histograms(wrap_around), "histograms", "do not sum"),
    "share above one": (changed("at_least_zero", 0, 161), "at_least_zero", "exceeds the"),
    "negative share": (changed("at_least_zero", 0, 2**64 - 1), "at_least_zero", "beyond 63"),
    "positions": (changed("positions", 0, 2**62), "positions", "claims more than 1000 samples"),
}

EXTREMES: dict[str, Attack] = {
    "confident": (changed("confident_count", 0, 1001), "confident_count", "more than 1000"),
    "all confident": (changed("confident_count", ALL, 600), "confident_count", "more than 1000"),
    "confident wraps": (
        changed("confident_count", ALL, [WRAPS, WRAPS, 12]), "confident_count", "more than 1000",
    ),
    "unlikely": (changed("unlikely_count", 0, 1001), "unlikely_count", "more than 1000"),
    "maximum nan": (changed("confident_max", 0, np.nan), "confident_max", "not finite"),
    "maximum inf": (changed("confident_max", 0, np.inf), "confident_max", "not finite"),
    "maximum -inf": (changed("confident_max", 0, -np.inf), "confident_max", "not finite"),
    "maximum 1e300": (changed("confident_max", 0, 1e300), "confident_max", "not finite"),
    "maximum of none": (lambda: nothing_confident(0.0), "confident_max", "not -inf where"),
    "sum nan": (changed("unlikely_sum", 0, np.nan), "unlikely_sum", "not finite"),
    "sum inf": (changed("unlikely_sum", 0, np.inf), "unlikely_sum", "not finite"),
    "sum 1e300": (changed("unlikely_sum", 0, -1e300), "unlikely_sum", "not finite"),
    "sum of none": (lambda: nothing_unlikely(1, 0), "unlikely_sum", "not zero where"),
    "squares nan": (changed("unlikely_square_sum", 0, np.nan), "unlikely_square_sum", "finite"),
    "squares inf": (changed("unlikely_square_sum", 0, np.inf), "unlikely_square_sum", "finite"),
    "squares -1": (changed("unlikely_square_sum", 0, -1), "unlikely_square_sum", "negative"),
    "squares 1e300": (changed("unlikely_square_sum", 0, 1e300), "unlikely_square_sum", "finite"),
    "squares of none": (lambda: nothing_unlikely(0, 1), "unlikely_square_sum", "not zero where"),
    "squares too small": (
        changed("unlikely_square_sum", ALL, 1e-3), "unlikely_square_sum", "smaller than its sum",
    ),
}

PROBES: dict[str, Attack] = {
    "too many": (changed("probes", 0, 17), "probes", "more than 16 probes"),
    "huge": (changed("probes", 0, WRAPS), "probes", "more than 16 probes"),
    "negative": (changed("probes", 0, 2**64 - 1), "probes", "beyond 63 bits"),
    "probes of width 3": (sent("probes", packed([1] * 3, 2) + 1), "probes", "width of 3"),
    "size nan": (changed("mask_size", 0, np.nan), "mask_size", "not a share"),
    "size inf": (changed("mask_size", 0, np.inf), "mask_size", "not a share"),
    "size negative": (changed("mask_size", 0, -1e-9), "mask_size", "not a share"),
    "size above one": (changed("mask_size", 0, 1.001), "mask_size", "not a share"),
    "size of nothing": (changed("probes", 0, 0), "mask_size", "not zero where nothing"),
    "sizes as float32": (sent("mask_size", packed([0] * 3, 4, "f")), "mask_size", "width of 4"),
    "success nan": (changed("mask_success", 0, np.nan), "mask_success", "not a share"),
    "success -inf": (changed("mask_success", 0, -np.inf), "mask_success", "not a share"),
    "success negative": (changed("mask_success", 0, -0.5), "mask_success", "not a share"),
    "success above one": (changed("mask_success", 0, 2), "mask_success", "not a share"),
    "shift nan": (changed("shift", (0, 0), np.nan), "shift", "not finite"),
    "shift inf": (changed("shift", (0, 0), -np.inf), "shift", "not finite"),
    "shift beyond": (changed("shift", (0, 0), 1001), "shift", "beyond 1000"),
    "shift of nothing": (
        lambda: changed("probes", 2, 0)() | {
            n: changed(n, 2, 0)()[n] for n in ("mask_size", "mask_success")
        }, "shift", "not zero where nothing",
    ),
    "shift as float64": (sent("shift", packed([0] * 15, 8, "f")), "shift", "width of 8"),
    "shift truncated": (lambda: cut("shift", -5), "shift", "not hold the expected 30 bytes"),
    "shift too short": (sent("shift", packed([0] * 14, 2, "f")), "shift", "expected 30 bytes"),
}

ATTACKS = {
    f"{group}: {name}": attack
    for group, attacks in (
        ("message", MESSAGES), ("stream", STREAMS), ("counts", COUNTS), ("extremes", EXTREMES),
        ("probes", PROBES),
    )
    for name, attack in attacks.items()
}
# fmt: on


def test_the_honest_report_that_the_attacks_start_from_is_accepted() -> None:
    report = decode(honest())

    sent = honest_report()
    assert_same(report.arrays | {"sums": sent["sums"]}, sent.arrays, inexact=())
    for name, (kind, _) in everything.fields().items():
        if kind in ("count", "real", "half"):
            width, letter = {"real": (8, "f"), "half": (2, "f")}.get(kind, (8, "u"))
            rewritten = honest() | {name: packed(sent[name], width, letter)}
            assert np.array_equal(decode(rewritten)[name], sent[name])
    assert (sent["confident_count"] > 0).all()
    assert (sent["unlikely_count"] > 0).all()


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_are_refused_by_name(attack: str) -> None:
    make, field, reason = ATTACKS[attack]
    fields = make()

    with pytest.raises(ReportError) as refused:
        decode(fields)

    assert refused.value.sender == "client 7"
    assert refused.value.field.startswith(field)
    assert reason in refused.value.reason
    message = str(refused.value)
    assert all(part in message for part in ("client 7", field, reason))
    assert len(message) < 300


def test_max_samples_is_the_most_that_is_accepted() -> None:
    report = honest_report()  # of 40 samples

    accepted = decode_report(report.encode(), everything, sender="a", max_samples=40)

    assert accepted.counts.sum() == 40
    with pytest.raises(ReportError, match="claims 40 samples, more than the 39 allowed"):
        decode_report(report.encode(), everything, sender="a", max_samples=39)


def test_a_zip_bomb_is_refused_at_once_and_in_little_memory() -> None:
    spec = ReportSpec(570, 10, frozenset({LABEL_HISTOGRAMS}))
    fields = ReportBuilder(spec).report().encode()
    compressor = zlib.compressobj(9)
    start = compressor.compress(bytes(1 << 20)) + compressor.flush(zlib.Z_FULL_FLUSH)
    mebibyte = compressor.compress(bytes(1 << 20)) + compressor.flush(zlib.Z_FULL_FLUSH)
    fields["histograms"] = raw(b"\x04" + start + mebibyte * 1023)  # a gibibyte of zeros
    agreed = 10 * 570 * 64 * 4
    assert fields["histograms"].size < agreed  # not refused for its own length

    tracemalloc.start()
    began = time.perf_counter()
    with pytest.raises(ReportError, match=f"does not hold the expected {agreed} bytes"):
        decode_report(fields, spec, sender="a", max_samples=1000)
    seconds, peak = time.perf_counter() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 8 * agreed
    assert seconds < 2


def consistency_of(report: Report) -> None:
    """What the docstring of decode_report promises, in plain loops over Python's big integers."""
    a = {name: report[name].tolist() for name in report.arrays}
    assert 0 < sum(map(sum, a["predictions"])) <= MAX_SAMPLES
    assert all(n >= 0 for row in a["predictions"] for n in row)
    assert 0 <= report.accuracy <= 1
    for c in range(LABELS):
        assert 0 <= a["unlikely_count"][c] <= MAX_SAMPLES
        for j in range(NEURONS):
            histogram = a["histograms"][c][j]
            assert sum(histogram) == sum(a["predictions"][c]) == int(report.counts[c])
            lowest = sum(n * e for n, e in zip(histogram, HistogramGrid.EDGES, strict=False))
            highest = sum(n * e for n, e in zip(histogram, HistogramGrid.EDGES[1:], strict=False))
            slack = 1e-5 * (abs(lowest) + abs(highest)) + 1e-4
            assert lowest - slack <= a["sums"][c][j] / 2**16 <= highest + slack
            n, total = a["unlikely_count"][c], a["unlikely_sum"][c][j]
            assert math.isfinite(total)
            assert math.isfinite(a["unlikely_square_sum"][c][j])
            assert total**2 <= n * a["unlikely_square_sum"][c][j] * 1.0001 + 1e-5
            maximum = a["confident_max"][c][j]
            assert math.isfinite(maximum) if a["confident_count"][c] else maximum == -math.inf
    assert 0 <= sum(a["confident_count"]) <= MAX_SAMPLES
    assert all(0 <= x <= n for x, n in zip(a["at_least_zero"], a["positions"], strict=True))
    for c, probes in enumerate(a["probes"]):
        assert 0 <= probes <= 16
        assert 0 <= a["mask_size"][c] <= probes
        assert 0 <= a["mask_success"][c] <= probes
        assert all(-1000 * probes <= x <= 1000 * probes for x in a["shift"][c])


def decodes_or_is_refused(fields: Any) -> None:
    try:
        report = decode(fields)
    except ReportError:
        return
    consistency_of(report)
    for detector in (make() for make in DETECTORS.values()):
        summaries = {i: detector.summarise(report) for i in range(4)}
        detector.detect(summaries, np.zeros(NEURONS, dtype=np.int64))
    if 2 * report.counts.sum() <= MAX_SAMPLES:
        assert report.merge(report).accuracy == report.accuracy


FIELDS = sorted(everything.fields())


@settings(max_examples=300)
@given(st.sampled_from(FIELDS), st.binary(max_size=200))
def test_random_bytes_decode_or_are_refused(name: str, data: bytes) -> None:
    decodes_or_is_refused(honest() | {name: raw(data)})


@settings(max_examples=300)
@given(
    st.sampled_from(FIELDS),
    st.lists(st.tuples(st.integers(0, 10**4), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_changed_bytes_of_the_stream_decode_or_are_refused(
    name: str, changes: list[tuple[int, int]]
) -> None:
    fields = honest()
    fields[name] = fields[name].copy()
    for position, value in changes:
        fields[name][position % fields[name].size] = value

    decodes_or_is_refused(fields)


hostile_counts = st.one_of(
    st.integers(0, 50),
    st.sampled_from([1000, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1]),
)
hostile_reals = st.one_of(st.floats(), st.floats(-1e4, 1e4), st.sampled_from([0.0, 3.4e38, 1e300]))


@settings(max_examples=300)
@given(st.data())
@example(None)
def test_changed_numbers_decode_or_are_refused(data: Any) -> None:
    """Well-formed streams of dishonest numbers: what reaches the checks behind the decompressor."""
    fields = honest()
    if data is None:
        return decodes_or_is_refused(fields)
    for name in data.draw(st.sets(st.sampled_from(FIELDS), min_size=1, max_size=3)):
        kind, _ = everything.fields()[name]
        values = honest_report()[name]
        letter, width, hostile = {
            "count": ("u", 8, hostile_counts),
            "histogram": ("u", 4, st.integers(0, 2**32 - 1)),
            "sum": ("i", 1, st.integers(-128, 127)),
            "real": ("f", 8, hostile_reals),
            "half": ("f", 2, hostile_reals),
        }[kind]
        values = (np.zeros(values.shape) if kind == "sum" else values).astype(object)
        for _ in range(data.draw(st.integers(1, 3))):
            values.flat[data.draw(st.integers(0, values.size - 1))] = data.draw(hostile)
        fields[name] = packed(values, width, letter)
    decodes_or_is_refused(fields)


@pytest.mark.parametrize(
    "logits",
    [
        [[0.0] * 4] * 7,  # every label is likely for every sample ...
        [[9.0, 0.0, 0.0, 0.0]] * 7,  # ... or one is, and the others for none
        [[9.0, 0.0, 0.0, 0.0]] * 6 + [[0.0, 0.0, 9.0, 9.0]],
        [[-9.0, 0.0, 0.0, 0.0]] * 3 + [[9.0, 0.0, 9.0, 0.0]] * 4,
    ],
)
def test_sums_over_unlikely_samples_are_those_over_the_samples_themselves(
    logits: list[list[float]],
) -> None:
    values = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    outputs = torch.tensor(logits)
    builder = ReportBuilder(ReportSpec(5, 4, frozenset({"prediction-extremes"})))
    builder.add([values], outputs, outputs.argmax(1))
    report = builder.report()
    unlikely = (outputs.softmax(1) < 0.1).double()
    for name, power in (("unlikely_sum", 1), ("unlikely_square_sum", 2)):
        wanted = (unlikely.T @ values.double() ** power).numpy()
        assert np.abs(report[name] - wanted).max() < 1e-12
        assert (report[name][unlikely.numpy().sum(0) == 0] == 0).all()
