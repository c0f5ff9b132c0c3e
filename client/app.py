"""The Flower ClientApp: trains on its share of the data, honestly or not, and reports to NONE."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch.utils.data import TensorDataset

from client import network
from client.attacks import participant_of
from client.memory import attacked, remember
from client.participant import LocalData, Settings, State
from none_core.flower import NoneClient
from none_core.flower.client import CallNext
from none_core.flower.messages import MESSAGE_TYPE, record_of, state_of, without_filter
from none_core.flower.policy import PREFIX, ReportPolicy, answers
from tasks.config import TaskConfig


def none_mod(message: Message, context: Context, call_next: CallNext) -> Message:
    """Let NONE's client half act, unless this participant ignores what it is asked to drop."""
    if message.metadata.message_type == MESSAGE_TYPE:
        return call_next(message, context)  # what to report is the participant's choice
    settings = Settings.of(context)
    if not participant_of(settings).obeys:
        message.content = without_filter(message.content)
    return _none(settings.task).mod(message, context, call_next)


app = ClientApp(mods=[none_mod])


@app.query("activations")
def query(message: Message, context: Context) -> Message:
    """Report activations."""
    settings = Settings.of(context)
    return participant_of(settings).report(message, context, _none(settings.task).query)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the model that the server sent on the local samples."""
    # Participants share the cores, and sums must not depend on their number.
    torch.set_num_threads(1)
    settings = Settings.of(context)
    participant = participant_of(settings)
    server_round = int(message.content["config"]["server-round"])
    sent = state_of(message.content["arrays"])
    attacking = participant.attacks(server_round, sent)
    remember(context, attacking=attacking)
    local = participant.data(attacking)
    kept = torch.from_numpy(_none(settings.task).kept(context))

    model = network.model_of_thread(settings.task)
    model.load_state_dict(sent)
    loss = participant.train(model, kept, server_round, attacking)
    state = participant.update(sent, model.state_dict(), attacking)
    examples = participant.examples(len(kept), attacking)
    return Message(_reply(settings, state, loss, local, kept, examples), reply_to=message)


def _reply(
    settings: Settings,
    state: State,
    loss: float,
    local: LocalData,
    kept: torch.Tensor,
    examples: int,
) -> RecordDict:
    # What only a simulation can know: it is measured, and no defence reads it.
    truth = ConfigRecord(
        {
            "partition-id": settings.partition_id,
            "poisoned": int(local.poisoned.sum()),
            "dropped": len(local.labels) - len(kept),
            "dropped-poisoned": int(local.poisoned.sum() - local.poisoned[kept].sum()),
        }
    )
    metrics = MetricRecord({"train-loss": loss, "num-examples": examples})
    arrays: ArrayRecord = record_of(state)
    return RecordDict({"arrays": arrays, "metrics": metrics, "truth": truth})


def _current_dataset(context: Context) -> TensorDataset:
    return participant_of(Settings.of(context)).data(attacked(context)).dataset


@lru_cache(maxsize=4)
def _none(task: TaskConfig) -> NoneClient:
    return NoneClient(
        lambda: network.build(task),
        _current_dataset,
        prepare=lambda images: images.float().div_(255),
        batch_size=512,  # clients that share a process pay for each call together
        policy=_policy,
        noise=_noise,
    )


def _policy(context: Context) -> ReportPolicy:
    """Read what this participant may say; in a simulation all images are the experimenter's."""
    policy = ReportPolicy.of(context)
    wanted = bool(context.run_config.get(f"{PREFIX}patterns", False))
    shown = policy.patterns or (wanted and not Settings.of(context).deployed)
    return replace(policy, patterns=shown)


def _noise(context: Context) -> np.random.Generator:
    """Draw noise that repeats for a seed, unless the node itself asks for privacy.

    The seed is known to whoever starts the run: noise from it is for measuring what noise does.
    """
    if any(key.startswith(PREFIX) for key in context.node_config):
        return np.random.default_rng()
    return Settings.of(context).noise_rng(answers(context))
