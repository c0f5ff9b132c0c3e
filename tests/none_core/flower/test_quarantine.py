"""Round after round: when triggers are asked for, what confirms an attack, and who is left out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideFixedClipping,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedTrimmedAvg,
    FedYogi,
    Strategy,
)

from none_core.activations import LABEL_HISTOGRAMS, TRIGGER_SHIFT, Report
from none_core.decision import Reputation
from none_core.detection import Attack, Detection, Detector, Standing, Suspicion
from none_core.detection.base import NOTHING_RECENT, IntArray, Recent
from none_core.flower import NoneStrategy, RoundRecord, messages, toy_federation
from tests.none_core.flower.toys import (
    HIDDEN,
    HONEST,
    HOSTILE,
    INPUTS,
    LABELS,
    Answer,
    ToyGrid,
    answering,
    bits,
    honest_answer,
    net,
    neurons,
    report_content,
    train_content,
)

EVERYBODY = (*HONEST, HOSTILE)
PLANTED = 2  # the neuron that the trigger moves, to class 1

# --- a detector that finds what the test says -----------------------------------------------------

Script = Callable[[int, bool], Detection]


class Scripted(Detector):
    """Finds what was written down for the n-th query, and whether that asked for triggers."""

    name = "scripted"
    statistics = frozenset({LABEL_HISTOGRAMS, TRIGGER_SHIFT})

    def __init__(self, script: Script) -> None:
        self.script = script
        self.queries = 0

    def summarise(self, report: Report) -> bool:
        return TRIGGER_SHIFT in report.spec.statistics

    def detect(
        self,
        summaries: Mapping[int, Any],
        layer_of: IntArray,
        bound: int | None = None,
        recent: Recent = NOTHING_RECENT,
    ) -> Detection:
        self.queries += 1
        return self.script(self.queries, any(summaries.values()))


class OnlyTriggers(Scripted):
    """Needs nothing but triggers."""

    statistics = frozenset({TRIGGER_SHIFT})


def nothing(probed: bool = True, *suspicions: Suspicion) -> Detection:
    shifts = {k: np.zeros(HIDDEN) for k in range(LABELS)} if probed else {}
    none = np.empty(0, dtype=np.int64)
    return Detection(np.zeros(HIDDEN), none, alive=False, shifts=shifts, suspicions=suspicions)


def attack(label: int = 1, *, certified: bool = True, reset: bool = False) -> Detection:
    scores = np.zeros(HIDDEN)
    scores[PLANTED] = 5
    compromised = np.array([PLANTED] if reset else [], dtype=np.int64)
    return Detection(
        scores,
        compromised,
        alive=True,
        attacks=(Attack(label, 0.01, 0.1, 9.0, certified),),
        shifts={k: scores * (k == label) for k in range(LABELS)},
        standing=np.where(scores > 0, Standing.CERTIFIED, Standing.CONTESTED).astype(np.int8),
    )


def sees(found: Callable[[], Detection], *queries: int) -> Script:
    """Find that in these queries, if they ask for triggers."""
    return lambda query, probed: found() if probed and query in queries else nothing(probed)


# --- clients --------------------------------------------------------------------------------------


def moved(node: int) -> RecordDict:
    """A model whose weights are far from the others' where the backdoor lives."""
    content = train_content(node)
    arrays = content.array_records["arrays"]
    for name, row in (("0.weight", PLANTED), ("3.weight", 1)):
        values = np.array(arrays[name].numpy())
        values[row] += 5
        arrays[name] = Array(values)
    return content


def content_of(node: int, attacking: bool) -> RecordDict:
    return moved(node) if attacking else train_content(node)


def attacking_in(rounds: set[int] | range) -> Answer:
    """Attack in these rounds; report honestly in all."""

    def train(message: Message) -> list[Message]:
        node, config = message.metadata.dst_node_id, message.content.config_records["config"]
        return [Message(content_of(node, config["server-round"] in rounds), reply_to=message)]

    return answering(train=train)


def always_right(message: Message) -> list[Message]:
    """Report that the model is right about every sample."""
    node = message.metadata.dst_node_id
    content = report_content(node, message)
    _, spec, _ = messages.read_query(message.content)
    config = message.content.config_records[messages.QUERY]
    server_round = messages.round_of(message.content)
    report = messages.read_report(
        content, spec, sender="x", server_round=server_round, max_samples=1000
    )
    claimed = Report(spec, report.arrays | {"predictions": np.diag(report.counts)})
    return [Message(messages.report_content(claimed, config), reply_to=message)]


def average(attacking: set[int] | frozenset[int] = frozenset(), but: int = -1) -> Any:
    """What FedAvg makes of everybody's replies, or of all but one's; with the model's dtypes."""
    sent = messages.record_of(net().state_dict())
    replies = [
        Message(
            content_of(node, node in attacking),
            reply_to=Message(RecordDict({"arrays": sent}), node, "train"),
        )
        for node in sorted(EVERYBODY)
        if node != but
    ]
    arrays, _ = FedAvg().aggregate_train(1, replies)
    assert arrays is not None
    return bits(
        ArrayRecord(
            {
                name: Array(np.asarray(np.rint(array.numpy()), sent[name].dtype))
                if sent[name].dtype == "int64"
                else array
                for name, array in arrays.items()
            }
        )
    )


class Game:
    """A defended federation of four honest nodes and one other, played round by round."""

    def __init__(
        self,
        script: Script | Detector,
        hostile: Answer = honest_answer,
        others: Mapping[int, Answer] | None = None,
        last_round: int | None = None,
        inner: Callable[..., Strategy] = FedAvg,
        **settings: Any,
    ) -> None:
        answers = dict.fromkeys(HONEST, honest_answer) | {HOSTILE: hostile} | dict(others or {})
        self.lines: list[dict[str, Any]] = []
        self.grid = ToyGrid(answers)
        self.strategy = NoneStrategy(
            inner(min_train_nodes=5, min_available_nodes=5),
            net,
            torch.zeros(2, INPUTS),
            **{
                "detector": script if isinstance(script, Detector) else Scripted(script),
                "neuron_map": neurons(),
                "probe_every": 1,
                "watch": 0,
                "apart": 5.0,
                "min_accuracy": 0.0,
                "budget": 0.25,
                "guard": 1.0,
                "purify": False,
                "repair": False,
                "reputation": Reputation(decay=0.5, enter=1.4, leave=0.4),
                "audit": self.lines.append,
                **settings,
            },
        )
        self.strategy.defence.last_round = last_round
        self.records: list[RoundRecord] = []
        self.models: list[Any] = []
        self.arrays: list[ArrayRecord] = []

    def play(self, rounds: int) -> Game:
        """Play the next rounds, or the first ones of a new run."""
        first = len(self.records) + 1
        for server_round in range(first, first + rounds):
            self.play_round(server_round)
        return self

    def play_round(self, server_round: int) -> None:
        sent = messages.record_of(net().state_dict())
        outgoing = self.strategy.configure_train(server_round, sent, ConfigRecord(), self.grid)
        replies = self.grid.send_and_receive(outgoing)
        arrays, _ = self.strategy.aggregate_train(server_round, replies)
        assert arrays is not None
        self.models.append(bits(arrays))
        self.arrays.append(arrays)
        self.records.append(self.strategy.defence.record)

    def queries(self) -> dict[int, ConfigRecord]:
        """The first query of each round."""
        found: dict[int, ConfigRecord] = {}
        for message in self.grid.sent:
            if message.metadata.message_type == messages.MESSAGE_TYPE:
                query = message.content.config_records[messages.QUERY]
                found.setdefault(int(message.metadata.group_id), query)
        return found

    def probed(self) -> set[int]:
        """Rounds whose query asked for triggers."""
        asking = self.queries()
        for query in asking.values():
            assert ("probe-labels" in query) == (TRIGGER_SHIFT in query["statistics"])
        return {number for number, query in asking.items() if "probe-labels" in query}

    def quarantined(self) -> list[list[int]]:
        """Who will be left out after each round."""
        return [record.quarantined for record in self.records]


# --- when triggers are asked for ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "start", "last", "sighted", "expected"),
    [
        (3, 1, 8, (), {1, 4, 7, 8}),
        (3, 1, None, (), {1, 4, 7}),
        (3, 1, 8, (2,), {1, 4, 7, 8}),  # not looked for, so not seen
        (3, 1, 8, (4,), {1, 4, 5, 7, 8}),
        (3, 1, 8, (4, 5), {1, 4, 5, 6, 7, 8}),
        (100, 1, 8, (), {1, 8}),
        (100, 1, 8, (1, 2, 3), {1, 2, 3, 4, 8}),
    ],
)
def test_triggers_are_asked_for_when_due_after_a_sighting_and_in_the_end(
    every: int, start: int, last: int | None, sighted: tuple[int, ...], expected: set[int]
) -> None:
    game = Game(sees(attack, *sighted), probe_every=every, start_round=start, last_round=last)
    game.play(8)
    assert sorted(game.queries()) == list(range(start, 9))
    assert game.probed() == expected


def test_triggers_are_not_asked_for_before_the_start() -> None:
    game = Game(sees(attack), probe_every=2, start_round=3, last_round=6).play(6)
    assert sorted(game.queries()) == [3, 4, 5, 6]
    assert game.probed() == {3, 5, 6}


def test_triggers_are_not_asked_for_while_the_median_client_says_that_the_model_is_wrong() -> None:
    def right_from(first: int) -> Answer:
        def report(message: Message) -> list[Message]:
            late = int(message.metadata.group_id) >= first
            return always_right(message) if late else honest_answer(message)

        return answering(report=report)

    everybody_in_the_third = dict.fromkeys(HONEST, right_from(3))
    game = Game(sees(attack), others=everybody_in_the_third, min_accuracy=1.0, last_round=6).play(6)
    assert game.probed() == {4, 5, 6}  # what is known in the fourth round is of the third
    game = Game(sees(attack), min_accuracy=1.0, last_round=6).play(6)
    assert game.probed() == set()
    game = Game(sees(attack), hostile=right_from(1), min_accuracy=1.0, last_round=6).play(6)
    assert game.probed() == set()


def test_a_detector_that_needs_nothing_else_asks_for_triggers_always() -> None:
    detector = OnlyTriggers(sees(attack))
    assert Game(detector, probe_every=5, min_accuracy=1.0).play(4).probed() == {1, 2, 3, 4}


def test_the_query_says_how_hard_to_look() -> None:
    query = Game(sees(attack), probe_steps=7, probe_images=3).play(1).queries()[1]
    assert (query["probe-steps"], query["probe-images"]) == (7, 3)
    assert query["probe-labels"] == list(range(LABELS))


def hinting(hints: dict[int, int], *queries: int) -> Script:
    def script(query: int, probed: bool) -> Detection:
        found = nothing(probed)
        return replace(found, hints=hints) if probed and query in queries else found

    return script


def test_a_class_that_some_see_is_looked_at_harder_at_once_but_not_for_ever() -> None:
    game = Game(hinting({1: 2, 0: 3}, 1, 2, 3), probe_every=5).play(6)
    assert game.probed() == {1, 2, 6}
    hard = {number: list(query.get("probe-hard", [])) for number, query in game.queries().items()}
    assert hard == {1: [], 2: [0, 1], 3: [], 4: [], 5: [], 6: [0, 1]}


def test_shared_out_every_class_goes_to_enough_clients_and_those_that_matter_to_all() -> None:
    # Three classes are the fewest that a client can compare, so that here nothing is saved ...
    game = Game(sees(attack), share_probes=True, liars=1).play(1)
    asked = [
        message.content.config_records[messages.QUERY]["probe-labels"]
        for message in game.grid.sent
        if message.metadata.message_type == messages.MESSAGE_TYPE
    ]
    assert asked == [list(range(LABELS))] * 5
    # ... and with more of them it is.
    game.strategy.defence.probe = replace(game.strategy.defence.probe, labels=tuple(range(10)))
    game.strategy.defence._probed = replace(game.strategy.defence._probed, hints=(4,))
    shares = {node: probe.labels for node, probe in game.strategy.defence._probes().items()}
    for label in range(10):
        looking = sum(label in mine for mine in shares.values())
        assert looking == (5 if label == 4 else 3)


def test_shared_out_the_work_is_that_of_clients_who_are_listened_to() -> None:
    game = Game(sees(attack), share_probes=True, liars=1).play(1)
    defence = game.strategy.defence
    defence.probe = replace(defence.probe, labels=tuple(range(10)))
    defence._reputation.quarantined = frozenset({HOSTILE})

    shares = {node: probe.labels for node, probe in defence._probes().items()}

    assert shares.pop(HOSTILE) == tuple(range(10))
    assert shares.keys() == set(HONEST)
    for label in range(10):
        assert sum(label in mine for mine in shares.values()) == 3


@pytest.mark.parametrize("liars", [3, 5])
def test_a_bound_that_is_no_minority_is_refused_in_the_first_round(liars: int) -> None:
    with pytest.raises(ValueError, match=f"at most 2 of 5 clients, got {liars}"):
        Game(sees(attack), liars=liars).play(1)
    Game(sees(attack), liars=2).play(1)


def test_a_class_that_one_client_alone_sees_is_no_hint() -> None:
    game = Game(hinting({1: 1}, 1), probe_every=2).play(3)
    assert game.probed() == {1, 3}
    assert list(game.queries()[3]["probe-hard"]) == []


# --- what confirms an attack ----------------------------------------------------------------------


def resets(game: Game) -> list[list[int]]:
    return [record.neurons_reset.tolist() for record in game.records]


def test_an_attack_is_acted_on_when_the_next_probe_sees_it_again() -> None:
    game = Game(sees(lambda: attack(reset=True), 1, 2, 3)).play(4)
    assert resets(game) == [[], [PLANTED], [PLANTED], []]
    assert "to be confirmed" in game.records[0].decision
    assert game.records[1].standings == {"contested": 0, "supported": 0, "certified": 1}


def test_seen_once_is_not_enough_however_often() -> None:
    assert resets(Game(sees(lambda: attack(reset=True), 1, 3, 5)).play(6)) == [[]] * 6


def seen_in(rounds: Mapping[int, int], *args: Any, **settings: Any) -> Game:
    """Play a game in which a class looks attacked in some rounds, however often one asks."""

    def script(query: int, probed: bool) -> Detection:
        label = rounds.get(len(game.records) + 1)
        return nothing(probed) if label is None else attack(label, reset=True)

    game = Game(script, *args, **settings)
    return game


def test_seen_again_later_counts_if_the_same_client_stands_out_both_times() -> None:
    def late(second: int, attacking: Iterable[int], **settings: Any) -> Game:
        return seen_in({1: 1, second: 1}, attacking_in(set(attacking)), **settings).play(8)

    for second in range(3, 8):
        game = late(second, {1, second})
        nothing_before: list[list[int]] = [[]] * (second - 1)
        assert resets(game)[:second] == [*nothing_before, [PLANTED]]
        assert game.records[second - 1].left_out == [HOSTILE]
        assert game.quarantined()[second - 1] == [HOSTILE]
    for attacking in ({1}, {3}, set[int]()):
        assert not any(resets(late(3, attacking)))
    assert not any(resets(late(8, {1, 8})))  # after seven rounds it is forgotten
    assert not any(resets(late(4, {1, 4}, memory=2)))
    assert resets(late(4, {1, 4}, memory=3))[3] == [PLANTED]
    assert not any(resets(late(3, {1, 3}, memory=0)))


def test_what_is_remembered_is_of_one_class_and_of_a_few_rounds() -> None:
    game = seen_in({1: 1, 3: 0}, attacking_in({1, 3}), apart=1.2).play(4)
    assert [HOSTILE in sighting.apart for sighting in game.strategy.defence._sightings] == [
        True
    ] * 2
    assert not any(resets(game))

    game = seen_in(dict.fromkeys(range(1, 13), 1)).play(12)
    assert [sighting.server_round for sighting in game.strategy.defence._sightings] == [
        *range(7, 13)
    ]


def test_whoever_is_in_quarantine_is_no_witness_to_an_attack() -> None:
    game = seen_in({1: 1, 2: 1, 4: 1, 6: 1}, attacking_in(range(1, 100))).play(7)
    assert game.quarantined() == [[]] + [[HOSTILE]] * 6
    assert resets(game) == [[], [PLANTED], *[[]] * 5]


def test_what_was_held_against_a_client_at_once_is_not_held_against_it_again() -> None:
    attacker = attacking_in(range(1, 100))
    game = seen_in({1: 1, 2: 1, 4: 1}, attacker, watch=3, quarantine=False).play(4)
    # In the second round also for the first, in which nothing was known yet.
    assert [record.evidence[HOSTILE] for record in game.records] == [0, 1.5, 1.75, 1.875]


def test_another_class_does_not_confirm_it() -> None:
    labels = {1: 1, 2: 0, 3: 1, 4: 1}

    def script(query: int, probed: bool) -> Detection:
        return attack(labels[query], reset=True)

    assert resets(Game(script).play(4)) == [[], [], [], [PLANTED]]


def test_rounds_that_do_not_look_for_triggers_confirm_and_forget_nothing() -> None:
    """The class stays sighted until the next probe, which then comes at once."""
    game = Game(sees(lambda: attack(reset=True), 2, 3), start_round=2, every=2).play(4)
    assert sorted(game.queries()) == [2, 4]
    assert resets(game) == [[], [], [], []]
    game = Game(sees(lambda: attack(reset=True), 1, 2), start_round=2, every=2).play(4)
    assert resets(game) == [[], [], [], [PLANTED]]


# --- repair ---------------------------------------------------------------------------------------

SUSPECTED = nothing(
    False,
    Suspicion(HOSTILE, 1, 0.5, 1.0, alive=False, shift=np.eye(HIDDEN)[PLANTED]),
)
MEDIAN_OF = {"0.weight": PLANTED, "0.bias": PLANTED, "3.weight": 1, "3.bias": 1}


def model_of(game: Game) -> dict[str, np.ndarray]:
    return {name: np.array(array.numpy()) for name, array in game.arrays[-1].items()}


@pytest.mark.parametrize("found", [SUSPECTED, attack(certified=False)])
def test_where_a_backdoor_is_spoken_of_twice_the_median_is_aggregated(found: Detection) -> None:
    game = Game(lambda query, probed: found, attacking_in(range(9)), repair=True).play(2)
    assert game.records[0].repaired == []
    record = game.records[1]
    assert record.repaired == [1]
    assert record.neurons_reset.size == 0
    assert record.before is not None
    assert "took the median for class 1" in record.decision
    assert [line["repaired"] for line in game.lines] == [[], [1]]
    plain = Game(lambda query, probed: found, attacking_in(range(9))).play(2)
    assert plain.records[1].repaired == []
    after, before = model_of(game), model_of(plain)
    sent = [content_of(n, n == HOSTILE).array_records["arrays"] for n in EVERYBODY]
    for name in after:
        row = MEDIAN_OF.get(name)
        if row is None:
            continue
        rows = np.stack([np.array(arrays[name].numpy())[row] for arrays in sent])
        np.testing.assert_allclose(after[name][row], np.median(rows, axis=0), rtol=1e-6)
        assert name.endswith("bias") or not np.allclose(before[name][row], after[name][row])
        others = np.arange(len(after[name])) != row
        assert after[name][others].tobytes() == before[name][others].tobytes()


def test_a_repair_that_costs_accuracy_is_not_made() -> None:
    def report(message: Message) -> list[Message]:
        asked = message.content.config_records[messages.QUERY]["statistics"]
        return always_right(message) if asked else honest_answer(message)  # wrong once repaired

    wary = Game(
        lambda query, probed: SUSPECTED,
        others=dict.fromkeys(HONEST, answering(report=report)),
        repair=True,
        guard=0.02,
    ).play(2)
    assert wary.records[1].repaired == []
    assert wary.records[1].before is None
    assert "the median alone would have cost" in wary.records[1].decision
    assert wary.models == Game(lambda query, probed: nothing(False)).play(2).models


def test_a_class_that_is_spoken_of_now_and_then_is_no_reason_to_repair() -> None:
    def now_and_then(query: int, probed: bool) -> Detection:
        return SUSPECTED if query % 2 else nothing(False)

    game = Game(now_and_then, attacking_in(range(9)), repair=True).play(5)
    assert [record.repaired for record in game.records] == [[]] * 5


# --- who is left out ------------------------------------------------------------------------------


def test_an_attacker_is_left_out_once_the_attack_is_confirmed() -> None:
    attacking = range(1, 100)
    game = Game(sees(attack, 1, 2), attacking_in(attacking)).play(4)
    assert game.quarantined() == [[], [HOSTILE], [HOSTILE], [HOSTILE]]
    assert [record.named for record in game.records][:2] == [[], [HOSTILE]]
    # What it did when the attack was first seen counts, too, as far as that has faded.
    assert game.records[1].evidence == dict.fromkeys(HONEST, 0.0) | {HOSTILE: 1.5}
    with_it, without = average({HOSTILE}), average(but=HOSTILE)
    assert game.models == [with_it, without, without, without]  # of the second round already
    assert with_it != without
    assert [record.left_out for record in game.records] == [[], [HOSTILE], [], []]
    assert game.records[1].decision.startswith("aggregated again without 1 clients; ")
    assert [line["left_out"] for line in game.lines] == [[], [HOSTILE], [], []]
    assert [line["asked_about"] != line["aggregated"] for line in game.lines] == [
        *(False, True, False, False)
    ]


def silent_from(first: int) -> Answer:
    """Attack, and say nothing any more from that round on; report honestly in all."""

    def train(message: Message) -> list[Message]:
        server_round = message.content.config_records["config"]["server-round"]
        return attacking_in(range(1, first))(message) if server_round < first else []

    return answering(train=train)


FLOWERS: dict[str, Callable[..., Strategy]] = {
    "FedAvg": FedAvg,
    "FedAvgM": partial(FedAvgM, server_momentum=0.9),
    "FedAdam": FedAdam,
    "FedYogi": FedYogi,
    "FedAdagrad": FedAdagrad,
    "FedMedian": FedMedian,
    "FedTrimmedAvg": FedTrimmedAvg,
}


@pytest.mark.parametrize("inner", FLOWERS)
def test_left_out_at_once_is_never_having_been_there_bit_for_bit(inner: str) -> None:
    make = FLOWERS[inner]
    attacking = Game(sees(attack, 1, 2), attacking_in(range(1, 100)), inner=make).play(5)
    absent = Game(sees(attack, 1, 2), silent_from(2), inner=make).play(5)
    assert attacking.records[1].left_out == [HOSTILE]
    assert attacking.models == absent.models
    late = Game(
        sees(attack, 1, 2), attacking_in(range(1, 100)), inner=make, reaggregate=False
    ).play(5)
    assert late.records[1].left_out == []
    assert late.models[0] == absent.models[0]
    assert late.models[1] != absent.models[1] or inner in ("FedMedian", "FedTrimmedAvg")


class Counting(FedAvg):
    """Counts, in every way in which a strategy may remember, and refuses to aggregate too few."""

    def __init__(self, fewest: int = 0, **settings: Any) -> None:
        super().__init__(**settings)
        self.fewest, self.calls = fewest, 0
        self.lists: list[int] = []
        self.by_round: dict[int, int] = {}
        self.outside = Counter[int]()

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        replies = list(replies)
        self.calls += 1
        self.lists.append(server_round)
        self.by_round[server_round] = len(replies)
        self.outside[server_round] += 1
        return (
            (None, None)
            if len(replies) < self.fewest
            else super().aggregate_train(server_round, replies)
        )


class InPlace(FedAvg):
    """Keeps a momentum in arrays that it overwrites, and the model that it was sent in a record."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.momentum: dict[str, Any] = {}
        self.total, self.steps = torch.zeros(1), [np.zeros(1)]

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Any
    ) -> Any:
        self.sent = ArrayRecord(dict(arrays))
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        arrays, metrics = super().aggregate_train(server_round, replies)
        assert arrays is not None
        self.total += 1
        self.steps[0] += 1
        for name in list(self.sent):
            before = self.sent.pop(name).numpy()  # as FedAvgM's cousins do, to save memory
            update = np.array(arrays[name].numpy() - before, dtype=np.float64)
            if name in self.momentum:
                self.momentum[name] *= 0.5
                self.momentum[name] += update
            else:
                self.momentum[name] = update
            arrays[name] = Array(np.asarray(before + self.momentum[name], before.dtype))
        return arrays, metrics


def test_arrays_that_a_strategy_overwrites_are_put_back_too() -> None:
    script = sees(attack, 1, 2)
    attacking = Game(script, attacking_in(range(1, 100)), inner=InPlace).play(4)
    absent = Game(script, silent_from(2), inner=InPlace).play(4)
    assert attacking.records[1].left_out == [HOSTILE]
    assert attacking.models == absent.models
    for game in (attacking, absent):
        inner: Any = game.strategy.strategy
        assert (float(inner.total), inner.steps[0].item()) == (4, 4)


class Delicate(FedAvg):
    """Raises if there are too few."""

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        replies = list(replies)
        if len(replies) < 5 and server_round == 2:
            raise RuntimeError("too few")
        return super().aggregate_train(server_round, replies)


def test_a_strategy_that_raises_does_not_stop_the_run() -> None:
    game = Game(sees(attack, 1, 2), attacking_in(range(1, 100)), inner=Delicate).play(3)
    assert game.models[1] == average({HOSTILE})
    assert [record.left_out for record in game.records] == [[], [], []]
    assert game.quarantined()[1] == [HOSTILE]


def test_what_an_earlier_probe_saw_names_nobody_in_this_round() -> None:
    """It counts as evidence; but the update of this round was not seen to stand apart."""
    game = Game(sees(attack, 1, 2), attacking_in({1})).play(2)
    assert game.records[1].named == []
    assert game.records[1].evidence[HOSTILE] == 0.5
    assert game.records[1].left_out == []


@pytest.mark.parametrize("size", [5.0, 100.0])
def test_a_reset_is_charged_with_what_it_costs_itself(size: float) -> None:
    """And not with the difference between the models with and without the attacker."""

    def far(message: Message) -> list[Message]:
        content = train_content(message.metadata.dst_node_id)
        arrays = content.array_records["arrays"]
        for name, row in (("0.weight", PLANTED), ("3.weight", 1)):
            values = np.array(arrays[name].numpy())
            values[row] -= size
            arrays[name] = Array(values)
        return [Message(content, reply_to=message)]

    script = sees(partial(attack, reset=True), 1, 2)
    present = Game(script, answering(train=far), guard=0.02).play(2).records[1]
    absent = Game(script, silent_from(2), guard=0.02).play(2).records[1]
    assert present.left_out == [HOSTILE]
    assert present.neurons_reset.tolist() == absent.neurons_reset.tolist()
    assert present.decision == f"aggregated again without 1 clients; {absent.decision}"


def test_what_a_strategy_remembers_is_of_one_aggregation_a_round() -> None:
    game = Game(sees(attack, 1, 2), attacking_in(range(1, 100)), inner=Counting)
    inner = game.strategy.strategy
    assert isinstance(inner, Counting)
    held = inner.lists
    game.play(3)
    assert (inner.calls, inner.lists, inner.by_round) == (3, [1, 2, 3], {1: 5, 2: 4, 3: 4})
    assert held is inner.lists
    assert inner.outside == {1: 1, 2: 2, 3: 1}  # an object of its own


def test_a_strategy_that_does_not_aggregate_so_few_keeps_its_first_result() -> None:
    make = partial(Counting, fewest=5)
    game = Game(sees(attack, 1, 2), attacking_in(range(1, 100)), inner=make).play(2)
    inner = game.strategy.strategy
    assert isinstance(inner, Counting)
    assert game.models == [average({HOSTILE})] * 2
    assert game.records[1].left_out == []
    assert inner.by_round == {1: 5, 2: 5}
    assert inner.outside == {1: 1, 2: 2}


def test_a_wrapper_aggregates_once() -> None:
    """It may add noise to what it releases, which is paid for once."""
    counting = Counting(min_train_nodes=5, min_available_nodes=5)

    def inner(**everybody: Any) -> Strategy:
        return DifferentialPrivacyServerSideFixedClipping(counting, 0.0, 1e6, 5)

    game = Game(sees(attack, 1, 2), attacking_in(range(1, 100)), inner=inner).play(2)
    assert counting.outside == {1: 1, 2: 1}
    assert game.records[1].left_out == []
    assert game.quarantined() == [[], [HOSTILE]]


def test_never_half_of_the_clients_are_left_out() -> None:
    """Whatever a detector says, and those in quarantine count."""
    accused, shift = sorted(EVERYBODY)[:4], np.zeros(HIDDEN)

    def script(query: int, probed: bool) -> Detection:
        found = tuple(Suspicion(c, 1, 1.0, 9.0, True, shift, certified=True) for c in accused)
        return nothing(probed, *found)

    game = Game(script).play(3)
    assert [len(record.left_out) for record in game.records] == [2, 2, 0]
    assert [len(out) for out in game.quarantined()] == [0, 2, 2]


def test_who_is_left_out_is_asked_to_train_and_to_report_all_the_same() -> None:
    game = Game(sees(attack, 1, 2), attacking_in(range(1, 100))).play(4)
    received = [m.metadata for m in game.grid.sent if m.metadata.dst_node_id == HOSTILE]
    kinds = Counter(metadata.message_type for metadata in received)
    assert kinds == {"train": 4, messages.MESSAGE_TYPE: 4}
    assert [record.reports for record in game.records] == [len(EVERYBODY)] * 4


def test_it_stays_out_while_it_goes_on_and_is_cleared_when_it_stops() -> None:
    game = Game(sees(attack, 1, 2), attacking_in(range(1, 9))).play(14)
    # 1.5 after the second round; half of that and one more in each round until it stops in the
    # ninth, when about two are left: 1, 0.5, 0.25.
    out = [number for number, who in enumerate(game.quarantined(), start=1) if who]
    assert out == list(range(2, 11))
    assert game.quarantined()[1] == [HOSTILE]
    everybody, without = average(), average(but=HOSTILE)
    assert game.models[2:11] == [without] * 9
    assert game.models[11:] == [everybody] * 3


def test_attackers_are_looked_for_some_rounds_longer_than_the_attack_is_seen() -> None:
    second = HONEST[1]
    others = {second: attacking_in(range(5, 100))}
    script = sees(attack, 1, 2)
    watching = Game(script, attacking_in(range(1, 100)), others, watch=4).play(7)
    assert [second in who for who in watching.quarantined()] == [False] * 5 + [True] * 2
    too_short = Game(script, attacking_in(range(1, 100)), others, watch=2).play(7)
    assert not any(second in who for who in too_short.quarantined())


def test_switched_off_nobody_is_left_out_but_the_evidence_is_there() -> None:
    game = Game(sees(attack, 1, 2), attacking_in(range(1, 100)), quarantine=False).play(4)
    assert game.models == [average({HOSTILE})] * 4
    assert game.quarantined() == [[]] * 4
    assert game.records[1].evidence[HOSTILE] == 1.5
    assert game.records[1].named == [HOSTILE]


def test_an_attack_that_liars_may_have_made_up_is_held_against_nobody() -> None:
    contested = sees(lambda: attack(certified=False), 1, 2, 3)
    game = Game(contested, attacking_in(range(1, 100)), watch=5).play(8)
    assert game.quarantined() == [[]] * 8
    assert game.models == [average({HOSTILE})] * 8


def test_what_was_seen_under_a_contested_attack_does_not_count_when_a_certain_one_follows() -> None:
    def script(query: int, probed: bool) -> Detection:
        return attack(certified=query > 1) if query <= 2 else nothing(probed)

    game = Game(script, attacking_in(range(1, 100))).play(2)
    assert game.records[1].evidence[HOSTILE] == 1.0


def reported(client: int, *, certified: bool) -> Suspicion:
    return Suspicion(client, 1, 0.5, 3.0, True, np.zeros(HIDDEN), certified)


def test_a_suspicious_report_and_an_update_that_stands_out_count_together() -> None:
    def script(query: int, probed: bool) -> Detection:
        found = attack(certified=False) if query <= 3 else nothing(probed)
        accused = (reported(HOSTILE, certified=False), reported(HONEST[0], certified=False))
        return Detection(**{**found.__dict__, "suspicions": accused})

    game = Game(script, attacking_in(range(1, 100))).play(4)
    assert game.quarantined()[2] == [HOSTILE]
    assert not any(HONEST[0] in who for who in game.quarantined())


def test_reports_that_nobody_can_have_framed_are_enough() -> None:
    def script(query: int, probed: bool) -> Detection:
        return nothing(probed, reported(HOSTILE, certified=True))

    assert Game(script).play(3).quarantined() == [[], [HOSTILE], [HOSTILE]]


def test_an_update_that_stands_out_where_nothing_was_seen_is_held_against_nobody() -> None:
    game = Game(sees(attack), attacking_in(range(1, 100)), watch=5).play(4)
    assert game.quarantined() == [[]] * 4
    assert all(record.named == [] for record in game.records)


def test_two_updates_cannot_stand_out_from_each_other() -> None:
    silent = answering(train=lambda message: [])
    game = Game(sees(attack, 1, 2), attacking_in(range(1, 9)), dict.fromkeys(HONEST[1:], silent))
    game.play(3)
    assert [record.named for record in game.records] == [[]] * 3


def test_who_is_left_out_is_known_in_rounds_that_do_not_ask() -> None:
    game = Game(sees(attack, 1, 2), attacking_in(range(1, 100)), every=2).play(6)
    assert sorted(game.queries()) == [1, 3, 5]
    assert game.quarantined() == [[], [], [HOSTILE], [HOSTILE], [HOSTILE], [HOSTILE]]
    assert game.models[3] == average(but=HOSTILE)


def test_a_new_run_starts_with_a_clean_slate() -> None:
    reputation = Reputation(decay=0.5, enter=1.4, leave=0.4)
    game = Game(sees(attack, 1, 2), attacking_in(range(1, 100)), reputation=reputation, watch=9)
    game.play(3)
    assert game.quarantined()[-1] == [HOSTILE]
    assert reputation.evidence == {}
    assert reputation.quarantined == frozenset()
    for server_round in (1, 2, 3):
        game.play_round(server_round)
    assert game.models[3:] == [average({HOSTILE})] * 3
    assert game.quarantined()[3:] == [[]] * 3
    assert game.records[3].evidence == dict.fromkeys(EVERYBODY, 0.0)


def test_a_new_run_waits_for_its_own_confirmation() -> None:
    script = sees(lambda: attack(reset=True), 1, 2, 3, 4, 6)
    game = Game(script, attacking_in(range(1, 100)), watch=9).play(3)
    assert resets(game) == [[], [PLANTED], [PLANTED]]
    for server_round in (1, 2, 3):  # the fourth to the sixth query
        game.play_round(server_round)
    assert resets(game)[3:] == [[], [], []]
    assert [record.named for record in game.records[3:]] == [[], [], []]


def test_a_new_run_does_not_take_its_first_model_for_as_good_as_the_last() -> None:
    everybody = dict.fromkeys(HONEST, answering(report=always_right))
    game = Game(sees(attack), others=everybody, min_accuracy=1.0).play(2)
    assert game.probed() == {2}
    game.grid.sent.clear()
    for server_round in (1, 2):
        game.play_round(server_round)
    assert game.probed() == {2}


# --- with true detectors --------------------------------------------------------------------------


def defended(lines: list[dict[str, Any]], **settings: Any) -> NoneStrategy:
    return NoneStrategy(
        FedAvg(min_train_nodes=10, min_available_nodes=10),
        toy_federation.toy_model,
        toy_federation.EXAMPLE_INPUT,
        **{
            "detector": "mixture+inversion",
            "probe_every": 2,
            "probe_steps": 10,
            "probe_images": 4,
            "budget": 0.2,
            "purify": False,
            "reputation": Reputation(decay=0.8, enter=1.5, leave=0.4),
            "audit": lines.append,
            **settings,
        },
    )


def test_the_attackers_and_nobody_else_are_left_out() -> None:
    federation = toy_federation.ToyFederation(10, malicious=4)
    lines: list[dict[str, Any]] = []
    models = federation.run(defended(lines), 5)
    undefended = federation.run(defended([], start_round=9), 5)
    partition_of = federation.node_ids()
    attackers = list(toy_federation.attackers(10, 4))
    assert sorted(partition_of[node] for node in lines[-1]["quarantined"]) == attackers
    assert toy_federation.attack_success(undefended[-1]) > 0.9
    assert toy_federation.benign_accuracy(models[-1]) > 0.9


def test_without_an_attacker_it_is_fedavg_bit_for_bit() -> None:
    federation = toy_federation.ToyFederation(10)
    lines: list[dict[str, Any]] = []
    models = federation.run(defended(lines), 4)
    plain = federation.run(FedAvg(min_train_nodes=10, min_available_nodes=10), 4)
    assert [line["quarantined"] for line in lines] == [[]] * 4
    for one, other in zip(models, plain, strict=True):
        assert all(one[name].tobytes() == other[name].tobytes() for name in other)


# --- what is written down -------------------------------------------------------------------------


def test_the_audit_trail_says_what_was_seen_who_did_it_and_how_sure_that_is() -> None:
    game = Game(sees(lambda: attack(reset=True), 1, 2), attacking_in(range(1, 100))).play(3)
    first, second, third = game.lines
    for line in game.lines:
        assert json.loads(json.dumps(line, allow_nan=False)) == line
        assert line.keys() >= {"attacks", "named", "evidence", "quarantined", "standings"}
        assert line["standings"].keys() == {"contested", "supported", "certified"}
    seen = {"label": 1, "size": 0.01, "usual": 0.1, "strength": 9.0, "certified": True}
    assert first["attacks"] == second["attacks"] == [seen]
    assert (first["named"], first["quarantined"], first["evidence"]) == ([], [], {})
    assert (second["named"], second["quarantined"]) == ([HOSTILE], [HOSTILE])
    assert second["evidence"] == {str(HOSTILE): 1.5}
    assert [r["standing"] for r in second["reset"]] == ["certified"]
    assert second["standings"] == {"contested": 0, "supported": 0, "certified": 1}
    assert (third["attacks"], third["quarantined"]) == ([], [HOSTILE])


def test_standings_count_what_was_reset_and_what_was_held_back() -> None:
    standing = np.array([0, 1, 2, 2], dtype=np.int8)
    found = Detection(
        np.ones(4), np.array([1, 2]), alive=True, standing=standing, held_back=np.array([0, 3])
    )
    record = RoundRecord(1, neurons_reset=np.array([2, 1]), detection=found)
    assert record.standings == {"contested": 1, "supported": 1, "certified": 2}
    trusting = RoundRecord(
        1, neurons_reset=np.array([2]), detection=Detection(np.ones(4), np.array([2]), alive=True)
    )
    assert trusting.standings == {"contested": 1, "supported": 0, "certified": 0}
    assert set(RoundRecord(1).standings.values()) == {0}
