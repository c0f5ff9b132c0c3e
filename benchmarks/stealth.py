"""How near to honest updates the attack ``adaptive`` stays, and what is left of its backdoor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from benchmarks.outcome import Outcome, Row
from client import network
from client.attacks import participant_of
from client.participant import Settings, State
from none_core.activations import spatial_maximum
from none_core.attribution import Scene, distances, scene_of
from simulations import config
from simulations.__main__ import EXPERIMENTS
from tasks import data, metrics, models
from tasks.config import TaskConfig
from tasks.models import as_input
from tasks.poisoning import stamp

METHOD = (
    "mnist5k, 10 clients, 4 of them adaptive, no defence, plain averaging. In each round the "
    "clients' updates are compared as the defence does it, but where the backdoor really is: at "
    "the 5 % of each layer's neurons that the true trigger moves most in the averaged model. "
    "distance: median over clients and rounds, an ordinary client's is 1. named: share of the "
    "clients' updates that are 1.5 or more away, from which the defence names them. Distances are "
    "from round 6 on. A penalty of 0 is DBA."
)
APART, FIRST = 1.5, 6
SHOWN = 256  # test images on which the trigger's shift is measured

Arrays = dict[str, NDArray[np.float32]]


class Run(NamedTuple):
    """BA and ASR after each round, (rounds,), and distances, (rounds, clients)."""

    ba: NDArray[np.float64]
    asr: NDArray[np.float64]
    apart: NDArray[np.float64]
    malicious: NDArray[np.bool_]  # (clients,)


def run(
    data_root: Path | None,
    penalties: Sequence[float],
    rounds: int = 40,
    overrides: Sequence[str] = (),
) -> Outcome:
    """Run all penalties in turn."""
    rows = []
    for penalty in penalties:
        settings = everybody(data_root, penalty, rounds, overrides)
        rows.append(_row(penalty, federate(settings, data_root)))
    return Outcome("stealth", METHOD, rows)


def everybody(
    data_root: Path | None, penalty: float, rounds: int, overrides: Sequence[str] = ()
) -> list[Settings]:
    """Return the settings of all clients of one experiment."""
    experiment = config.load(
        EXPERIMENTS / "dba-mnist5k.toml",
        [
            'attack.name="adaptive"',
            f"attack.penalty={penalty}",
            f"experiment.rounds={rounds}",
            *overrides,
        ],
    )
    run = experiment.run.model_copy(update={"data_root": str(data_root) if data_root else None})
    return [
        Settings(
            experiment.experiment,
            experiment.task,
            experiment.train,
            experiment.attack,
            run,
            client,
        )
        for client in range(experiment.experiment.clients)
    ]


def federate(clients: Sequence[Settings], data_root: Path | None) -> Run:
    """Train by plain federated averaging, and compare the updates of each round."""
    torch.set_num_threads(1)
    one = clients[0]
    loaded = data.load(one.task.dataset, data_root, held_out=one.task.held_out)
    target, shown = one.attack.target, one.trigger.whole()
    others = loaded.test_images[loaded.test_labels != target][:SHOWN]
    images = others, stamp(others, shown)
    state = start(one)
    scores, apart = [], []
    rounds = range(1, one.experiment.rounds + 1)
    for server_round in track(rounds, one.experiment.name, console=Console(stderr=True)):
        updates = [update_of(settings, state, server_round) for settings in clients]
        state = averaged(updates)
        model = network.model_of_thread(one.task)
        model.load_state_dict(state)
        scores.append(
            metrics.evaluate(model, loaded.test_images, loaded.test_labels, one.trigger, target)
        )
        scene = true_scene(one.task, model, *images, target)
        apart.append(distances([_arrays(update, scene) for update in updates], scene))
    return Run(
        np.array([s.ba for s in scores]),
        np.array([s.asr for s in scores]),
        np.array(apart),
        np.array([settings.is_malicious for settings in clients]),
    )


def start(one: Settings) -> State:
    """Return the initial model."""
    task, seed = one.task, one.experiment.seed
    shape, classes = data.SHAPES[task.dataset], data.CLASSES[task.dataset]
    return models.build(task.model_name, shape, classes, seed, task.activation).state_dict()


def averaged(updates: Sequence[State]) -> State:
    """Return the plain average; what is counted rather than learned is rounded down."""
    stacked = {name: torch.stack([update[name] for update in updates]) for name in updates[0]}
    return {
        name: each.mean(0) if each.is_floating_point() else each.double().mean(0).to(each.dtype)
        for name, each in stacked.items()
    }


def update_of(settings: Settings, sent: State, server_round: int) -> State:
    """Return what a client sends back."""
    participant = participant_of(settings)
    model = network.model_of_thread(settings.task)
    model.load_state_dict(sent)
    attacking = participant.attacks(server_round, sent)
    kept = torch.arange(len(participant.data(attacking).labels))
    participant.train(model, kept, server_round, attacking)
    trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return participant.update(sent, trained, attacking)


def true_scene(
    task: TaskConfig, model: nn.Module, clean: Tensor, stamped: Tensor, target: int
) -> Scene:
    """Return where the backdoor lives in a model, as nobody can know who has not the trigger."""
    neurons, reader = network.neurons(task), network.reader_of_thread(task)
    with torch.no_grad():
        before, after = (
            spatial_maximum(reader(as_input(model.eval(), images))[1])
            for images in (clean, stamped)
        )
        shift = (after - before).mean(0) / before.std(0)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    moved = shift.nan_to_num(0, 0, 0).double().numpy()
    return scene_of(neurons, moved, target, shapes)


def _arrays(state: State, scene: Scene) -> Arrays:
    names = {part.name for part in (*scene.entrances, *scene.exits)}
    return {name: state[name].numpy() for name in names}


def _row(penalty: float, found: Run) -> Row:
    late = found.apart[min(FIRST, len(found.apart)) - 1 :]
    attackers, honest = late[:, found.malicious], late[:, ~found.malicious]
    return Row(
        f"penalty {penalty:g}",
        {
            "BA %": 100 * float(found.ba[-1]),
            "ASR %": 100 * float(found.asr[-1]),
            "worst ASR %, last 5": 100 * float(found.asr[-5:].max()),
            "attackers' distance": float(np.median(attackers)),
            "honest distance": float(np.median(honest)),
            "attackers / honest": float(np.median(attackers) / np.median(honest)),
            "attackers named %": 100 * float((attackers >= APART).mean()),
            "honest named %": 100 * float((honest >= APART).mean()),
        },
        samples={
            "BA": found.ba.tolist(),
            "ASR": found.asr.tolist(),
            "attackers' distance": np.median(found.apart[:, found.malicious], axis=1).tolist(),
            "honest distance": np.median(found.apart[:, ~found.malicious], axis=1).tolist(),
        },
    )
