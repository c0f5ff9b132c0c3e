"""All that is tried against poisoned training data on one machine, by name: NONE, and its peers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

from torch.utils.data import TensorDataset

from none_core.cleansing import Cleanser
from none_core.detection import DETECTORS
from none_core.neurons import HOWS
from none_core.training import NoneTrainer
from simulations.central import baselines
from simulations.central.baselines.base import Baseline, require, sgd, undefended
from simulations.central.setting import Outcome, Setting
from tasks.models import as_input


@dataclass(frozen=True)
class NoneDefense(Baseline):
    """Train, look, reset, drop and train on; Wang et al., NeurIPS 2022, Algorithm 1.

    Attributes
    ----------
    detector : str
        A name in `none_core.detection.DETECTORS`.
    reset : str
        "zero" or "init".
    certain : float
        How far a label's groups of samples stand apart where no detector need name it, > 0.
    rounds : int
        Looks at most, >= 0.
    retrain_epochs : int
        Passes after each that found something, >= 1.
    retrain_rate : float
        The learning rate of the first of them in units of the schedule's, > 0.
    recover_epochs : int
        Passes in the end, >= 0.
    recover_rate : float
        The learning rate of the first of these, likewise.
    unlearn : float
        Weight of what was dropped in these, >= 0.
    anew : bool
        Whether the model is begun again if the backdoor outlives all that.
    """

    detector: str = "mixture"
    reset: str = "zero"
    certain: float = 10.0
    rounds: int = 3
    retrain_epochs: int = 8
    retrain_rate: float = 0.05
    recover_epochs: int = 4
    recover_rate: float = 0.2
    unlearn: float = 1.0
    anew: bool = True

    def validate(self) -> None:
        """Check the fields."""
        names = sorted(DETECTORS)
        require(self.detector in DETECTORS, "detector", self.detector, f"one of {names}")
        require(self.reset in HOWS, "reset", self.reset, f"one of {HOWS}")
        require(self.certain > 0, "certain", self.certain, "> 0")
        require(self.rounds >= 0, "rounds", self.rounds, ">= 0")
        require(self.retrain_epochs >= 1, "retrain_epochs", self.retrain_epochs, ">= 1")
        require(self.retrain_rate > 0, "retrain_rate", self.retrain_rate, "> 0")
        require(self.recover_epochs >= 0, "recover_epochs", self.recover_epochs, ">= 0")
        require(self.recover_rate > 0, "recover_rate", self.recover_rate, "> 0")
        require(0 <= self.unlearn < math.inf, "unlearn", self.unlearn, ">= 0 and finite")

    def train(self, setting: Setting) -> Outcome:
        """Train as an undefended run does, cleanse, and train on."""
        model, schedule = undefended(setting), setting.schedule
        prepare = partial(as_input, model)
        cleanser = Cleanser(
            model,
            prepare(setting.images[:2]),
            detector=self.detector,
            reset=self.reset,  # type: ignore[arg-type]
            certain=self.certain,
            prepare=prepare,
            seed=setting.seed,
        )
        trained = NoneTrainer(
            model,
            TensorDataset(setting.images, setting.labels),
            cleanser,
            lambda parameters: sgd(parameters, schedule),
            epochs=0,
            retrain_epochs=self.retrain_epochs,
            retrain_rate=self.retrain_rate,
            recover_epochs=self.recover_epochs,
            recover_rate=self.recover_rate,
            unlearn=self.unlearn,
            anew_epochs=schedule.epochs if self.anew else 0,
            untrained=setting.model_fn().state_dict(),
            rounds=self.rounds,
            batch_size=schedule.batch_size,
            seed=setting.seed,
        ).fit()
        looks = [
            {
                "reason": each.reason,
                "reset": len(each.neurons),
                "dropped": len(each.dropped),
                "strengths": {str(k): round(s, 3) for k, s in each.strengths.items()},
            }
            for each in trained.cleansings
        ]
        looks[-1:] = [
            {**each, "recovered": trained.recovered, "anew": trained.anew} for each in looks[-1:]
        ]
        return Outcome(model, trained.dropped, looks)


METHODS: dict[str, Baseline] = {
    **baselines.METHODS,
    "none": NoneDefense(),
}
