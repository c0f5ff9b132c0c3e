"""Sets several runs side by side: a table as CSV, curves as PNG, and both on one HTML page."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from simulations import plots, report, results

Run = tuple[str, Mapping[str, Any]]


def read(folders: Sequence[Path]) -> list[Run]:
    """Read the results of runs.

    Returns
    -------
    list of (str, mapping)
        Each run's label, which is its folder's name (with the parent's where names repeat), and
        its result.

    Raises
    ------
    ResultError
        When a folder holds no result.
    """
    names = [folder.resolve().name for folder in folders]
    labels = [
        name if names.count(name) == 1 else f"{folder.resolve().parent.name}/{name}"
        for name, folder in zip(names, folders, strict=True)
    ]
    return [(label, results.load(folder)) for label, folder in zip(labels, folders, strict=True)]


def write(runs: Sequence[Run], out: Path) -> list[Path]:
    """Write ``compare.csv``, ``compare.png`` and ``compare.html`` into a folder.

    Raises
    ------
    OSError
        When the folder cannot be made or written to.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows = [row(label, result) for label, result in runs]
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    image = plots.save_curves(runs, out / "compare.png")
    html = report.render(
        "compare.html",
        title=" and ".join(label for label, _ in runs) if len(runs) < 4 else f"{len(runs)} runs",
        last=results.LAST,
        runs=rows,
        figure=report.inlined(image),
        differences=differences([result["configuration"] for _, result in runs]),
    )
    return [
        results.write_text(out / "compare.csv", table.getvalue()),
        image,
        results.write_text(out / "compare.html", html),
    ]


def row(label: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the table says of a run; scores are fractions."""
    settings = result["configuration"]
    suspected, malicious = results.suspects(result)
    return {
        "run": label,
        "defense": settings["defense"]["name"],
        "attack": settings["attack"]["name"],
        "dataset": settings["task"]["dataset"],
        "partition": settings["task"]["partition"],
        "seed": settings["experiment"]["seed"],
        "rounds": result["rounds"][-1]["round"],
        **result["final"],
        **{f"worst_{score}": value for score, value in result["worst_last5"].items()},
        "neurons_reset": sum(entry["neurons_reset"] for entry in result["rounds"]),
        "suspected": " ".join(map(str, suspected)),
        "left_out": " ".join(map(str, results.left_out(result))),
        "malicious": " ".join(map(str, malicious)),
        "seconds": result["timing"]["seconds"],
    }


def differences(configurations: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the configuration keys whose values are not the same in all runs."""
    flat = [
        {f"{section}.{key}": value for section, keys in each.items() for key, value in keys.items()}
        for each in configurations
    ]
    keys = dict.fromkeys(key for each in flat for key in each)
    columns = {key: [each.get(key) for each in flat] for key in keys}
    return {key: values for key, values in columns.items() if values.count(values[0]) < len(values)}
