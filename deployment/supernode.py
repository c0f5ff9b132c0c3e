"""A SuperNode whose ClientApps start in a fraction of the time.

Flower starts a process for every message, and each imports torch again, which takes longer than a
round of training on a small model. Here one process, the nursery, imports the libraries once; for
each message it forks, and the child goes on as ``flwr-clientapp``. What a ClientApp does stays the
same, and so does the isolation of one message from the next. The nursery ends with the SuperNode.

``supernode.py --participant FOLDER [--attack] FLAGS`` takes key and node configuration from the
folder that a participant was handed; the other flags are those of ``flower-supernode``. It is run
as a file: beside the sources, ClientApps would import the working tree, not the bundle.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

BIN = Path(__file__).resolve().parent / "bin"
PROGRAM = "flwr-clientapp"
SUPERNODE = "flower-supernode"
# What the apps need and did not write: the bundle's own modules are imported by each child. Torch's
# optimisers import torch._dynamo when the first is made, which takes most of a ClientApp's time.
LIBRARIES = (
    *("torch", "torch._dynamo", "scipy.optimize", "scipy.special"),
    *("pydantic", "flwr.clientapp", "jenkspy"),
)
CHECK_SECONDS = 1.0
REQUEST_SECONDS = 5.0
REQUEST_BYTES = 1 << 16


def main() -> int:
    """Become a SuperNode, with a nursery beside it; in the children of that, a ClientApp."""
    flags = _flags(sys.argv[1:])
    socket_file = Path(tempfile.mkdtemp(prefix="nursery-")) / "socket"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(socket_file))
    listener.listen()
    supernode = os.getpid()
    waiting, ready = os.pipe()
    if os.fork():
        listener.close()
        os.close(ready)
        os.read(waiting, 1)  # a message before that would have a process of its own beside it
        os.close(waiting)
        path = os.pathsep.join([str(BIN), os.environ.get("PATH", "")])
        environment = {**os.environ, "NURSERY": str(socket_file), "PATH": path}
        os.execvpe(SUPERNODE, [SUPERNODE, *flags], environment)  # nosec B606
    os.close(waiting)
    program = _import()
    os.write(ready, b"1")
    os.close(ready)
    gc.freeze()  # or each child would copy what was imported, when its collector writes to it
    if not _tend(listener, supernode):
        socket_file.unlink(missing_ok=True)
        socket_file.parent.rmdir()
        return 0
    _end(program)


def _end(program: Callable[[], int | None]) -> NoReturn:
    """Run a ClientApp to its end, and spare it the interpreter's.

    That would count down the references to all that was imported, and so copy it.
    """
    try:
        status: object = program()
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))


def _flags(arguments: list[str]) -> list[str]:
    """Return the flags of ``flower-supernode``."""
    parser = argparse.ArgumentParser(prog="supernode.py", allow_abbrev=False)
    parser.add_argument("--participant", type=Path, required=True, help="the folder it was handed")
    parser.add_argument("--attack", action="store_true", help="as its attack-config says")
    known, passed_on = parser.parse_known_args(arguments)
    config = known.participant / ("attack-config" if known.attack else "node-config")
    key = f"--auth-supernode-private-key={known.participant / 'key'}"
    return [*passed_on, key, f"--node-config={config.read_text().strip()}"]


def _import() -> Callable[[], int | None]:
    """Import what every ClientApp needs, and return Flower's program."""
    for name in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    (program,) = metadata.entry_points(group="console_scripts", name=PROGRAM)
    loaded: Callable[[], int | None] = program.load()
    return loaded


def _tend(listener: socket.socket, supernode: int) -> bool:
    """Start a child for each request until the SuperNode is gone; True in a child."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    listener.settimeout(CHECK_SECONDS)
    while os.getppid() == supernode:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        with connection:
            connection.settimeout(REQUEST_SECONDS)
            try:
                request = _read(connection)
                connection.sendall(
                    b"1"
                )  # fails if who asked has given up waiting, and helped itself
            except (OSError, ValueError):
                continue
            if os.fork() == 0:
                listener.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                os.chdir(request["folder"])
                sys.argv = [PROGRAM, *request["arguments"]]
                _reseed()
                return True
    return False


def _read(connection: socket.socket) -> dict[str, Any]:
    received = bytearray()
    while piece := connection.recv(REQUEST_BYTES):
        received += piece
        if len(received) > REQUEST_BYTES:
            raise ValueError("the request is too long")
    return dict(json.loads(received))


def _reseed() -> None:
    """Give the child random numbers of its own, where the library does not see to it itself."""
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()


if __name__ == "__main__":
    sys.exit(main())
