"""Messages need an identity, and rounds are silent and repeatable, as in the Flower tests."""

from tests.none_core.flower.conftest import in_a_task, quiet_and_deterministic

__all__ = ["in_a_task", "quiet_and_deterministic"]
