"""What makes an experiment this experiment, and the folder that its result is found in again.

Settings that nothing in the experiment reads are left out: changing a default of NONE's does not
make an undefended run another one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

# What each strategy reads of [defense], besides `name` and `timeout`. One that is not listed is
# taken to read everything: at worst its runs are done again without need.
READS: dict[str, frozenset[str]] = {
    "undefended": frozenset(),
    "none-strategy": frozenset(
        (
            *("detector", "reset", "every", "start_round", "budget", "quorum", "guard", "filter"),
            *("min_count", "repair", "quarantine", "reaggregate", "liars"),
            *("probe_every", "probe_steps", "probe_images", "share_probes"),
        )
    ),
    "fedmedian": frozenset(),
    "trimmed-avg": frozenset({"trim_beta"}),
    "multikrum": frozenset({"f"}),
    "bulyan": frozenset({"f"}),
    "rfa": frozenset(),
    "rlr": frozenset({"rlr_threshold"}),
    "foolsgold": frozenset(),
    "flame": frozenset({"flame_noise"}),
    "pruning": frozenset({"quorum", "guard", "min_count"}),
    "oracle": frozenset(),
}
# Strategies that ask clients for nothing but training, and tell them nothing but the model: what
# malicious clients would report, and whether they would obey, makes no difference.
SILENT = frozenset(READS) - {"none-strategy", "pruning"}
_WHEN_ASKED = frozenset({"obeys_filter", "reporter"})
# A limit at its default is none, and an experiment without any is the one that it was before there
# were limits. What accounts for noise is read where there is some.
_NO_LIMIT = {"reports": True, "min_count": 1, "noise": 0.0, "patterns": False}
_OF_NOISE = ("noise", "delta", "max_epsilon")
# What came to [task] later; at these an experiment is the one that it was before.
_TASK_DEFAULTS = {"held_out": False, "activation": "relu"}
_CLAIM = 1.0  # of [attack], likewise
# ASR is measured with these, whether anybody attacks or not.
_MEASURED_WITH = ("target", "trigger")


def of(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Leave out of an experiment's sections what nothing reads.

    Parameters
    ----------
    sections : mapping
        All sections with their keys and values; ``run`` says where, and is no part of it.

    Returns
    -------
    dict
        The sections, with fewer keys. An attack by nobody is the attack "none".
    """
    found = {name: dict(values) for name, values in sections.items() if name != "run"}
    defense, attack, task = found["defense"], found["attack"], found["task"]
    found["experiment"].pop("resume", None)  # a resumed run is the run that was stopped
    strategy = defense["name"]
    if strategy in READS:
        read = READS[strategy] | {"name", "timeout"}
        found["defense"] = {key: value for key, value in defense.items() if key in read}
    if attack["name"] == "none" or attack["malicious"] == 0:
        found["attack"] = {"name": "none"} | {key: attack[key] for key in _MEASURED_WITH}
    elif strategy in SILENT:
        found["attack"] = {k: v for k, v in attack.items() if k not in _WHEN_ASKED}
    if found["attack"].get("claim") == _CLAIM:
        found["attack"].pop("claim")
    if task["partition"] == "iid":
        task.pop("alpha")
    for key, default in _TASK_DEFAULTS.items():
        if task.get(key, default) == default:
            task.pop(key, None)
    if strategy in READS and strategy != "none-strategy":
        found.pop("thresholds", None)
    limits = _limits(found.pop("privacy", {}))
    if limits and strategy not in SILENT:
        found["privacy"] = limits
    return found


def _limits(privacy: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out of [privacy] what sets no limit."""
    noisy = _OF_NOISE if privacy.get("noise") else ()
    return {
        key: value
        for key, value in privacy.items()
        if key in noisy or (key in _NO_LIMIT and value != _NO_LIMIT[key])
    }


def label(identity: Mapping[str, Mapping[str, Any]]) -> str:
    """Name an experiment so that a person knows it, "mnist5k-iid-dba-4-undefended-seed-0"."""
    task, attack = identity["task"], identity["attack"]
    words = [task["dataset"], task["partition"]]
    if "alpha" in task:
        words.append(f"{task['alpha']:g}")
    words.append(attack["name"] if attack["name"] != "none" else "no-attacker")
    words += [str(attack[key]) for key in ("malicious", "reporter") if key in attack]
    words += [identity["defense"]["name"], "seed", str(identity["experiment"]["seed"])]
    return "-".join(words)


def folder(identity: Mapping[str, Mapping[str, Any]]) -> str:
    """Name the folder of an experiment; experiments that differ only in their name share one."""
    nameless = dict(identity["experiment"])
    nameless.pop("name")
    text = json.dumps({**identity, "experiment": nameless}, sort_keys=True)
    return f"{label(identity)}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
