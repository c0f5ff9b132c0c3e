"""Files that are there whole or not at all, also after a crash."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO


def replace(target: Path, write: Callable[[IO[bytes]], object], mode: int = 0o644) -> None:
    """Write a file beside its place and then put it there; what was there stays until then.

    Parameters
    ----------
    target : Path
        In a folder that exists.
    write : callable
        Writes the content into an open binary file.
    mode : int
        The file's permissions, which it has from the first byte on if they are narrower.

    Raises
    ------
    OSError
        If the disk is full, say. Then ``target`` is as it was, and nothing else is left.
    """
    with tempfile.NamedTemporaryFile(
        "wb", dir=target.parent, prefix=f".{target.name}.", delete=False
    ) as file:
        temporary = Path(file.name)
        try:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            temporary.chmod(mode)
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
