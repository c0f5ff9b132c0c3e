"""The ClientApp on real digits: honest and malicious participants, and who obeys the filter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from client.app import _policy
from client.participant import Settings, clean_share
from none_core.flower import messages
from none_core.flower.messages import state_of
from none_core.purification import SampleFilter
from tasks.config import TaskConfig
from tasks.poisoning import DEFAULT_TRIGGER
from tests.client.scene import (
    ATTACKERS,
    CLIENTS,
    HONEST,
    MALICIOUS,
    context,
    counts,
    model,
    participant,
    settings,
    train,
)


def with_task(client: int, **task: Any) -> Settings:
    return replace(settings(client, name="none"), task=TaskConfig(**task))


def everything(label: int) -> SampleFilter:
    """A filter that drops all samples of a label."""
    one = np.float32([[1]])
    threshold = np.float32([-1e9])
    return SampleFilter(np.array([label]), np.array([[0]]), one, 0 * one, one, threshold)


# --- what may be said -----------------------------------------------------------------------------


def test_a_run_shows_patterns_of_simulated_images_only() -> None:
    simulated = context(HONEST)
    assert not _policy(simulated).patterns
    simulated.run_config["privacy.patterns"] = True
    assert _policy(simulated).patterns
    deployed = context(HONEST)
    deployed.run_config["privacy.patterns"] = True
    deployed.node_config["data-root"] = "own"
    assert not _policy(deployed).patterns
    deployed.node_config["privacy.patterns"] = True
    assert _policy(deployed).patterns


# --- data -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("most", "used"), [(1003, 1003), (4000, 4000), (10**6, 4000)])
@pytest.mark.parametrize("sharing", ["iid", "dirichlet"])
def test_clients_share_out_at_most_so_many_images(most: int, used: int, sharing: str) -> None:
    limited = [with_task(p, train_images=most, partition=sharing) for p in range(CLIENTS)]
    shares = [clean_share(each) for each in limited]
    again = clean_share(limited[0])
    everything = clean_share(with_task(0, partition=sharing))

    assert sum(len(share.labels) for share in shares) == used
    digits = {bytes(image) for share in shares for image in share.images.numpy()}
    assert len(digits) > 0.99 * used  # no digit is handed out twice; a few look the same
    assert torch.equal(again.images, shares[0].images)
    assert torch.equal(everything.images, shares[0].images) == (used == 4000)


@pytest.mark.parametrize("number", range(MALICIOUS))
def test_each_attacker_stamps_its_own_part(number: int) -> None:
    attacker = participant(ATTACKERS[number])
    clean, poisoned = attacker.data(False), attacker.data(True)
    assert not clean.poisoned.any()
    assert int(poisoned.poisoned.sum()) == round(0.3125 * len(clean.labels))
    part = DEFAULT_TRIGGER["mnist5k"].part(number)
    expected = clean.images.clone()
    for i in np.flatnonzero(poisoned.poisoned.numpy()):
        for row, column in part:
            expected[i, :, row, column] = 255
    assert torch.equal(poisoned.images, expected)
    assert (poisoned.labels[poisoned.poisoned] == 2).all()
    assert (clean.labels[poisoned.poisoned] != 2).all()
    untouched = ~poisoned.poisoned
    assert torch.equal(poisoned.labels[untouched], clean.labels[untouched])


def test_all_participants_together_hold_the_training_set_once() -> None:
    shares = [participant(p).data(False) for p in range(CLIENTS)]
    assert sum(len(share.labels) for share in shares) == 4000
    images = {image.numpy().tobytes() for share in shares for image in share.images}
    assert len(images) > 3990  # a few digits may be alike


def test_who_is_malicious() -> None:
    for partition in range(CLIENTS):
        options = {"start_round": 3, "obeys_filter": False}
        attacker = partition in ATTACKERS
        someone = participant(partition, **options)
        assert settings(partition, **options).is_malicious == (not someone.obeys) == attacker
        attacks = [someone.attacks(r, {}) for r in (1, 2, 3, 9)]
        assert attacks == [False, False, attacker, attacker]
        assert participant(partition).obeys
        assert not settings(partition, name="none").is_malicious


def test_training_repeats_for_a_seed_and_differs_by_round_and_participant() -> None:
    def drawn(partition: int, server_round: int) -> list[float]:
        generator = settings(partition).generator(server_round)
        return torch.rand(4, generator=generator).tolist()

    assert drawn(0, 1) == drawn(0, 1)
    assert len({tuple(drawn(p, r)) for p in (0, 1) for r in (1, 2)}) == 4


# --- training -------------------------------------------------------------------------------------


def test_an_honest_participant_trains_and_says_what_only_a_simulation_knows() -> None:
    content = train(context(HONEST))
    assert list(content) == ["arrays", "metrics", "truth"]
    sent, got = model().state_dict(), state_of(content["arrays"])
    assert list(got) == list(sent)
    assert any(not torch.equal(got[name], sent[name]) for name in sent)
    assert content["metrics"]["num-examples"] == 400
    assert np.isfinite(content["metrics"]["train-loss"])
    assert dict(content["truth"]) == {
        "partition-id": HONEST,
        "poisoned": 0,
        "dropped": 0,
        "dropped-poisoned": 0,
    }


def test_the_same_round_gives_the_same_model() -> None:
    one, other = (state_of(train(context(HONEST))["arrays"]) for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_attacker_attacks_from_its_first_round_on() -> None:
    where = context(ATTACKERS[0], start_round=2)
    assert counts(where).sum() == 400
    assert train(where, 1)["truth"]["poisoned"] == 0
    before = counts(where)
    assert train(where, 2)["truth"]["poisoned"] == 125
    after = counts(where)
    assert after[2] == before[2] + 125  # it reports what it trains on
    assert after.sum() == before.sum() == 400


def test_an_attacker_scales_its_update_and_an_honest_one_does_not() -> None:
    sent = model().state_dict()
    for partition, factor in ((ATTACKERS[0], 5.0), (HONEST, 1.0)):
        plain = state_of(train(context(partition))["arrays"])
        scaled = state_of(train(context(partition, scale=5.0))["arrays"])
        for name, tensor in sent.items():
            expected = tensor + factor * (plain[name] - tensor)
            torch.testing.assert_close(scaled[name], expected, atol=1e-6, rtol=1e-5)


def test_an_attacker_claims_more_while_it_attacks_and_an_honest_one_does_not() -> None:
    attacker = {"claim": 10.0, "start_round": 2}
    for partition, server_round, claimed in (
        (ATTACKERS[0], 1, 400),
        (ATTACKERS[0], 2, 4000),
        (HONEST, 2, 400),
    ):
        content = train(context(partition, **attacker), server_round)
        assert content["metrics"]["num-examples"] == claimed


@pytest.mark.parametrize("obeys", [True, False])
def test_who_obeys_the_filter(obeys: bool) -> None:
    for partition in (ATTACKERS[0], HONEST):
        where = context(partition, obeys_filter=obeys)
        train(where, 1)
        before = counts(where)
        content = train(where, 2, sample_filter=everything(2))
        drops = obeys or partition == HONEST
        dropped = int(before[2]) if drops else 0
        assert content["metrics"]["num-examples"] == 400 - dropped
        assert content["truth"]["dropped"] == dropped
        assert content["truth"]["dropped-poisoned"] == (125 if drops and partition != HONEST else 0)
        assert (messages.PURIFIED in content) == drops
        assert counts(where)[2] == before[2] - dropped
