"""The defence in a federation: a known backdoor in a toy net, Flower's own apps and messages."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Message
from flwr.serverapp.strategy import (
    Bulyan,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedTrimmedAvg,
    FedYogi,
    MultiKrum,
    Strategy,
)
from torch import nn

from none_core.detection import Detection, Mixture
from none_core.detection.base import NOTHING_RECENT, IntArray, Recent
from none_core.flower import NoneMixin, NoneStrategy, messages, strategy
from tests.integration.federation import (
    EVERYBODY,
    EXAMPLE,
    INPUTS,
    Federation,
    State,
    attack,
    clean_data,
    defended,
    echo,
    net,
    scores,
)
from tests.none_core.detection.toys import ATTACKERS, CLASSES, CLIENTS, local_data, planted_net

PLANTED = planted_net()[1]


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(
        one[k].dtype == other[k].dtype and torch.equal(one[k], other[k]) for k in one
    )


def noise(partition: int, server_round: int, state: State) -> State:
    """Train: move everything a little, and count."""
    rng = np.random.default_rng([partition, server_round])
    return {
        name: t + 3
        if name.endswith("num_batches_tracked")
        else t + torch.from_numpy(np.asarray(rng.normal(size=t.shape))).float() / 100
        for name, t in state.items()
    }


def fedavg() -> FedAvg:
    return FedAvg(**EVERYBODY, fraction_evaluate=0.0)


# --- switched off ---------------------------------------------------------------------------------


def batch_norm_net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            *(nn.Linear(INPUTS, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES))
        )


@pytest.mark.parametrize("model_fn", [net, batch_norm_net])
def test_switched_off_it_is_fedavg_bit_for_bit(model_fn: Callable[[], nn.Module]) -> None:
    plain, plain_models = Federation(noise, model_fn=model_fn).run(fedavg(), 4)
    off = NoneStrategy(fedavg(), model_fn, EXAMPLE, start_round=5)
    _, models = Federation(noise, model_fn=model_fn).run(off, 4)
    assert len(models) == len(plain_models) == 5
    for model, expected in zip(models, plain_models, strict=True):
        for name, tensor in model_fn().state_dict().items():
            assert model[name].dtype == tensor.dtype
            if tensor.is_floating_point():
                assert torch.equal(model[name], expected[name])
            else:  # without the defence, counters come back from the average as float64
                assert torch.equal(model[name], expected[name].round().to(tensor.dtype))
    assert plain.arrays is not None
    assert not same(models[-1], models[0])


def test_integer_buffers_are_averaged_and_keep_their_dtype() -> None:
    def count(partition: int, server_round: int, state: State) -> State:
        return {n: t if t.is_floating_point() else t + 3 + partition for n, t in state.items()}

    _, models = Federation(count, model_fn=batch_norm_net).run(
        NoneStrategy(fedavg(), batch_norm_net, EXAMPLE, start_round=5), 3
    )
    counters = [model["1.num_batches_tracked"] for model in models]
    expected = [0.0]
    for _ in range(3):
        average = sum((expected[-1] + 3 + p) * 0.1 for p in range(CLIENTS))
        expected.append(float(np.rint(average)))
    assert [int(c) for c in counters] == expected
    assert {c.dtype for c in counters} == {torch.int64}


def test_asking_alone_changes_no_model() -> None:
    """With nothing to find, the defended run is the plain one."""

    lines: list[dict[str, Any]] = []

    def run(strategy: Strategy) -> list[State]:
        federation = Federation(noise, model_fn=batch_norm_net, data=clean_data)
        return federation.run(strategy, 3)[1]

    plain = run(fedavg())
    on = run(
        NoneStrategy(
            fedavg(), batch_norm_net, EXAMPLE, start_round=1, detector="mixture", audit=lines.append
        )
    )
    assert [len(line["reports"]) for line in lines] == [CLIENTS] * 3
    for one, other in zip(on, plain, strict=True):
        assert all(torch.equal(one[k], other[k]) for k in one if one[k].is_floating_point())


# --- under attack ---------------------------------------------------------------------------------


def test_a_planted_backdoor_is_reset_before_the_model_is_sent() -> None:
    undefended = Federation(attack).run(fedavg(), 3)[1]
    federation = Federation(attack)
    protected = defended(purify=False, quarantine=False)
    result, models = federation.run(protected, 3)
    assert [scores(model) for model in undefended] == [(1.0, 1.0)] * 4
    assert [scores(model) for model in models] == [(1.0, 1.0)] + [(1.0, 0.0)] * 3
    for sent, model in zip(federation.sent[1:], models[1:], strict=False):
        assert same(sent, model)
        assert scores(sent) == (1.0, 0.0)
    record = protected.defence.record
    assert sorted(record.neurons_reset) == PLANTED.tolist()
    assert record.before is not None
    assert scores(record.before) == (1.0, 1.0)
    assert [m["none-neurons-reset"] for m in result.train_metrics_clientapp.values()] == [5] * 3


def test_exactly_the_planted_neurons_are_reset_and_nothing_else() -> None:
    _, models = Federation(echo).run(defended(purify=False, reaggregate=False), 1)
    expected = Federation(echo).run(fedavg(), 1)[1][1]
    for j in PLANTED[:-1]:
        expected["0.weight"][j] = 0
        expected["0.bias"][j] = 0
    expected["2.weight"][-1] = 0
    expected["2.bias"][-1] = 0
    assert same(models[1], expected)


def test_the_metrics_of_the_defence_are_in_the_result() -> None:
    result, _ = Federation(attack).run(defended(purify=False, quarantine=False), 2)
    assert dict(result.train_metrics_clientapp[2]) == {
        "none-reports": CLIENTS,
        "none-missing": 0,
        "none-declined": 0,
        "none-refused": 0,
        "none-suspected": len(ATTACKERS),
        "none-alive": 1,
        "none-neurons-reset": len(PLANTED),
        "none-left-out": 0,
        "none-quarantined": 0,
        "none-samples-dropped": 0,
    }


def test_suspected_clients_drop_their_poison_and_nobody_else_anything() -> None:
    federation = Federation(echo)
    result, models = federation.run(defended(purify=True), 2)
    dropped = 0
    for partition, kept in federation.kept.items():
        images, _ = local_data(partition, poisoned=partition in ATTACKERS)
        poisoned = (images[:, 2 * CLASSES :] > 0).any(1).numpy()
        assert poisoned.sum() == (80 if partition in ATTACKERS else 0)
        assert not poisoned[kept].any()
        clean = (~poisoned).sum()
        # At lambda 0 a suspected client loses half of its clean samples of the suspected label.
        assert len(kept) >= (0.8 if partition in ATTACKERS else 0.99) * clean
        dropped += 300 - len(kept)
    assert result.train_metrics_clientapp[2]["none-samples-dropped"] == dropped
    assert scores(models[-1]) == (1.0, 0.0)


@pytest.mark.parametrize("how", ["zero", "init"])
def test_a_seed_repeats(how: str) -> None:
    def run(seed: int) -> list[State]:
        return Federation(attack).run(defended(purify=True, reset=how, seed=seed), 3)[1]

    first, again, other = run(0), run(0), run(1)
    assert all(same(one, two) for one, two in zip(first, again, strict=True))
    assert same(first[-1], other[-1]) == (how == "zero")


# --- inner strategies -----------------------------------------------------------------------------


def private(inner: Strategy) -> Strategy:
    return DifferentialPrivacyServerSideFixedClipping(inner, 0.0, 1000.0, CLIENTS)


ADAPTIVE = {"eta": 0.01, "tau": 0.1}
INNER: dict[str, Callable[[], Strategy]] = {
    "FedAvg": fedavg,
    "FedMedian": lambda: FedMedian(**EVERYBODY),
    "FedTrimmedAvg": lambda: FedTrimmedAvg(**EVERYBODY, beta=0.4),
    "MultiKrum": lambda: MultiKrum(**EVERYBODY, num_malicious_nodes=4, num_nodes_to_select=6),
    "FedAvgM": lambda: FedAvgM(**EVERYBODY, server_momentum=0.9),
    "FedAvgM, learning rate only": lambda: FedAvgM(**EVERYBODY, server_learning_rate=0.9),
    "FedAdam": lambda: FedAdam(**EVERYBODY, **ADAPTIVE),
    "FedYogi": lambda: FedYogi(**EVERYBODY, **ADAPTIVE),
    "FedAdagrad": lambda: FedAdagrad(**EVERYBODY, **ADAPTIVE),
    "privacy around FedMedian": lambda: private(FedMedian(**EVERYBODY)),
    "privacy around FedAvgM": lambda: private(FedAvgM(**EVERYBODY, server_momentum=0.9)),
    "privacy around FedAdam": lambda: private(FedAdam(**EVERYBODY, **ADAPTIVE)),
}


def noise_then_echo(partition: int, server_round: int, state: State) -> State:
    """Move everything for two rounds, which builds up momentum, and then hardly anything."""
    if server_round <= 2:
        return noise(partition, server_round, state)
    return state | {"4.bias": state["4.bias"] + 0.001}  # Flower's clipping divides by the update


def rows_of_the_planted(model: State) -> torch.Tensor:
    first, second = PLANTED[:-1], [-1]
    parts = model["0.weight"][first], model["0.bias"][first], model["2.weight"][second]
    return torch.cat([part.flatten() for part in (*parts, model["2.bias"][second])])


@pytest.mark.parametrize("inner", INNER)
def test_a_reset_stays_under_every_strategy(inner: str) -> None:
    lines: list[dict[str, Any]] = []
    protected = defended(INNER[inner](), start_round=2, every=100, purify=False, audit=lines.append)
    _, models = Federation(noise_then_echo).run(protected, 6)
    assert [line["round"] for line in lines] == [2, 6]
    assert len(lines[0]["reset"]) == len(PLANTED)
    assert rows_of_the_planted(models[1]).abs().min() > 0
    for model in models[2:]:
        assert not rows_of_the_planted(model).any()
        assert scores(model)[1] == 0.0
    assert all(torch.isfinite(t).all() for t in models[-1].values())


@pytest.mark.parametrize("inner", ["FedAvgM", "FedAdam", "FedYogi", "privacy around FedAvgM"])
def test_momentum_would_undo_a_reset(inner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what the test above checks, the rows move again."""
    monkeypatch.setattr(strategy, "carry_over_reset", lambda *args: None)
    protected = defended(INNER[inner](), start_round=2, every=100, purify=False)
    _, models = Federation(noise_then_echo).run(protected, 3)
    assert rows_of_the_planted(models[3]).any()


def test_momentum_of_what_was_not_reset_is_kept() -> None:
    def run(policy: dict[str, Any]) -> list[State]:
        inner = FedAvgM(**EVERYBODY, server_momentum=0.9)
        alone = defended(inner, purify=False, reaggregate=False, **policy)
        return Federation(noise_then_echo).run(alone, 4)[1]

    with_reset, without = run({"start_round": 2, "every": 100}), run({"start_round": 100})
    assert torch.equal(with_reset[3]["4.bias"], without[3]["4.bias"])
    others = [j for j in range(24) if j not in PLANTED]
    assert torch.equal(with_reset[3]["0.weight"][others], without[3]["0.weight"][others])
    assert not torch.equal(with_reset[3]["0.weight"], without[3]["0.weight"])


def test_a_strategy_inside_a_wrapper_may_weight_by_another_metric() -> None:
    inner = private(FedMedian(**EVERYBODY, weighted_by_key="num-examples"))
    assert strategy.weighted_by(inner) == "num-examples"
    assert strategy.weighted_by(private(FedAvg(weighted_by_key="tokens"))) == "tokens"
    assert strategy.weighted_by(private(private(FedAvg(weighted_by_key="n")))) == "n"


def test_a_strategy_that_returns_nothing_keeps_the_model_and_the_run_going() -> None:
    lines: list[dict[str, Any]] = []
    bulyan = Bulyan(**EVERYBODY, num_malicious_nodes=4)  # asks for 19 clients
    result, models = Federation(noise).run(defended(bulyan, audit=lines.append), 2)
    assert all(same(model, models[0]) for model in models)
    assert result.train_metrics_clientapp == {}
    assert ["kept the previous model" in line["decision"] for line in lines] == [True, True]


# --- clients that do not answer as they should ----------------------------------------------------


def unchanged() -> State:
    """What the first round makes of models that are sent back as they came."""
    return Federation(echo).run(fedavg(), 1)[1][1]


def is_query(message: Message) -> bool:
    return message.metadata.message_type == messages.MESSAGE_TYPE


def test_below_the_quorum_the_model_is_kept_and_it_says_so() -> None:
    def failing(partition: int, message: Message) -> None:
        if is_query(message) and partition in (0, 1, 2, 3, 4, 6):
            raise RuntimeError("no report from me")

    lines: list[dict[str, Any]] = []
    result, models = Federation(echo, watch=failing).run(defended(audit=lines.append), 1)
    assert same(models[1], unchanged())
    assert lines[0]["decision"] == (
        "kept the aggregated model: 4 valid reports of 10 asked, quorum is 5"
    )
    assert (lines[0]["missing"], lines[0]["asked"], lines[0]["reset"]) == (6, 10, [])
    assert result.train_metrics_clientapp[1]["none-missing"] == 6

    _, models = Federation(echo, watch=failing).run(defended(quorum=0.4, budget=0.2), 1)
    assert not same(models[1], unchanged())  # the same reports are enough for a lower quorum


def test_late_reports_are_missing_and_hold_nobody_up() -> None:
    def slow(partition: int, message: Message) -> None:
        if is_query(message) and partition == 3:
            time.sleep(2.0)

    lines: list[dict[str, Any]] = []
    start = time.monotonic()
    _, models = Federation(echo, watch=slow).run(defended(audit=lines.append, timeout=1.0), 1)
    assert time.monotonic() - start < 10
    assert lines[0]["missing"] == 1
    assert len(lines[0]["reports"]) == CLIENTS - 1
    assert scores(models[1]) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("every", "start_round", "rounds", "asking"),
    [
        (1, 2, 4, [2, 3, 4]),
        (3, 2, 7, [2, 5, 7]),
        (3, 2, 8, [2, 5, 8]),
        (10, 1, 3, [1, 3]),
        (1, 9, 3, []),
    ],
)
def test_it_asks_in_the_rounds_of_its_policy(
    every: int, start_round: int, rounds: int, asking: list[int]
) -> None:
    asked: set[int] = set()

    def note(partition: int, message: Message) -> None:
        if is_query(message):
            asked.add(int(message.metadata.group_id))

    lines: list[dict[str, Any]] = []
    protected = defended(every=every, start_round=start_round, audit=lines.append)
    Federation(noise, watch=note).run(protected, rounds)
    assert sorted(asked) == asking
    assert [line["round"] for line in lines] == asking


@pytest.mark.parametrize("rounds", [{"num_rounds": 2}, {}])
def test_the_last_round_is_known_however_it_is_given(rounds: dict[str, int]) -> None:
    """``num_rounds`` is optional in Flower, with three as its default."""
    args = (2,) if rounds else ()
    assert (
        strategy._num_rounds(args, {}) == strategy._num_rounds((), rounds) == (2 if rounds else 3)
    )


def test_a_filter_is_sent_with_the_model_it_describes_and_no_other() -> None:
    carried: set[int] = set()

    def note(partition: int, message: Message) -> None:
        if messages.FILTER in message.content:
            carried.add(int(message.content["config"]["server-round"]))

    Federation(noise, watch=note).run(defended(every=4), 7)
    assert carried == {2}  # asked in rounds 1, 5 and 7; what was poisoned is dropped in round 2


def test_a_second_run_does_not_send_the_filter_of_the_first() -> None:
    carried: list[int] = []

    def note(partition: int, message: Message) -> None:
        if messages.FILTER in message.content:
            carried.append(int(message.content["config"]["server-round"]))

    protected = defended()
    Federation(noise, watch=note).run(protected, 1)
    assert protected.defence._filter is not None
    Federation(noise, watch=note).run(protected, 1)
    assert carried == []


# --- the guard ------------------------------------------------------------------------------------


class Accusing(Mixture):
    """Calls given neurons compromised, the worst first, whatever the reports say."""

    def __init__(self, neurons: list[int]) -> None:
        super().__init__()
        self.neurons = neurons

    def detect(
        self,
        summaries: Mapping[int, Any],
        layer_of: IntArray,
        bound: int | None = None,
        recent: Recent = NOTHING_RECENT,
    ) -> Detection:
        scores = np.zeros(len(layer_of))
        scores[self.neurons] = np.arange(len(self.neurons), 0, -1)
        return Detection(scores, np.array(self.neurons), alive=True)


DEEPEST = int(PLANTED[-1])
SECOND_LAYER = [26, 27, 24, 25, *range(28, 34)]  # two for each class


def test_the_guard_halves_until_the_reset_costs_little() -> None:
    lines: list[dict[str, Any]] = []
    accused = [DEEPEST, *SECOND_LAYER, *range(2)]
    protected = defended(detector=Accusing(accused), budget=1.0, audit=lines.append)
    _, models = Federation(echo).run(protected, 1)
    assert [(r["layer"], r["neuron"]) for r in lines[0]["reset"]] == [("2", 10), ("2", 2)]
    assert scores(models[1]) == (1.0, 0.0)
    decision = lines[0]["decision"]
    for tried in (13, 6):
        assert f"{tried} would have cost " in decision
    assert "reset 2 at 0.0 points of accuracy" in decision
    assert (lines[0]["asked"], len(lines[0]["reports"]), lines[0]["missing"]) == (10, 10, 0)


def test_the_guard_undoes_a_reset_that_costs_too_much_however_small() -> None:
    lines: list[dict[str, Any]] = []
    protected = defended(detector=Accusing([26]), budget=1.0, guard=0.1, audit=lines.append)
    fragile = net()
    with torch.no_grad():
        fragile[2].weight[3] = 0  # so that its other neuron is all that the second class has
    initial = dict(fragile.state_dict())
    _, models = Federation(echo).run(protected, 1, initial=initial)
    assert same(models[1], Federation(echo).run(fedavg(), 1, initial=initial)[1][1])
    assert lines[0]["reset"] == []
    assert "1 would have cost 20.0 points" in lines[0]["decision"]
    assert protected.defence.record.before is None
    assert protected.defence.record.neurons_reset.size == 0

    lax = defended(detector=Accusing([26]), budget=1.0, guard=0.3)
    Federation(echo).run(lax, 1, initial=initial)
    assert lax.defence.record.neurons_reset.tolist() == [26]


def test_a_reset_whose_cost_nobody_tells_is_not_made() -> None:
    answered: set[int] = set()

    def once(partition: int, message: Message) -> None:
        if is_query(message):
            if partition in answered:
                raise RuntimeError("one report a round is enough")
            answered.add(partition)

    lines: list[dict[str, Any]] = []
    protected = defended(audit=lines.append, reaggregate=False)
    _, models = Federation(echo, watch=once).run(protected, 1)
    assert same(models[1], unchanged())
    assert "nobody said what a change would cost" in lines[0]["decision"]
    assert lines[0]["missing"] == 0  # all of them told what they were asked first


# --- the audit trail ------------------------------------------------------------------------------


def test_the_audit_trail_is_json_and_complete() -> None:
    lines: list[dict[str, Any]] = []
    Federation(attack).run(defended(purify=False, audit=lines.append), 2)
    assert len(lines) == 2
    for number, line in enumerate(lines, start=1):
        assert json.loads(json.dumps(line, allow_nan=False)) == line
        assert line["round"] == number
        assert line["decision"]
        assert (line["asked"], line["missing"], line["refused"]) == (CLIENTS, 0, [])
        assert line["alive"] is True
        assert (line["budget"], line["how"]) == (0.2, "zero")
        assert len(line["reports"]) == CLIENTS
        assert all(len(digest) == 64 for digest in line["reports"].values())
        assert {s["node"] for s in line["suspicions"]} <= {int(node) for node in line["reports"]}
        assert len(line["suspicions"]) == len(ATTACKERS)
        for s in line["suspicions"]:
            assert s.keys() == {"node", "label", "foreign", "surprise", "alive", "certified"}
        reset = {(r["layer"], r["neuron"]) for r in line["reset"]}
        assert reset == {("0", 20), ("0", 21), ("0", 22), ("0", 23), ("2", 10)}
        assert all(r["score"] > 0 for r in line["reset"])


# --- the mixin ------------------------------------------------------------------------------------


class Mine(NoneMixin, FedAvg):
    """A user's strategy, with a ``start`` and a state of its own."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.started: list[int] = []
        self.aggregated: list[int] = []

    def start(self, grid: Any, initial_arrays: ArrayRecord, *args: Any, **kwargs: Any) -> Any:
        self.started.append(kwargs["num_rounds"])
        return super().start(grid, initial_arrays, *args, **kwargs)

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        self.aggregated.append(server_round)
        return super().aggregate_train(server_round, replies)


def test_the_mixin_defends_as_the_wrapper_does_and_keeps_start() -> None:
    mine = Mine(**EVERYBODY, fraction_evaluate=0.0)
    mine.defend(net, EXAMPLE, detector="mixture", start_round=1, budget=0.2, every=2)
    result, models = Federation(attack).run(mine, 4)
    expected_result, expected = Federation(attack).run(defended(every=2), 4)
    assert all(same(one, other) for one, other in zip(models, expected, strict=True))
    assert result.train_metrics_clientapp == expected_result.train_metrics_clientapp
    assert (mine.started, mine.aggregated) == ([4], [1, 2, 3, 4])
    assert mine.defence is not None
    assert mine.defence.last_round == 4
    assert mine.defence.record.asked == CLIENTS


def test_the_mixin_without_defend_changes_nothing() -> None:
    mine = Mine(**EVERYBODY, fraction_evaluate=0.0)
    result, models = Federation(attack).run(mine, 3)
    expected_result, expected = Federation(attack).run(fedavg(), 3)
    assert all(same(one, other) for one, other in zip(models, expected, strict=True))
    assert result.train_metrics_clientapp == expected_result.train_metrics_clientapp
    assert mine.started == [3]


# --- settings -------------------------------------------------------------------------------------


def test_another_model_than_the_trained_one_is_a_clear_error() -> None:
    other = NoneStrategy(fedavg(), batch_norm_net, EXAMPLE)
    with pytest.raises(ValueError, match=r"model_fn builds another model.*0\.bias.*state_dict"):
        Federation(echo).run(other, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"detector": "magic"}, "detector must be one of .*mixture.*, got 'magic'"),
        ({"reset": "half"}, "reset must be one of .*, got 'half'"),
        ({"min_count": 0}, "min_count must be >= 1, got 0"),
        ({"timeout": 0}, "timeout must be > 0 seconds, got 0"),
        ({"memory": -1}, "memory must be >= 0 rounds, got -1"),
        ({"max_weight_ratio": 1}, "max_weight_ratio must be > 1, got 1"),
        ({"budget": 2}, r"budget must be in \(0, 1\], got 2"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        defended(**settings)


def test_an_unknown_setting_is_an_error() -> None:
    with pytest.raises(TypeError, match="bugdet"):
        defended(bugdet=0.1)
