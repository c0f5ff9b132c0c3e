"""The sample filter against loops over samples and neurons."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from none_core.detection import Detection, Suspicion
from none_core.purification import SampleFilter, build_filter

NEURONS = 6


def a_filter(seed: int, labels: list[int], per_label: int = 3) -> SampleFilter:
    rng = np.random.default_rng(seed)
    shape = (len(labels), per_label)
    return SampleFilter(
        labels=np.array(labels, dtype=np.int64),
        neurons=np.stack([rng.permutation(NEURONS)[:per_label] for _ in labels]),
        sign=rng.choice([-1, 1], size=shape).astype(np.float32),
        mean=rng.normal(size=shape).astype(np.float32),
        deviation=rng.uniform(0.1, 2, size=shape).astype(np.float32),
        threshold=rng.uniform(-1, 1, size=len(labels)).astype(np.float32),
    )


def flagged_slowly(f: SampleFilter, values: np.ndarray, labels: np.ndarray) -> list[bool]:
    result = []
    for sample, label in zip(values, labels, strict=True):
        drop = False
        for i, mine in enumerate(f.labels):
            if mine == label:
                z = [
                    f.sign[i, m] * (sample[j] - f.mean[i, m]) / f.deviation[i, m]
                    for m, j in enumerate(f.neurons[i])
                ]
                drop = float(np.mean(z)) > f.threshold[i]
        result.append(drop)
    return result


@settings(deadline=None)
@given(
    seed=st.integers(0, 10**6), n=st.integers(0, 30), labels=st.sets(st.integers(0, 4), max_size=4)
)
def test_flagged_is_what_the_loop_says(seed: int, n: int, labels: set[int]) -> None:
    sample_filter = a_filter(seed, sorted(labels)) if labels else a_filter(seed, [0])
    rng = np.random.default_rng(seed + 1)
    values = rng.normal(size=(n, NEURONS)).astype(np.float32)
    own = rng.integers(0, 5, size=n)
    flagged = sample_filter.flagged(values, own)
    assert flagged.dtype == bool
    assert flagged.tolist() == flagged_slowly(sample_filter, values, own)


def test_the_threshold_itself_is_kept_and_other_labels_are_never_dropped() -> None:
    one = SampleFilter(
        *(np.array([1]), np.array([[0]]), np.float32([[1]])),
        *(np.float32([[0]]), np.float32([[2]]), np.float32([3])),
    )
    values = np.float32([[6], [6.01], [100], [-100]])
    assert one.flagged(values, np.array([1, 1, 0, 1])).tolist() == [False, True, False, False]


def test_for_client_is_strict_for_suspected_labels_only() -> None:
    sample_filter = a_filter(0, [0, 2, 3])
    before = sample_filter.threshold.copy()
    mine = sample_filter.for_client({2, 4}, 0.25)
    assert mine.threshold.tolist() == [before[0], 0.25, before[2]]
    assert mine.threshold.dtype == np.float32
    assert sample_filter.threshold.tolist() == before.tolist()
    assert sample_filter.for_client(set(), 0.25).threshold.tolist() == before.tolist()
    for name in ("labels", "neurons", "sign", "mean", "deviation"):
        np.testing.assert_array_equal(getattr(mine, name), getattr(sample_filter, name))


# --- build_filter ---------------------------------------------------------------------------------

LAYER_OF = np.repeat([0, 1], [10, 200])
LABELS = 4


def detection(suspicions: list[Suspicion], known: bool = True) -> Detection:
    rng = np.random.default_rng(5)
    shape = (LABELS, len(LAYER_OF))
    return Detection(
        scores=np.zeros(len(LAYER_OF)),
        compromised=np.empty(0, dtype=np.int64),
        alive=False,
        suspicions=tuple(suspicions),
        class_mean=rng.normal(size=shape) if known else None,
        class_deviation=np.abs(rng.normal(size=shape)) if known else None,
    )


def suspicion(client: int, label: int, shift: np.ndarray) -> Suspicion:
    return Suspicion(client, label, 0.5, 3.0, False, shift)


def shift_at(neurons: dict[int, float], noise: float = 0.01) -> np.ndarray:
    shift = noise * np.random.default_rng(len(neurons)).random(len(LAYER_OF))
    for j, size in neurons.items():
        shift[j] = size
    return shift


def test_it_picks_the_neurons_of_the_last_layer_that_stand_out() -> None:
    planted = {20: 5.0, 33: -4.0, 60: 3.0, 150: -2.0, 209: 1.0, 3: 100.0}  # 3 is in the first layer
    found = detection([suspicion(1, 2, shift_at(planted))])
    built = build_filter(found, LAYER_OF, share=0.025, threshold=2.5)
    assert built is not None
    assert built.labels.tolist() == [2]
    assert built.neurons.tolist() == [[20, 33, 60, 150, 209]]
    assert built.sign.tolist() == [[1, -1, 1, -1, 1]]
    assert built.threshold.tolist() == [2.5]
    assert found.class_mean is not None
    assert found.class_deviation is not None
    np.testing.assert_allclose(built.mean, found.class_mean[[2]][:, built.neurons[0]], rtol=1e-6)
    np.testing.assert_allclose(
        built.deviation, found.class_deviation[[2]][:, built.neurons[0]], rtol=1e-6
    )
    for name in ("sign", "mean", "deviation", "threshold"):
        assert getattr(built, name).dtype == np.float32
    assert built.neurons.dtype == built.labels.dtype == np.int64


def test_several_suspects_of_a_label_are_averaged_and_labels_kept_apart() -> None:
    one, other = shift_at({50: 9.0, 51: 9.0}, 0), shift_at({50: 9.0, 51: -9.0}, 0)
    third = shift_at({70: -1.0}, 0)
    found = detection([suspicion(1, 3, one), suspicion(2, 3, other), suspicion(2, 0, third)])
    built = build_filter(found, LAYER_OF)
    assert built is not None
    assert built.labels.tolist() == [0, 3]
    assert built.neurons[0, 0] == 70
    assert built.sign[0, 0] == -1
    assert built.neurons[1, 0] == 50
    assert 51 not in built.neurons[1, :1]  # the two cancel out


@pytest.mark.parametrize(("share", "number"), [(0.001, 5), (0.05, 10), (0.5, 100), (1.0, 200)])
def test_it_takes_a_share_of_the_layer_and_at_least_five(share: float, number: int) -> None:
    built = build_filter(detection([suspicion(1, 2, shift_at({20: 5.0}))]), LAYER_OF, share=share)
    assert built is not None
    assert built.neurons.shape == (1, number)
    assert (built.neurons >= 10).all()


def test_a_last_layer_of_three_gives_three() -> None:
    layer_of = np.array([0, 0, 1, 1, 1])
    found = Detection(
        *(np.zeros(5), np.empty(0, dtype=np.int64), False),
        suspicions=(suspicion(1, 0, np.arange(5.0)),),
        class_mean=np.zeros((1, 5)),
        class_deviation=np.zeros((1, 5)),
    )
    built = build_filter(found, layer_of)
    assert built is not None
    assert built.neurons.tolist() == [[4, 3, 2]]
    assert (built.deviation > 0).all()  # nothing is divided by zero


def test_without_a_suspicion_or_a_reference_there_is_no_filter() -> None:
    assert build_filter(detection([]), LAYER_OF) is None
    assert build_filter(detection([suspicion(1, 2, shift_at({}))], known=False), LAYER_OF) is None


def test_it_drops_what_stands_out_and_keeps_the_clean() -> None:
    shift = shift_at({20: 6.0, 33: -6.0, 60: 6.0, 150: -6.0, 209: 6.0}, 0)
    found = detection([suspicion(1, 2, shift)])
    built = build_filter(found, LAYER_OF, share=0.025)
    assert built is not None
    assert found.class_mean is not None
    assert found.class_deviation is not None
    rng = np.random.default_rng(0)
    clean = found.class_mean[2] + found.class_deviation[2] * rng.normal(size=(200, len(LAYER_OF)))
    poisoned = clean + shift * found.class_deviation[2]
    labels = np.full(200, 2)
    assert not built.flagged(clean.astype(np.float32), labels).any()
    assert built.flagged(poisoned.astype(np.float32), labels).all()
