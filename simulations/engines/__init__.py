"""The two ways to run an experiment: in this process, or through a real ``flwr run``."""

from simulations.engines.commands import FlowerError
from simulations.engines.flower import run_flower
from simulations.engines.in_process import InProcessGrid, run_in_process

__all__ = ["FlowerError", "InProcessGrid", "run_flower", "run_in_process"]
