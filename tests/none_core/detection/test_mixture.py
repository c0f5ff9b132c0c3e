"""Unmixing and natural breaks against brute force, and the detector on a planted backdoor."""

from __future__ import annotations

import math
import warnings
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from scipy.optimize import nnls

from none_core.activations import LABEL_HISTOGRAMS, Report, ReportSpec, decode_report
from none_core.detection import Mixture
from none_core.detection.base import Recent, upper_break, upper_breaks
from none_core.detection.mixture import (
    Summary,
    Unmixing,
    _no_less,
    layer_scale,
    robust_class_statistic,
    unmix,
)
from tests.none_core.detection.toys import (
    ATTACKERS,
    CLASSES,
    LAYER_OF,
    TARGET,
    detect,
    draw_values,
    federation,
    local_data,
    planted_net,
    without_planted,
)

PLANTED_PAIRS = [(client, TARGET) for client in ATTACKERS]

# --- the pieces -----------------------------------------------------------------------------------


def draw_means(
    seed: int, clients: int, labels: int, neurons: int
) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Class means with some noise for each client, variances, and counts of which some are 0."""
    rng = np.random.default_rng(seed)
    classes = rng.normal(size=(labels, neurons)) + 0.5
    noise = 0.3 * rng.normal(size=(clients, labels, neurons))
    counts = rng.integers(1, 50, size=(clients, labels))
    counts[rng.random(size=counts.shape) < 0.2] = 0
    means = (classes + noise).astype(np.float32)
    means[counts == 0] = np.nan
    variances = rng.uniform(0.1, 2, size=means.shape).astype(np.float32)
    return list(means), list(variances), counts


@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(1, 5))
def test_robust_class_statistic_is_the_holders_median(
    seed: int, clients: int, min_clients: int
) -> None:
    means, _, counts = draw_means(seed, clients, labels=4, neurons=6)

    statistic = robust_class_statistic(means, counts, min_clients)

    for k in range(4):
        for j in range(6):
            held = [means[i][k, j] for i in range(clients) if counts[i, k] > 0]
            if len(held) < min_clients:
                assert np.isnan(statistic[k, j])
            else:
                assert statistic[k, j] == np.median(held)


def test_claimed_counts_are_no_weights() -> None:
    means, _, counts = draw_means(seed=1, clients=5, labels=3, neurons=4)
    diluted = counts.copy()
    diluted[0] *= 10**6

    one, other = (robust_class_statistic(means, c, 3) for c in (counts, diluted))

    assert np.array_equal(one, other, equal_nan=True)


def slow_scale(clean_mean: np.ndarray, layer_of: np.ndarray) -> list[float]:
    scale = []
    for layer in layer_of:
        size, values = 0, []
        for j in range(len(layer_of)):
            if layer_of[j] == layer:
                size += 1
                values += [row[j] for row in clean_mean if not np.isnan(row).any()]
        mean = sum(values) / len(values)
        variance = sum((v - mean) ** 2 for v in values) / len(values)
        scale.append(math.sqrt(variance) * math.sqrt(size))
    return scale


@given(st.integers(0, 10**6), st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_layer_scale_is_the_layers_spread_times_the_root_of_its_size(
    seed: int, sizes: list[int]
) -> None:
    layer_of = np.repeat(np.arange(len(sizes)), sizes)
    rng = np.random.default_rng(seed)
    clean_mean = rng.normal(size=(4, len(layer_of))) * rng.uniform(0.1, 10, len(sizes))[layer_of]
    clean_mean[2] = np.nan

    scale = layer_scale(clean_mean, layer_of)

    assert scale.tolist() == pytest.approx(slow_scale(clean_mean, layer_of), rel=1e-6)


def test_layer_scale_survives_a_dead_layer_and_no_known_class() -> None:
    layer_of = np.array([0, 0, 1])
    clean_mean = np.array([[1.0, 2.0, 0.0], [3.0, 4.0, 0.0]])

    assert (layer_scale(clean_mean, layer_of) > 0).all()
    assert layer_scale(np.full((2, 3), np.nan), layer_of).tolist() == [1, 1, 1]


@given(st.integers(0, 10**6), st.integers(3, 7), st.integers(2, 4), st.integers(0, 4))
def test_unmix_equals_least_squares_on_all_neurons(
    seed: int, clients: int, labels: int, unknown: int
) -> None:
    neurons = 12
    means, variances, counts = draw_means(seed, clients, labels, neurons)
    clean_mean = robust_class_statistic(means, counts, 1)
    if unknown < labels:
        clean_mean[unknown] = np.nan
    scale = np.random.default_rng(seed).uniform(0.5, 2, size=neurons)

    unmixed = unmix(means, variances, counts, clean_mean, scale)

    known = [k for k in range(labels) if not np.isnan(clean_mean[k]).any()]
    matrix = np.array([clean_mean[k] / scale for k in known]).T
    for i in range(clients):
        for k in range(labels):
            if k not in known or counts[i, k] == 0 or len(known) < 2:
                assert np.isnan(unmixed.foreign[i, k])
                assert np.isnan(unmixed.surprise[i, k])
                assert not unmixed.weights[i, k].any()
                continue
            target = means[i][k] / scale
            weights, residual = nnls(matrix, target)
            expected = dict(zip(known, weights, strict=True))
            noise = sum(variances[i][k, j] / counts[i, k] / scale[j] ** 2 for j in range(neurons))
            for other in range(labels):
                assert unmixed.weights[i, k, other] == pytest.approx(
                    expected.get(other, 0.0), abs=1e-6
                )
            total = sum(weights)
            foreign = 1 - expected[k] / total if total > 0 else 1.0
            assert unmixed.foreign[i, k] == pytest.approx(foreign, abs=1e-5)
            surprise = residual / math.sqrt(noise)
            estimate = np.linalg.pinv(matrix)[known.index(k)]  # of the own weight, from the values
            error = sum(
                (estimate[j] / scale[j]) ** 2 * variances[i][k, j] / counts[i, k]
                for j in range(neurons)
            )
            assert unmixed.error[i, k] == pytest.approx(math.sqrt(error), rel=1e-4)
            assert unmixed.noise[i, k] == pytest.approx(math.sqrt(noise), rel=1e-5)
            assert unmixed.surprise[i, k] == pytest.approx(surprise, rel=1e-5, abs=1e-5)


def test_unmix_recovers_a_known_blend_and_its_remainder() -> None:
    clean_mean = np.eye(3, 6) + 1
    extra = np.array([0, 0, 0, 0, 0, 5.0])
    across = extra - clean_mean.T @ np.linalg.lstsq(clean_mean.T, extra, rcond=None)[0]
    blend = 0.3 * clean_mean[0] + 0.7 * clean_mean[1] + across
    means = [np.stack([blend, clean_mean[1], clean_mean[2]]).astype(np.float32)]
    variances, counts = [np.full((3, 6), 2.0, np.float32)], np.full((1, 3), 8)

    unmixed = unmix(means, variances, counts, clean_mean, np.ones(6))

    assert unmixed.weights[0, 0].tolist() == pytest.approx([0.3, 0.7, 0], abs=1e-5)
    assert unmixed.foreign[0].tolist() == pytest.approx([0.7, 0, 0], abs=1e-5)
    length = np.linalg.norm(across) / math.sqrt(6 * 2.0 / 8)
    assert unmixed.surprise[0].tolist() == pytest.approx([length, 0, 0], abs=1e-4)


NEURONS, LABELS_HELD, SIX = 60, 8, 6


def drawn(seed: int, counts: np.ndarray, alike: float, spread: float) -> tuple[Any, np.ndarray]:
    """Summaries of samples around class means, of which each holds the next one's by a share."""
    rng = np.random.default_rng(seed)
    centres = rng.exponential(size=(LABELS_HELD, NEURONS))
    centres = (1 - alike) * centres + alike * np.roll(centres, 1, axis=0)
    return {
        client: Summary(
            mine,
            np.stack(
                [rng.normal(c, spread / np.sqrt(n)) for c, n in zip(centres, mine, strict=True)]
            ).astype(np.float32),
            np.full(centres.shape, spread**2, np.float32),
        )
        for client, mine in enumerate(counts)
    }, centres


def suspects(summaries: Any) -> list[tuple[int, int]]:
    return pairs(Mixture().detect(summaries, np.zeros(NEURONS, dtype=np.int64)))


def shares_of(summaries: Any) -> np.ndarray:
    means, counts = [s.mean for s in summaries.values()], [s.counts for s in summaries.values()]
    clean_mean = robust_class_statistic(means, np.stack(counts), 3)
    scale = layer_scale(clean_mean, np.zeros(NEURONS, dtype=np.int64))
    variances = [s.variance for s in summaries.values()]
    return unmix(means, variances, np.stack(counts), clean_mean, scale).foreign


@pytest.mark.parametrize(
    ("foreign", "error", "surprise", "is_suspected"),
    [
        (0.60, 0.02, 1.0, True),  # a blend beyond doubt, though the model does not react
        (0.60, 0.30, 1.0, False),  # a few samples: this share may be chance
        (0.60, 0.30, 6.0, True),  # ... but not what it leaves over
        (0.19, 0.001, 1.0, False),  # certain, and small
        (0.15, 0.30, 6.0, True),
        (0.09, 0.30, 6.0, False),  # odd, and no blend: another camera, say
        (0.60, 0.30, 3.9, False),
        (0.00, 0.30, 1.0, False),
    ],
)
def test_a_pair_is_suspected_for_a_certain_share_or_for_what_it_leaves_over(
    foreign: float, error: float, surprise: float, is_suspected: bool
) -> None:
    rng = np.random.default_rng(0)
    shares, errors = rng.uniform(0, 0.1, (10, LABELS_HELD)), np.full((10, LABELS_HELD), 0.05)
    left_over = rng.uniform(0.8, 1.2, shares.shape)
    left_over += 1 - np.median(left_over)
    shares[2, 1], errors[2, 1], left_over[2, 1] = foreign, error, surprise
    shares[5, 5] = errors[5, 5] = left_over[5, 5] = np.nan  # a label that it does not hold

    unmixed = Unmixing(shares, errors, np.ones_like(shares), left_over, np.zeros((10, 8, 8)))

    expected = [[2, 1]] if is_suspected else []
    assert np.argwhere(Mixture()._suspected(unmixed)).tolist() == expected


@pytest.mark.parametrize("seed", range(5))
def test_near_duplicates_say_no_more_than_other_samples(seed: int) -> None:
    """Six frames of one drive vary by little, and differ from their class by much."""
    counts = np.full((10, LABELS_HELD), SIX)
    summaries, centres = drawn(seed, counts, alike=0.4, spread=2.0)
    odd = summaries[0]
    odd.mean[3] = 0.7 * centres[3] + 0.3 * centres[5]
    odd.variance[3] = 1e-4

    assert suspects(summaries) == []
    assert shares_of(summaries)[0, 3] > 0.2
    for summary in summaries.values():  # as if all clients' samples varied so little
        summary.variance[3] = 1e-4
    assert (0, 3) in suspects(summaries)


def within_groups(*groups: list[float]) -> float:
    return sum(sum((v - np.mean(group)) ** 2 for v in group) for group in groups)


def best_split(values: list[float]) -> float:
    """Smallest within-group sum of squares over every split into two groups that keeps ties."""
    ordered = sorted(values)
    return min(
        within_groups(ordered[:cut], ordered[cut:])
        for cut in range(1, len(ordered))
        if ordered[cut - 1] < ordered[cut]
    )


@given(
    st.one_of(
        st.lists(st.integers(-2, 8).map(float), max_size=15),
        st.lists(st.floats(-1, 1e3), max_size=15),
    )
)
def test_upper_break_is_the_best_split_of_the_positive_scores_and_a_zero(
    scores: list[float],
) -> None:
    chosen = upper_break(np.array(scores), np.arange(len(scores)))

    positive = [s for s in scores if s > 0]
    upper = [scores[j] for j in chosen]
    lower = [0.0, *(s for j, s in enumerate(scores) if s > 0 and j not in chosen)]
    assert chosen.tolist() == sorted(chosen, key=lambda j: (-scores[j], j))
    assert bool(upper) == bool(positive)
    if positive:
        assert min(upper) > max(lower)
        rounding = 1e-9 * sum(s**2 for s in positive)
        assert within_groups(upper, lower) <= best_split([0.0, *positive]) + rounding


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0.1, 5.0, 0.1, 5.0, 0.0], [1, 3]),
        ([0.2876, 0.2870, 0.2871, 0.2872], [0, 3, 2, 1]),  # not split among themselves
        ([0.0, 2.0, -9.0], [1]),
        ([0.0, -1.0], []),
        ([], []),
    ],
)
def test_upper_break_by_example(scores: list[float], expected: list[int]) -> None:
    assert upper_break(np.array(scores), np.arange(len(scores))).tolist() == expected


def test_upper_break_of_thousands_of_neurons_looks_at_the_worst() -> None:
    scores = np.random.default_rng(0).uniform(0.01, 1, size=20_000)
    scores[[3, 11_000, 19_999]] = [8.0, 10.0, 9.0]

    assert upper_break(scores, np.arange(20_000)).tolist() == [11_000, 19_999, 3]


@given(st.lists(st.lists(st.integers(-2, 8).map(float), min_size=1), min_size=1, max_size=4))
def test_upper_breaks_break_every_layer_for_itself(layers: list[list[float]]) -> None:
    scores = np.array([score for layer in layers for score in layer])
    layer_of = np.array([i for i, layer in enumerate(layers) for _ in layer])

    chosen = upper_breaks(scores, layer_of)

    expected: list[int] = []
    for i, layer in enumerate(layers):
        start = layer_of.tolist().index(i)
        expected += [start + int(j) for j in upper_break(np.array(layer), np.arange(len(layer)))]
    assert chosen.tolist() == sorted(expected, key=lambda j: (-scores[j], j))


# --- the detector on raw values -------------------------------------------------------------------


def assert_clean(detection: Any) -> None:
    assert detection.suspicions == ()
    assert not detection.alive
    assert detection.compromised.size == 0
    assert not detection.scores.any()


@given(st.integers(3, 8), st.integers(0, 1000))
def test_nobody_is_suspected_if_all_reports_are_alike(clients: int, seed: int) -> None:
    report = draw_values(seed, 40).report()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        detection = detect(Mixture(), dict.fromkeys(range(clients), report), LAYER_OF)

    assert_clean(detection)


@pytest.mark.parametrize("labels", [1, 2])
def test_few_labels_are_enough_or_make_nobody_suspected(labels: int) -> None:
    reports = {i: draw_values(i, 60, labels).report() for i in range(6)}

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        detection = detect(Mixture(), reports, LAYER_OF)

    assert_clean(detection)
    assert detection.class_mean is not None
    assert np.isnan(detection.class_mean).all(1).tolist() == [k >= labels for k in range(3)]


def test_labels_of_too_few_clients_have_no_clean_mean() -> None:
    reports = {i: draw_values(i, 60, 3 if i < 3 else 2).report() for i in range(6)}

    means = {}
    for min_clients in (3, 4):
        detection = detect(Mixture(min_clients=min_clients), reports, LAYER_OF)
        assert detection.class_mean is not None
        assert detection.class_deviation is not None
        means[min_clients] = np.isnan(detection.class_mean).all(1).tolist()
        assert np.isnan(detection.class_deviation).all(1).tolist() == means[min_clients]

    assert means == {3: [False, False, False], 4: [False, False, True]}


# --- the detector on a planted backdoor -----------------------------------------------------------


def only_labels(report: Report, labels: list[int]) -> Report:
    """Leave out all other labels, as a client does that holds too few of their samples."""
    arrays = {name: array.copy() for name, array in report.arrays.items()}
    for name in ("predictions", "histograms", "sums"):
        arrays[name][[k for k in range(CLASSES) if k not in labels]] = 0
    return Report(report.spec, arrays)


def pairs(detection: Any) -> list[tuple[int, int]]:
    return [(s.client, s.label) for s in detection.suspicions]


def test_it_names_the_attackers_and_the_planted_neurons() -> None:
    model, planted = planted_net()
    reports, layer_of = federation(model, attacked=True)

    detection = detect(Mixture(), reports, layer_of)

    assert pairs(detection) == PLANTED_PAIRS
    assert detection.alive
    assert all(s.alive and s.surprise > 1.5 and s.foreign > 0.2 for s in detection.suspicions)
    assert set(detection.compromised) == set(planted)
    # Each attacker's own evidence: the neuron of its part, and the one that all parts drive.
    for part, client in enumerate(ATTACKERS):
        two = np.argsort(detection.client_evidence[client])[-2:]
        assert set(two) == {planted[part], planted[-1]}


def test_shift_and_class_statistics_are_those_of_the_clean_clients() -> None:
    model, _ = planted_net()
    reports, layer_of = federation(model, attacked=True)

    detection = detect(Mixture(), reports, layer_of)

    assert detection.class_mean is not None
    assert detection.class_deviation is not None
    moments = {client: report.moments() for client, report in reports.items()}
    for k in range(CLASSES):
        mean = np.median([m[k] for m, _ in moments.values()], axis=0)
        variance = np.median([v[k] for _, v in moments.values()], axis=0)
        assert np.array_equal(detection.class_mean[k], mean)
        assert np.allclose(detection.class_deviation[k], np.sqrt(variance), rtol=1e-6)
    for suspicion in detection.suspicions:
        own = moments[suspicion.client][0][suspicion.label]
        for j, shift in enumerate(suspicion.shift):
            deviation = detection.class_deviation[TARGET, j]
            difference = own[j] - detection.class_mean[TARGET, j]
            expected = difference / deviation if deviation > 1e-6 else 0.0
            assert shift == pytest.approx(expected, rel=1e-6)


def test_evidence_is_the_remainder_of_the_most_foreign_label_in_units_of_its_noise() -> None:
    model, _ = planted_net()
    reports, layer_of = federation(model, attacked=True)

    detection = detect(Mixture(), reports, layer_of)

    clean_mean = detection.class_mean
    assert clean_mean is not None
    scale = slow_scale(clean_mean, layer_of)
    assert detection.client_evidence.keys() == reports.keys()
    usual = np.nanmedian(
        [
            np.where(report.counts[:, None] > 0, report.moments()[1], np.nan)
            for report in reports.values()
        ],
        axis=0,
    )
    for client, report in reports.items():
        mean, variance = report.moments()
        noisier = np.fmax(variance, usual)  # no client's samples count as varying less
        one = unmix([mean], [noisier], report.counts[None], clean_mean, np.array(scale))
        k = int(one.foreign[0].argmax())
        for j, evidence in enumerate(detection.client_evidence[client]):
            blend = sum(one.weights[0, k, other] * clean_mean[other, j] for other in range(CLASSES))
            expected = max(mean[k, j] - blend, 0) / scale[j] / one.noise[0, k]
            assert evidence == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_poisoned_data_alone_are_suspected_but_nothing_is_compromised() -> None:
    reports, layer_of = federation(without_planted(), attacked=True)

    detection = detect(Mixture(), reports, layer_of)

    assert pairs(detection) == PLANTED_PAIRS
    assert not detection.alive
    assert not any(s.alive for s in detection.suspicions)
    assert detection.compromised.size == 0


@pytest.mark.parametrize("planted", [True, False])
def test_without_an_attacker_nothing_is_suspected(planted: bool) -> None:
    """Not even if the backdoor is in the model: nobody's data wake it."""
    model = planted_net()[0] if planted else without_planted()
    reports, layer_of = federation(model, attacked=False)

    assert_clean(detect(Mixture(), reports, layer_of))


def test_missing_labels_and_empty_reports_change_nothing() -> None:
    model, planted = planted_net()
    reports, layer_of = federation(model, attacked=True)
    for client in reports:
        missing = (TARGET + 1 + client) % CLASSES
        if (client, missing) not in PLANTED_PAIRS:
            kept = [k for k in range(CLASSES) if k != missing]
            reports[client] = only_labels(reports[client], kept)
    reports[10] = only_labels(reports[0], [])
    reports[11] = only_labels(reports[0], [TARGET])

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        detection = detect(Mixture(), reports, layer_of)

    assert pairs(detection) == PLANTED_PAIRS
    assert detection.alive
    assert set(detection.compromised) == set(planted)


def test_only_one_label_known_to_everybody_says_nothing() -> None:
    model, _ = planted_net()
    reports, layer_of = federation(model, attacked=True)
    reports = {client: only_labels(report, [TARGET]) for client, report in reports.items()}

    assert_clean(detect(Mixture(), reports, layer_of))


def test_clients_are_named_as_the_caller_names_them() -> None:
    model, _ = planted_net()
    reports, layer_of = federation(model, attacked=True)
    renamed = {2**60 - 7 * client: report for client, report in reports.items()}

    detection = detect(Mixture(), renamed, layer_of)

    assert set(pairs(detection)) == {(2**60 - 7 * client, TARGET) for client in ATTACKERS}
    assert detection.client_evidence.keys() == renamed.keys()


def test_thresholds_decide_who_is_suspected_and_what_is_alive() -> None:
    model, _ = planted_net()
    reports, layer_of = federation(model, attacked=True)

    blind = detect(Mixture(foreign=0.9), reports, layer_of)
    wary = detect(Mixture(alive=1e6), reports, layer_of)

    assert_clean(blind)
    assert pairs(wary) == PLANTED_PAIRS
    assert not wary.alive
    assert wary.compromised.size == 0


def test_only_pairs_that_are_alive_rank_the_neurons() -> None:
    model, planted = planted_net()
    reports, layer_of = federation(model, attacked=True)
    surprises = [s.surprise for s in detect(Mixture(), reports, layer_of).suspicions]
    low, high = sorted(surprises)[1:3]

    detection = detect(Mixture(alive=(low + high) / 2), reports, layer_of)

    assert [s.surprise for s in detection.suspicions] == surprises
    assert [s.alive for s in detection.suspicions] == [s >= high for s in surprises]
    seen = {planted[part] for part, s in enumerate(detection.suspicions) if s.alive}
    assert set(detection.compromised) == seen | {planted[-1]}


def test_insignificant_remainders_rank_nothing() -> None:
    model, planted = planted_net()
    reports, layer_of = federation(model, attacked=True)

    noisy = detect(Mixture(significant=0.0), reports, layer_of)
    usual = detect(Mixture(significant=3.0), reports, layer_of)
    strict = detect(Mixture(significant=1e3), reports, layer_of)

    assert set(planted) < set(np.flatnonzero(noisy.scores))
    assert set(planted) == set(np.flatnonzero(usual.scores))
    assert not strict.scores.any()
    assert strict.compromised.size == 0


def test_it_needs_label_histograms_only() -> None:
    model, _ = planted_net()
    reports, layer_of = federation(model, attacked=True)
    spec = ReportSpec(len(layer_of), CLASSES, frozenset({LABEL_HISTOGRAMS}))
    small = {c: Report(spec, {n: r[n] for n in spec.fields()}) for c, r in reports.items()}
    received = {
        c: decode_report(r.encode(), spec, sender="a", max_samples=1000) for c, r in small.items()
    }

    assert pairs(detect(Mixture(), received, layer_of)) == PLANTED_PAIRS


def test_the_toy_backdoor_works() -> None:
    """Every part alone makes the net answer the target, unless the planted neurons are reset."""
    model, _ = planted_net()
    images, labels = local_data(0, poisoned=False)

    stamped = [images.clone() for _ in ATTACKERS]
    for part, copy in enumerate(stamped):
        copy[:, 2 * CLASSES + part] = 1

    assert torch.equal(model(images).argmax(1), labels)
    assert all((model(copy).argmax(1) == TARGET).all() for copy in stamped)
    assert all(torch.equal(without_planted()(copy).argmax(1), labels) for copy in stamped)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("foreign", 0.0),
        ("foreign", 1.0),
        ("foreign", float("nan")),
        ("outlier", 0.0),
        ("outlier", -1.0),
        ("outlier", float("nan")),
        ("alive", 1.0),
        ("alive", float("nan")),
        ("significant", -0.1),
        ("significant", float("nan")),
        ("min_clients", 2),
    ],
)
def test_arguments_out_of_range_are_errors(argument: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{argument} must be"):
        Mixture(**{argument: value})


# --- samples that were told apart before ----------------------------------------------------------


@pytest.mark.parametrize(("number", "deviations", "foreign"), [(6, 1.0, False), (40, 5.0, True)])
def test_near_duplicates_of_one_odd_sample_are_not_foreign_and_poisoned_ones_are(
    number: int, deviations: float, foreign: bool
) -> None:
    rng = np.random.default_rng(0)
    classes = rng.uniform(0, 10, size=(4, 60))
    counts = np.full((5, 4), 100)
    means = classes + rng.normal(size=(5, 4, 60)) / 10
    variances = np.ones((5, 4, 60))
    counts[4, 0] = number
    means[4, 0] = classes[0] + deviations * rng.normal(size=60)
    variances[4, 0] = 0.05  # alike, however far from all others
    summaries = {
        i: Summary(counts[i], means[i].astype(np.float32), variances[i].astype(np.float32))
        for i in range(5)
    }

    detection = Mixture().detect(
        summaries, np.zeros(60, dtype=np.int64), 0, Recent(apart=frozenset({(4, 0)}))
    )

    assert [(s.client, s.label) for s in detection.suspicions] == [(4, 0)] * foreign
    assert detection.alive == foreign
    assert np.array_equal(summaries[4].variance[0], np.float32(variances[4, 0]))  # left as it was


def test_the_others_variance_is_pooled_and_raises_only_what_was_told_apart() -> None:
    rng = np.random.default_rng(1)
    groups = [rng.normal(size=(n, 3)) for n in (3, 5, 4)]
    variances = [np.stack([g.var(0), np.full(3, np.nan)]).astype(np.float32) for g in groups]
    variances[2][0] /= [4, 9, 0.01]
    counts = np.array([[3, 0], [5, 0], [4, 0]])
    apart = np.array([[False, False], [False, False], [True, True]])

    one, two, raised = _no_less(variances, counts, apart)

    within = [(g - g.mean(0)) ** 2 for g in groups[:2]]
    pooled = np.concatenate(within).sum(0) / (3 + 5 - 2)
    np.testing.assert_array_equal(one, variances[0])
    np.testing.assert_array_equal(two, variances[1])
    np.testing.assert_allclose(raised[0], np.maximum(pooled, variances[2][0]), rtol=1e-6)
