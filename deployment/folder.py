"""The folder of a deployment: what each party is given, and nothing that another party needs.

::

    superlink/               the operator's: certificate, key, the runner's secret
    state/                   the SuperLink's database
    server/data/             test images, for the ServerApp
    gateway/                 the certificate and key of the participants' door
    authority.pem            by which everybody recognises both servers
    participants/0/          handed to participant 0, and to nobody else
        key, key.pub             who it is; the operator registers key.pub
        node-config              what its SuperNode is told
        attack-config            what it is told if it is to attack; only the attackers have one
        data/                    its own share of the training images
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from client.participant import ATTACKER, DATA_ROOT, Settings, clean_share
from deployment import certificates
from simulations.config import ConfigError, Experiment
from tasks import data
from tasks.poisoning import malicious_clients

LOOPBACK = ("localhost", "127.0.0.1")


@dataclass(frozen=True)
class Participant:
    """One participant's part of the folder.

    Attributes
    ----------
    number : int
        From 0; the attackers come last, so that a deployment can start them or not.
    partition : int
        The share of the data that it holds: the one of the same number in a simulation.
    attacker : int or None
        Its number among the attackers; None if it is honest.
    folder : Path
    """

    number: int
    partition: int
    attacker: int | None
    folder: Path

    @property
    def name(self) -> str:
        """What processes, logs and messages call it."""
        return f"participant-{self.number}"

    @property
    def key(self) -> Path:
        """Its private key; the public one lies beside it, with the suffix ``.pub``."""
        return self.folder / "key"

    @property
    def public_key(self) -> Path:
        """What the operator registers."""
        return self.folder / "key.pub"

    @property
    def data(self) -> Path:
        """The folder with its share."""
        return self.folder / "data"

    def write_config(self, clients: int, data_root: str) -> None:
        """Write what its SuperNode is told, as ``--node-config`` takes it."""
        told = f'partition-id={self.partition} num-partitions={clients} {DATA_ROOT}="{data_root}"'
        (self.folder / "node-config").write_text(f"{told}\n")
        if self.attacker is not None:
            (self.folder / "attack-config").write_text(f"{told} {ATTACKER}={self.attacker}\n")


@dataclass(frozen=True)
class Site:
    """A deployment's folder.

    Parameters
    ----------
    folder : Path
    participants : tuple of Participant
        In the order of their numbers.
    """

    folder: Path
    participants: tuple[Participant, ...]

    @property
    def authority(self) -> Path:
        """The certificate that both servers' were signed by."""
        return self.folder / "authority.pem"

    @property
    def superlink(self) -> Path:
        """The operator's own."""
        return self.folder / "superlink"

    @property
    def state(self) -> Path:
        """Where the SuperLink keeps its database."""
        return self.folder / "state"

    @property
    def gateway(self) -> Path:
        """The gateway's certificate and key."""
        return self.folder / "gateway"

    @property
    def secret(self) -> Path:
        """Shared by the SuperLink and the process that starts the ServerApp."""
        return self.superlink / "runner-secret"

    @property
    def test_data(self) -> Path:
        """What the ServerApp measures with."""
        return self.folder / "server" / "data"


def prepare(
    folder: Path, experiment: Experiment, hosts: Sequence[str] = LOOPBACK, data_root: str = ""
) -> Site:
    """Write keys, certificates and everybody's data.

    Parameters
    ----------
    folder : Path
        Made; it must not exist, or be empty.
    experiment : Experiment
        Its data are shared out as its simulation would.
    hosts : sequence of str
        Names and addresses that the two servers are reached by.
    data_root : str
        Where each participant finds its data; left out, where they are written to.

    Raises
    ------
    ConfigError
        For an attack that needs what a deployed attacker has not got, and a defence that needs what
        a deployed server has not.
    """
    if experiment.attack.name != "none" and experiment.attack.reporter == "collude":
        raise ConfigError(
            'attack.reporter = "collude" is not legal in a deployment: it reports on the data of '
            "another participant"
        )
    if experiment.task.held_out:
        raise ConfigError(
            "task.held_out = true is not legal in a deployment: settings are chosen in simulations"
        )
    if experiment.defense.name == "oracle":
        raise ConfigError(
            'defense.name = "oracle" is not legal in a deployment: it is told who attacks'
        )
    site = Site(folder, _participants(folder, experiment))
    for private in (
        site.superlink,
        site.state,
        site.gateway,
        *(each.folder for each in site.participants),
    ):
        private.mkdir(parents=True, mode=0o700)
    authority = certificates.Authority(f"{experiment.experiment.name} authority")
    authority.write(site.authority)
    for server in (site.superlink, site.gateway):
        authority.issue(hosts, server / "certificate.pem", server / "key.pem")
    certificates.write_secret(site.secret)
    site.test_data.mkdir(parents=True)
    whole = _load(experiment)
    nothing = whole.train_images[:0], whole.train_labels[:0]
    data.save(_part(whole, nothing, (whole.test_images, whole.test_labels)), site.test_data)
    for each in site.participants:
        certificates.write_node_key(each.key, each.public_key)
        each.write_config(experiment.experiment.clients, data_root or str(each.data))
        each.data.mkdir()
        share = clean_share(_settings(experiment, each.partition))
        data.save(_part(whole, (share.images, share.labels), nothing), each.data)
    return site


def hand_over(folder: Path, owner: int) -> None:
    """Give everything in a folder to another user, as root can."""
    for path in (folder, *folder.rglob("*")):
        os.chown(path, owner, owner, follow_symlinks=False)


def _participants(folder: Path, experiment: Experiment) -> tuple[Participant, ...]:
    """Give each a number: the honest ones first, each group in the order of its partitions."""
    attack, settings = experiment.attack, experiment.experiment
    number = 0 if attack.name == "none" else attack.malicious
    attackers = malicious_clients(settings.clients, number, settings.seed)
    honest = [p for p in range(settings.clients) if p not in attackers]
    order = [(p, None) for p in honest] + [(p, i) for i, p in enumerate(attackers)]
    return tuple(
        Participant(number, partition, attacker, folder / "participants" / str(number))
        for number, (partition, attacker) in enumerate(order)
    )


def _settings(experiment: Experiment, partition: int) -> Settings:
    sections = ("experiment", "task", "train", "attack", "run")
    return Settings(
        **{name: getattr(experiment, name) for name in sections}, partition_id=partition
    )


def _load(experiment: Experiment) -> data.Data:
    root = experiment.run.data_root
    return data.load(experiment.task.dataset, Path(root) if root else None)


def _part(whole: data.Data, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> data.Data:
    return data.Data(whole.name, *train, *test, whole.classes)
