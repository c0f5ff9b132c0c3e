"""What the operator does: enrol participants, start a run, follow it to its end."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from deployment.folder import Participant
from simulations.config import Experiment
from simulations.engines.commands import COMPLETED, CONNECTION, Commands, FlowerError
from simulations.engines.flower import CHECKOUT
from tasks.config import RunConfigValue

POLL_SECONDS = 1.0
ASK_SECONDS = 3.0  # between two questions that start Flower's program
START_SECONDS = 120  # for a run to be submitted and its ServerApp to load
LOST_SECONDS = 120  # that the SuperLink may be away while a run goes on
PHASES = 3  # a round trains, asks, and asks again after a reset; each is bounded by the timeout

Check = Callable[[], None]

# Flower's program takes longer to start than to register a key, so it starts once for all.
_CALLS = """
import json, sys
from importlib import metadata
(flwr,) = metadata.entry_points(group="console_scripts", name="flwr")
program = flwr.load()
for words in json.loads(sys.argv[1]):
    program(words, standalone_mode=False)
"""


class Operator(Commands):
    """Commands a SuperLink; its parameters are those of `Commands`."""

    def enrol(self, participants: Sequence[Participant]) -> dict[str, Participant]:
        """Register the participants' public keys, and return who has which node id.

        Raises
        ------
        FlowerError
            When the SuperLink does not take one of the keys.
        """
        calls = [
            ["supernode", "register", str(each.public_key), CONNECTION, "--format", "json"]
            for each in participants
        ]
        done = subprocess.run(
            [sys.executable, "-P", "-c", _CALLS, json.dumps(calls)],
            cwd=self.home,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self.log,
        )
        answers = list(_documents(done.stdout.decode()))
        node_ids = [str(answer["node-id"]) for answer in answers if "node-id" in answer]
        if len(node_ids) < len(calls):
            reason = (
                answers[-1].get("error-message", "why is in the log") if answers else "no answer"
            )
            name = participants[len(node_ids)].name
            raise FlowerError(f"the SuperLink did not register {name}: {reason}")
        return dict(zip(node_ids, participants, strict=True))

    def online(self) -> set[str]:
        """Return the ids of the nodes that are online."""
        nodes = self.ask("supernode", "list").get("nodes", [])
        return {str(node["node-id"]) for node in nodes if node["status"] == "online"}

    def wait_for(self, nodes: Mapping[str, Participant], check: Check, seconds: float) -> None:
        """Wait until all nodes are online.

        Parameters
        ----------
        nodes : mapping of str to Participant
            By node id.
        check : callable
            Raises when waiting has no point any more.
        seconds : float
            How long to wait at most.

        Raises
        ------
        FlowerError
            Naming who is missing.
        """
        deadline = time.monotonic() + seconds
        while missing_ids := set(nodes) - self.online():
            check()
            if time.monotonic() > deadline:
                missing = sorted(nodes[each].name for each in missing_ids)
                raise FlowerError(
                    f"{len(nodes) - len(missing)} of {len(nodes)} participants are online after "
                    f"{seconds:.0f} s; waited for {', '.join(missing)}"
                )
            time.sleep(ASK_SECONDS)

    def run(self, experiment: Experiment, test_data: Path, check: Check) -> None:
        """Run an experiment's apps to their end.

        Parameters
        ----------
        experiment : Experiment
            Its ``run.output`` is where the ServerApp finds it.
        test_data : Path
            Where the ServerApp finds its data.
        check : callable
            Raises when the run cannot go on.

        Raises
        ------
        FlowerError
            When it ends in anything but success, or not in time.
        """
        config = run_config(experiment, test_data)
        rounds, timeout = experiment.experiment.rounds, experiment.defense.timeout
        deadline = time.monotonic() + START_SECONDS + rounds * PHASES * timeout
        process = self.submit(CHECKOUT, config)
        try:
            while process.poll() is None:
                check()
                if time.monotonic() > deadline:
                    raise FlowerError(f"{rounds} rounds were not over in time")
                time.sleep(POLL_SECONDS)
        finally:
            process.kill()
            process.wait()
        status = self._final_status(check, deadline)
        if status != COMPLETED:
            raise FlowerError(f"the run ended as {status}")

    def _final_status(self, check: Check, deadline: float) -> str:
        """Wait for the end of the newest run; it may go on when its log has ceased to stream."""
        heard = time.monotonic()
        while True:
            check()
            answer = self.ask("list")
            if answer.get("runs"):
                status = str(answer["runs"][0]["status"])
                if status.startswith("finished"):
                    return status
            elif answer.get("success"):
                raise FlowerError("`flwr run` did not start a run")
            now = time.monotonic()
            heard = now if answer.get("success") else heard
            if now > min(deadline, heard + LOST_SECONDS):
                raise FlowerError("the run was not followed to its end: the SuperLink is away")
            time.sleep(ASK_SECONDS)


def _documents(text: str) -> Iterator[dict[str, Any]]:
    """Read the JSON objects that a text consists of."""
    decoder, position = json.JSONDecoder(), 0
    while text[position:].strip():
        position += len(text[position:]) - len(text[position:].lstrip())
        found, position = decoder.raw_decode(text, position)
        yield found


def run_config(experiment: Experiment, test_data: Path) -> dict[str, RunConfigValue]:
    """Return what both apps are told: the experiment, with the ServerApp's place of the data."""
    return {**experiment.run_config(), "run.data_root": str(test_data)}
