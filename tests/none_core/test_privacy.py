"""Reports under differential privacy: bounded contributions, enough noise, nothing else."""

from __future__ import annotations

import itertools
import math

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from none_core.activations import (
    LABEL_HISTOGRAMS,
    STATISTICS,
    HistogramGrid,
    Report,
    ReportSpec,
    build_report,
    decode_report,
)
from none_core.neurons import NeuronMap
from none_core.privacy import (
    Gaussian,
    Samples,
    most_bits,
    private_report,
    read_samples,
)

LAYER_OF = np.array([0, 0, 0, 1, 1])
SPEC = ReportSpec(5, 3, frozenset({LABEL_HISTOGRAMS}))


class Recorder(Gaussian):
    """Adds no noise, and keeps what it was asked to release."""

    def __init__(self, noise: float = 1.0) -> None:
        super().__init__(noise, np.random.default_rng(0))
        self.parts: list[tuple[np.ndarray, float, float]] = []

    def released(self, exact: np.ndarray, sensitivity: float, share: float) -> np.ndarray:
        self.parts.append((exact.copy(), sensitivity, share))
        return exact.copy()


def samples_of(values: np.ndarray, seed: int = 0) -> Samples:
    rng = np.random.default_rng(seed)
    labels = rng.integers(SPEC.labels, size=len(values))
    return Samples(values, labels, rng.random(len(values)) < 0.8)


def ordinary(number: int = 300, seed: int = 0) -> Samples:
    """Three classes that differ by their means; deviation 1 throughout."""
    rng = np.random.default_rng(seed)
    samples = samples_of(np.zeros((number, 5), np.float32), seed)
    means = np.array([[0, 2, 4, 0, 8], [1, 1, 1, 9, 0], [3, 0, 3, 5, 5]])
    values = means[samples.labels] + rng.normal(size=(number, 5))
    return samples._replace(values=values.astype(np.float32))


# --- the sensitivity: the one thing on which everything rests -------------------------------------


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    hnp.arrays(
        np.float32,
        (7, 5),
        elements=st.one_of(
            st.floats(width=32),  # infinities and NaN, too
            st.floats(-10, 10, width=32),
        ),
    ),
    st.integers(0, 6),
)
def test_no_sample_moves_a_release_by_more_than_its_sensitivity(
    values: np.ndarray, left_out: int
) -> None:
    """What is released later may depend on earlier releases, so those are kept as they were."""
    samples = samples_of(values)
    neighbour = Samples(*(np.delete(part, left_out, axis=0) for part in samples))
    whole = Recorder()
    private_report(samples, LAYER_OF, SPEC, whole)
    replayed = Replay(whole)
    private_report(neighbour, LAYER_OF, SPEC, replayed)

    assert len(whole.parts) == len(replayed.parts) == 4
    for (one, sensitivity, _), (other, _, _) in zip(whole.parts, replayed.parts, strict=True):
        assert np.linalg.norm(one - other) <= sensitivity * (1 + 1e-9)


class Replay(Recorder):
    """Shows what another run released, and keeps what this one would have."""

    def __init__(self, other: Recorder) -> None:
        super().__init__()
        self.shown = iter(other.parts)

    def released(self, exact: np.ndarray, sensitivity: float, share: float) -> np.ndarray:
        super().released(exact, sensitivity, share)
        return next(self.shown)[0].copy()


def test_a_sample_can_use_up_its_bound() -> None:
    """Otherwise the test above would pass with any bound that is large enough."""
    values = np.full((7, 5), 3.0, np.float32)
    values[6] *= 1000
    whole = Recorder()
    private_report(samples_of(values), LAYER_OF, SPEC, whole)
    shorter = Samples(*(part[:6] for part in samples_of(values)))
    without = Replay(whole)
    private_report(shorter, LAYER_OF, SPEC, without)
    for (one, sensitivity, _), (other, _, _) in zip(whole.parts, without.parts, strict=True):
        assert np.linalg.norm(one - other) == pytest.approx(sensitivity)


@pytest.mark.parametrize("statistics", [frozenset({LABEL_HISTOGRAMS}), frozenset(STATISTICS)])
def test_the_shares_of_an_answer_add_up_to_one(statistics: frozenset[str]) -> None:
    recorder = Recorder()
    private_report(ordinary(), LAYER_OF, ReportSpec(5, 3, statistics), recorder)
    assert sum(share for _, _, share in recorder.parts) == pytest.approx(1)
    assert all(share > 0 for _, _, share in recorder.parts)


def test_predictions_alone_get_the_whole_share() -> None:
    recorder = Recorder()
    report = private_report(ordinary(), LAYER_OF, ReportSpec(5, 3), recorder)
    assert [share for _, _, share in recorder.parts] == [1.0]
    assert set(report.arrays) == {"predictions"}
    assert report.accuracy == pytest.approx(ordinary().right.mean())


def test_the_noise_has_the_deviation_that_it_should() -> None:
    gaussian = Gaussian(3.0, np.random.default_rng(1))
    noise = gaussian.released(np.zeros(20_000), sensitivity=2.0, share=0.25)
    assert gaussian.deviation(2.0, 0.25) == 12.0
    assert noise.std() == pytest.approx(12.0, rel=0.02)
    assert abs(noise.mean()) < 0.5


def test_only_what_is_released_reaches_the_report() -> None:
    """Two data sets whose releases are shown alike cannot be told apart."""
    one, other = ordinary(seed=1), ordinary(seed=2, number=77)
    first = Recorder()
    mine = private_report(one, LAYER_OF, SPEC, first, min_count=5)
    theirs = private_report(other, LAYER_OF, SPEC, Replay(first), min_count=5)
    for name in mine.arrays:
        np.testing.assert_array_equal(mine[name], theirs[name])


# --- the report ----------------------------------------------------------------------------------


def wire(report: Report) -> Report:
    return decode_report(report.encode(), report.spec, sender="x", max_samples=10**7)


@pytest.mark.parametrize("noise", [0.01, 0.3, 1.0, 30.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_server_takes_it_for_any_noise(noise: float, seed: int) -> None:
    mechanism = Gaussian(noise, np.random.default_rng(seed))
    spec = ReportSpec(5, 3, frozenset(STATISTICS))
    report = wire(private_report(ordinary(), LAYER_OF, spec, mechanism, min_count=5))
    assert report.counts.sum() > 0
    assert all(n == 0 or n >= 5 for n in report.counts)


def test_with_little_noise_it_says_what_an_ordinary_report_says() -> None:
    samples = ordinary(3000)
    mechanism = Gaussian(1e-3, np.random.default_rng(0))
    report = wire(private_report(samples, LAYER_OF, SPEC, mechanism))
    np.testing.assert_array_equal(report.counts, np.bincount(samples.labels))
    assert report.accuracy == pytest.approx(samples.right.mean())
    mean, variance = report.moments()
    for k in range(SPEC.labels):
        mine = samples.values[samples.labels == k]
        # Some vectors are clipped; that costs a few per cent of the mean.
        np.testing.assert_allclose(mean[k], mine.mean(0), atol=0.45)
        # Shared out evenly among a layer's neurons, in bins of half an octave.
        assert 0.2 < variance[k].mean() < 3


def test_more_noise_blurs_means_and_says_so_in_the_variance() -> None:
    errors, claimed = [], []
    for noise in (0.05, 1.0, 4.0):
        off, said = [], []
        for seed in range(5):
            mechanism = Gaussian(noise, np.random.default_rng(seed))
            report = private_report(ordinary(), LAYER_OF, SPEC, mechanism)
            mean, variance = report.moments()
            exact = np.stack(
                [ordinary().values[ordinary().labels == k].mean(0) for k in range(SPEC.labels)]
            )
            off.append(np.square(mean - exact).mean())
            said.append((variance / report.counts[:, None]).mean())
        errors.append(np.mean(off))
        claimed.append(np.mean(said))
    assert errors[0] < errors[1] < errors[2]
    assert claimed[0] < claimed[1] < claimed[2]
    assert claimed[2] == pytest.approx(errors[2], rel=1)


def test_statistics_that_cannot_be_private_are_empty() -> None:
    spec = ReportSpec(5, 3, frozenset(STATISTICS))
    report = wire(private_report(ordinary(), LAYER_OF, spec, Recorder()))
    for name in ("positions", "at_least_zero", "confident_count", "unlikely_count", "probes"):
        assert not report[name].any()
    assert not report.trigger_shift()[0].any()
    assert report["histograms"].any()


def test_a_rare_label_is_left_out_by_its_noisy_count() -> None:
    samples = ordinary(60)
    rare = samples._replace(labels=np.where(np.arange(60) < 3, 2, samples.labels % 2))
    report = private_report(rare, LAYER_OF, SPEC, Recorder(), min_count=5)
    assert report.counts[2] == 0
    assert not report["histograms"][2].any()
    assert (report.counts[:2] > 0).all()


def test_it_reads_the_same_values_as_an_ordinary_report() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    neurons = NeuronMap.trace(model, torch.zeros(1, 3))
    inputs, labels = torch.randn(400, 3), torch.arange(400) % 3
    batches = list(zip(inputs.split(64), labels.split(64), strict=True))
    mechanism = Gaussian(1e-4, np.random.default_rng(0))
    samples = read_samples(neurons.reader(model), batches)
    private = private_report(samples, neurons.layer_of(np.arange(5)), SPEC, mechanism)
    exact = build_report(model, neurons, batches, SPEC)
    np.testing.assert_array_equal(private.counts, exact.counts)
    assert private.accuracy == exact.accuracy
    difference = np.abs(private.moments()[0] - exact.moments()[0])
    assert difference.max() < 0.3 * exact.moments()[0].std()


# --- how much a report without noise can say ------------------------------------------------------


def test_the_bound_counts_histograms_rightly() -> None:
    spec = ReportSpec(1, 2, frozenset({LABEL_HISTOGRAMS}))
    bits = most_bits(spec, np.array([2, 0]))
    bins, cells = range(HistogramGrid.BINS), range(spec.labels)
    pairs = len(list(itertools.combinations_with_replacement(bins, 2)))
    assert bits["histograms"] == pytest.approx(math.log2(pairs))
    pairs = len(list(itertools.combinations_with_replacement(cells, 2)))
    assert bits["predictions"] == pytest.approx(math.log2(pairs))
    assert bits["sums"] == pytest.approx(math.log2(255))


def test_the_bound_grows_with_what_is_asked_and_with_the_samples() -> None:
    few, many = np.array([10, 10, 0]), np.array([100, 100, 0])
    alone = most_bits(SPEC, few)
    everything = most_bits(ReportSpec(5, 3, frozenset(STATISTICS)), few)
    assert everything.keys() > alone.keys()
    assert all(everything[name] == bits for name, bits in alone.items())
    assert sum(most_bits(SPEC, many).values()) > sum(alone.values())
    assert most_bits(SPEC, np.zeros(3, np.int64)) == {"predictions": 0, "histograms": 0, "sums": 0}
