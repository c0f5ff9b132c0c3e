"""Which experiments are the same one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from server.config import DefenseConfig
from simulations import config, identity
from simulations.__main__ import main


def experiment(**sections: dict[str, Any]) -> config.Experiment:
    return config.build({"experiment": {"name": "toy"}} | sections)


def folder(**sections: dict[str, Any]) -> str:
    return identity.folder(experiment(**sections).identity())


DBA = {"name": "dba", "malicious": 3}


def test_every_key_of_the_defence_is_read_by_somebody() -> None:
    """A new key has to be listed under the strategies that read it."""
    listed = frozenset.union(*identity.READS.values()) | {"name", "timeout"}

    assert set(DefenseConfig.model_fields) - listed == set()
    assert listed - set(DefenseConfig.model_fields) == set()
    names = set(get_args(DefenseConfig.model_fields["name"].annotation))
    assert set(identity.READS) <= names
    assert names >= identity.SILENT


@pytest.mark.parametrize(
    ("defense", "other"),
    [
        ({"name": "undefended"}, {"name": "undefended", "budget": 0.5, "f": 2}),
        ({"name": "multikrum", "f": 2}, {"name": "multikrum", "f": 2, "detector": "contrast"}),
        ({"name": "none-strategy"}, {"name": "none-strategy", "trim_beta": 0.1}),
    ],
)
def test_what_a_strategy_does_not_read_makes_no_difference(defense: Any, other: Any) -> None:
    assert folder(defense=defense, attack=DBA) == folder(defense=other, attack=DBA)


@pytest.mark.parametrize(
    ("defense", "other"),
    [
        ({"name": "undefended"}, {"name": "fedmedian"}),
        ({"name": "undefended"}, {"name": "undefended", "timeout": 5.0}),
        ({"name": "multikrum", "f": 2}, {"name": "multikrum", "f": 3}),
        ({"name": "none-strategy"}, {"name": "none-strategy", "budget": 0.5}),
    ],
)
def test_what_a_strategy_reads_makes_a_difference(defense: Any, other: Any) -> None:
    assert folder(defense=defense, attack=DBA) != folder(defense=other, attack=DBA)


def test_a_strategy_that_is_not_listed_is_taken_to_read_everything(monkeypatch: Any) -> None:
    monkeypatch.delitem(identity.READS, "fedmedian")

    one, other = ({"name": "fedmedian", "budget": budget} for budget in (0.1, 0.2))

    assert folder(defense=one) != folder(defense=other)


def test_without_an_attacker_only_what_asr_is_measured_with_counts() -> None:
    nobody = folder(attack={"name": "none"})

    assert folder(attack={"name": "none", "poison_rate": 0.1, "malicious": 2}) == nobody
    assert folder(attack={"name": "dba", "malicious": 0, "scale": 3.0}) == nobody
    assert folder(attack={"name": "none", "target": 3}) != nobody
    assert folder(attack={"name": "none", "trigger": [[[0, 0]]]}) != nobody


def test_obedience_counts_only_for_a_strategy_that_asks_for_it() -> None:
    disobedient = DBA | {"obeys_filter": False}
    for name in ("undefended", "none-strategy"):
        same = folder(defense={"name": name}, attack=DBA) == folder(
            defense={"name": name}, attack=disobedient
        )
        assert same == (name == "undefended")


def test_names_and_places_make_no_difference_but_seeds_and_rounds_do() -> None:
    here = folder()

    assert folder(experiment={"name": "other"}, run={"output": "x", "workers": 3}) == here
    assert folder(task={"alpha": 0.1}) == here
    assert folder(task={"partition": "dirichlet", "alpha": 0.1}) != folder(
        task={"partition": "dirichlet", "alpha": 0.5}
    )
    assert folder(experiment={"name": "toy", "seed": 1}) != here
    assert folder(experiment={"name": "toy", "rounds": 1}) != here


def test_a_folder_can_be_read() -> None:
    uneven = {"partition": "dirichlet", "alpha": 0.1}

    name = folder(task=uneven, attack=DBA, defense={"name": "fedmedian"})

    assert name.startswith("mnist5k-dirichlet-0.1-dba-3-fedmedian-seed-0-")
    assert len(name.rpartition("-")[2]) == 8
    assert folder().startswith("mnist5k-iid-no-attacker-none-strategy-seed-0-")


def test_runs_that_are_taken_for_the_same_give_the_same_result(tmp_path: Path) -> None:
    file = tmp_path / "toy.toml"
    file.write_text(
        '[experiment]\nname = "toy"\nrounds = 1\nclients = 4\n[train]\nlocal_epochs = 1\n'
        '[attack]\nname = "dba"\nmalicious = 1\n[defense]\nname = "undefended"\n'
    )
    for out, changes in (
        ("a", ["attack.obeys_filter=true"]),
        ("b", ["attack.obeys_filter=false", "defense.every=3"]),
    ):
        changed = [word for change in changes for word in ("--set", change)]
        assert main(["run", str(file), "--quiet", "--out", str(tmp_path / out), *changed]) == 0

    results = [(tmp_path / out / "result.json").read_bytes() for out in ("a", "b")]
    assert results[0] == results[1]


@pytest.mark.parametrize("limits", [{}, {"noise": 0.0}, {"min_count": 1}, {"delta": 1e-9}])
def test_an_experiment_without_limits_is_the_one_that_it_was_before_there_were_any(
    limits: Any,
) -> None:
    limited = experiment(privacy=limits).identity()
    assert "privacy" not in limited
    assert limited == experiment().identity()


def test_limits_make_another_experiment_where_clients_are_asked() -> None:
    noisy = {"noise": 1.0}
    assert folder(privacy=noisy) != folder()
    assert folder(privacy={**noisy, "delta": 1e-6}) != folder(privacy=noisy)
    assert folder(privacy={"reports": False}) != folder()
    assert folder(privacy={"min_count": 9}) != folder()
    undefended = {"name": "undefended"}
    assert folder(defense=undefended, privacy=noisy) == folder(defense=undefended)


def test_a_resumed_run_is_the_run_that_was_stopped() -> None:
    resumed = experiment(experiment={"name": "toy", "resume": True})
    assert resumed.identity() == experiment().identity()
    assert resumed.run_config()["experiment.resume"] is True


def test_thresholds_make_another_experiment_where_something_is_detected() -> None:
    bolder = {"alive": 1.2}
    assert folder(thresholds=bolder) != folder()
    undefended = {"name": "undefended"}
    assert folder(defense=undefended, thresholds=bolder) == folder(defense=undefended)


def test_scores_on_held_out_images_are_of_another_experiment() -> None:
    assert folder(task={"held_out": True}) != folder()
    assert folder(task={"held_out": False}) == folder()


def test_another_activation_makes_another_experiment_and_the_usual_one_does_not() -> None:
    assert folder(task={"activation": "elu"}) != folder()
    assert folder(task={"activation": "relu"}) == folder()
    assert "activation" not in experiment().identity()["task"]


def test_claims_make_another_experiment_and_the_truth_does_not() -> None:
    heavy = {**DBA, "claim": 10.0}
    for defense in ({"name": "undefended"}, {"name": "none-strategy"}):
        assert folder(attack=DBA, defense=defense) != folder(attack=heavy, defense=defense)
    assert "claim" not in experiment(attack=DBA).identity()["attack"]
    assert experiment(attack=heavy).identity()["attack"]["claim"] == 10.0
