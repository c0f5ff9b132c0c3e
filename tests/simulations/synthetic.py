"""What a run leaves, written without training anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from none_core.neurons import NeuronMap
from simulations import results
from tasks import models
from tasks.config import AttackConfig, ExperimentConfig, TaskConfig, from_run_config

SHAPE = (1, 28, 28)


def entry(number: int, **values: Any) -> dict[str, Any]:
    """Make a round of the history."""
    return {
        "round": number,
        "ba": 0.9,
        "asr": 0.5,
        "recovered": 0.4,
        "neurons_reset": 0,
        "standings": {"certified": 0, "supported": 0, "contested": 0},
        "suspected": [],
        "left_out": [],
        "quarantined": [],
        "refused": 0,
        "filtered": {"dropped": 0, "poisoned": 0},
        "bytes": {"train_down": 1, "train_up": 1, "query_down": 1, "query_up": 1},
        "decision": "",
        **values,
    }


def spent(number: int) -> dict[str, float]:
    """Make a round of the timing."""
    return {"round": number, "train": 1.0, "query": 0.1, "decide": 0.1, "evaluate": 0.1}


def leave_behind(output: Path, run_config: dict[str, Any]) -> None:
    """Write the files of a run, with evidence unless it is undefended."""
    rounds = from_run_config(run_config, "experiment", ExperimentConfig).rounds
    attack = from_run_config(run_config, "attack", AttackConfig)
    task = from_run_config(run_config, "task", TaskConfig)
    malicious = list(range(attack.malicious)) if attack.name != "none" else []
    defended = run_config["defense.name"] != "undefended"
    history = [entry(number, ba=0.9 * number / rounds) for number in range(rounds + 1)]
    if defended:
        history[-1] |= {"neurons_reset": 4, "suspected": malicious, "decision": "<b>reset</b> 4"}
    model = models.build(task.model_name, SHAPE, 10, 1, task.activation)
    torch.save(model.state_dict(), output / "model.pt")
    if defended:
        torch.save(model.state_dict(), output / "evidence_model.pt")
        write_evidence(output / "evidence.npz", model)
    truth = {"malicious": malicious, "poisoned": 100}
    with (output / "progress.jsonl").open("w") as lines:
        lines.writelines(json.dumps(each) + "\n" for each in history)
    (output / "history.json").write_text(json.dumps({"rounds": history, "truth": truth}))
    timing = [spent(number) for number in range(rounds + 1)]
    (output / "timing.json").write_text(json.dumps({"rounds": timing}))


def write_evidence(path: Path, model: torch.nn.Module) -> None:
    neurons = NeuronMap.trace(model.eval(), torch.zeros(1, *SHAPE))
    rng = np.random.default_rng(0)
    scores = rng.gamma(1.0, size=neurons.size)
    np.savez(
        path,
        client_evidence=rng.gamma(1.0, size=(3, neurons.size)).astype(np.float32),
        clients=np.array([7, 0, 3]),
        scores=scores,
        reset=scores >= np.sort(scores)[-4],
        layer_of=neurons.layer_of(np.arange(neurons.size)),
        layer_names=np.array([layer.name for layer in neurons.layers]),
        round=3,
    )


def invent(folder: Path, configuration: dict[str, Any], strength: float, cost: float) -> None:
    """Write the result of a run that might have been.

    Parameters
    ----------
    folder : Path
        Made if it does not exist.
    configuration : dict
        An experiment's identity.
    strength : float
        ASR of the attack under this defence, a share.
    cost : float
        What the defence costs in BA, a share.
    """
    folder.mkdir(parents=True)
    seed, rounds = (configuration["experiment"][key] for key in ("seed", "rounds"))
    rng = np.random.default_rng([seed, int(1e4 * strength)])
    attacked = configuration["attack"]["name"] != "none"
    count = configuration["attack"].get("malicious", 0) if attacked else 0
    malicious = list(range(count))
    ours = configuration["defense"]["name"] == "none-strategy"
    entries = []
    for number in range(rounds + 1):
        share = min(1.0, 2 * number / rounds)
        asr = np.clip(strength + rng.normal(0, 0.02), 0, 1) if attacked else 0.006
        values = {
            "ba": float(np.clip(share * (0.966 - cost) + rng.normal(0, 0.002), 0.1, 1)),
            "asr": float(share * asr),
            "recovered": float(share * (1 - asr) * 0.96),
            "neurons_reset": int(ours and attacked and number % 7 == 3) * 5,
            "suspected": malicious if ours and number > 1 else [],
            "quarantined": malicious[: number // 3] if ours else [],
            "filtered": {"dropped": 100, "poisoned": 88} if ours and attacked else NOTHING,
        }
        entries.append(entry(number, **values))
    truth = {"malicious": malicious, "poisoned": 100 * (rounds + 1)}
    result = results.assemble(configuration, {"rounds": entries, "truth": truth})
    if ours:
        result["certificates"] = {"certified": 30, "supported": 6, "contested": 4}
    results.write(folder, result)
    timing = {"seconds": 60.0 + seed, "rounds": [spent(n) for n in range(rounds + 1)]}
    results.write(folder, timing, results.TIMING)


NOTHING = {"dropped": 0, "poisoned": 0}
