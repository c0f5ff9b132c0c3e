"""What the command lines of simulations and deployments share."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

FAILED, CONFIGURATION, INTERRUPTED = 1, 2, 130


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add what it takes to run one experiment."""
    parser.add_argument("file", type=Path, metavar="FILE.toml")
    parser.add_argument(
        *("--set", "-s"),
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override a value of the file, written as in TOML; may be repeated",
    )
    parser.add_argument("--out", type=Path, help="output folder (default: results/NAME)")
    parser.add_argument("--data-root", type=Path, help="folder that holds the data sets")
    parser.add_argument("--quiet", "-q", action="store_true", help="show no progress")


def overrides(arguments: argparse.Namespace) -> list[str]:
    """Return all overrides of the file as TOML; those with options of their own come last."""
    own = {"output": arguments.out, "data_root": arguments.data_root}
    return arguments.set + [
        f"run.{key}={json.dumps(str(value), ensure_ascii=False)}"
        for key, value in own.items()
        if value is not None
    ]


def fail(message: str, status: int) -> int:
    """Print an error and return its exit status."""
    print(f"error: {message}", file=sys.stderr)
    return status


def stdout() -> Console:
    """Return a console that does not squeeze its tables into 80 columns of a file or pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def list_files(console: Console, files: Sequence[Path]) -> None:
    """Print where things were written."""
    for file in files:
        console.print(str(file), style="dim", soft_wrap=True, highlight=False)
