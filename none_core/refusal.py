"""Refusing what came from outside: who, what and why, in one line."""

from __future__ import annotations

from typing import ClassVar

_MOST_SHOWN = 60  # characters of a text from outside that a message shows


def shown(text: str) -> str:
    """Quote the beginning of a text from outside; all of it could be as long as a message."""
    return repr(text[:_MOST_SHOWN])[:_MOST_SHOWN]


class Refusal(ValueError):  # noqa: N818 (a refusal is normal here, not an error of ours)
    """Something from a client that was not let in.

    Parameters
    ----------
    sender : str
        Who sent it.
    field : str
        Which part of it is at fault.
    reason : str
        Why, as the rest of a sentence that starts with the field.
    """

    what: ClassVar[str] = "reply"

    def __init__(self, sender: str, field: str, reason: str) -> None:
        self.sender, self.field, self.reason = sender, field, reason
        super().__init__(f"{self.what} of {sender} refused: {field} {reason}")
