"""NONE for Flower: a strategy for the server and a handler for the clients."""

from none_core.flower.client import NoneClient
from none_core.flower.defence import Defence
from none_core.flower.rounds import RoundRecord
from none_core.flower.strategy import NoneMixin, NoneStrategy

__all__ = ["Defence", "NoneClient", "NoneMixin", "NoneStrategy", "RoundRecord"]
