"""What a deployment's folder gives to whom, and that it is what a simulation would use."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import torch
from flwr.app import Context, RecordDict
from flwr.common.config import parse_config_args

from client.attacks import participant_of
from client.participant import Participant, Settings
from deployment import folder
from deployment.folder import Site
from server.config import DefenseConfig
from simulations import config
from simulations.config import ConfigError, Experiment
from tasks import data

CLIENTS, ATTACKERS = 10, 4


def experiment(**attack: object) -> Experiment:
    return config.build(
        {
            "experiment": {"name": "t", "clients": CLIENTS, "seed": 3},
            "attack": {"name": "dba", "malicious": ATTACKERS, **attack},
        }
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return folder.prepare(tmp_path_factory.mktemp("deployment") / "site", experiment())


def deployed(site: Site, number: int, file: str = "") -> Participant:
    """Participant as a SuperNode with its node configuration would run it."""
    each = site.participants[number]
    file = file or ("node-config" if each.attacker is None else "attack-config")
    told = (each.folder / file).read_text().strip()
    run_config = dict(experiment().run_config())
    context = Context(1, 7, parse_config_args([told]), RecordDict(), run_config)
    return participant_of(Settings.of(context))


def simulated(partition: int) -> Participant:
    node = {"partition-id": partition, "num-partitions": CLIENTS}
    run_config = dict(experiment().run_config())
    return participant_of(Settings.of(Context(1, 7, node, RecordDict(), run_config)))


def test_everybody_does_what_the_simulation_does(site: Site) -> None:
    partitions = set()
    for each in site.participants:
        here, there = deployed(site, each.number), simulated(each.partition)
        assert type(here) is type(there)
        for attacking in (False, True):
            mine, theirs = here.data(attacking), there.data(attacking)
            assert torch.equal(mine.images, theirs.images)
            assert torch.equal(mine.labels, theirs.labels)
            assert torch.equal(mine.poisoned, theirs.poisoned)
        partitions.add(each.partition)
    assert partitions == set(range(CLIENTS))
    malicious = [deployed(site, n).settings.is_malicious for n in range(CLIENTS)]
    assert malicious == [False] * (CLIENTS - ATTACKERS) + [True] * ATTACKERS


def test_a_participant_has_its_own_share_and_nothing_to_be_measured_with(site: Site) -> None:
    whole = data.load("mnist5k")
    shares = [data.load("mnist5k", each.data) for each in site.participants]
    assert sum(len(share.train_labels) for share in shares) == len(whole.train_labels)
    assert all(len(share.test_labels) == 0 for share in shares)
    server = data.load("mnist5k", site.test_data)
    assert len(server.train_labels) == 0
    assert torch.equal(server.test_images, whole.test_images)


def test_what_is_private_is_private(site: Site) -> None:
    for path in (site.superlink, site.gateway, *(each.folder for each in site.participants)):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    keys = [site.superlink / "key.pem", site.gateway / "key.pem", site.secret]
    for file in (*keys, *(each.key for each in site.participants)):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert len({each.key.read_bytes() for each in site.participants}) == CLIENTS


def test_nobody_attacks_who_is_not_told_to(site: Site, tmp_path: Path) -> None:
    honest = folder.prepare(tmp_path / "site", experiment(name="none"))
    assert list(honest.folder.rglob("attack-config")) == []
    assert len(list(site.folder.rglob("attack-config"))) == ATTACKERS
    for number in range(CLIENTS):
        settings = deployed(site, number, "node-config").settings
        assert not settings.is_malicious
        assert (settings.partition_id in settings.malicious) == (number >= CLIENTS - ATTACKERS)


def test_what_needs_the_data_of_others_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'^attack\.reporter = "collude" is not legal in a dep'):
        folder.prepare(tmp_path / "site", experiment(reporter="collude"))
    assert not (tmp_path / "site").exists()


def test_settings_are_not_chosen_in_a_deployment(tmp_path: Path) -> None:
    held_out = experiment()
    task = held_out.task.model_copy(update={"held_out": True})
    oracle = held_out.model_copy(update={"defense": DefenseConfig(name="oracle")})
    with pytest.raises(
        ConfigError, match=r"^defense\.name = \"oracle\" is not legal in a deployment"
    ):
        folder.prepare(tmp_path / "site", oracle)
    with pytest.raises(ConfigError, match=r"^task\.held_out = true is not legal in a deployment"):
        folder.prepare(tmp_path / "site", held_out.model_copy(update={"task": task}))


def test_a_folder_is_not_used_twice(site: Site) -> None:
    with pytest.raises(FileExistsError):
        folder.prepare(site.folder, experiment())
