"""Self-contained HTML pages: a report on one run, and one that sets several side by side."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from simulations import plots, results, tables

FILE = "report.html"
PHASES = ("train", "query", "decide", "evaluate")

CAPTIONS = {
    "accuracy.png": "Benign accuracy, attack success rate, and the share of stamped images that "
    "are still given their true class.",
    "evidence.png": "What each client's reports show against each neuron in one round.",
    "activations.png": "The same test images without and with the whole trigger. A compromised "
    "neuron tells them apart. Figures only: test images reach no decision.",
    "found.png": "What honest clients found when they looked for the smallest trigger, and showed "
    "because privacy.patterns allows it.",
    "trigger.png": "Each malicious client stamps one part; the attack is measured with all parts.",
}


def write(output: Path, result: Mapping[str, Any]) -> Path:
    """Write the report of a run beside its files.

    Parameters
    ----------
    output : Path
        The run's folder, with its figures in ``plots/``.
    result : mapping
        As `results.load` returns it.
    """
    suspected, malicious = results.suspects(result)
    figures = [
        {"source": inlined(output / plots.FOLDER / name), "caption": caption}
        for name, caption in CAPTIONS.items()
        if (output / plots.FOLDER / name).exists()
    ]
    html = render(
        "report.html",
        title=result["configuration"]["experiment"]["name"],
        subtitle=plots.subtitle(result),
        worst=result["worst_last5"],
        last=results.LAST,
        suspected=suspected,
        malicious=malicious,
        figures=figures,
        seconds=[sum(spent[phase] for phase in PHASES) for spent in result["timing"]["rounds"]],
        **{key: value for key, value in result.items() if key not in ("truth", "worst_last5")},
    )
    return results.write_text(output / FILE, html)


def render(template: str, **values: Any) -> str:
    """Fill in a template of this package; all values are escaped."""
    environment = Environment(
        loader=PackageLoader("simulations"), autoescape=True, undefined=StrictUndefined
    )
    environment.filters["percent"] = _percent
    environment.filters["clients"] = tables.clients
    return environment.get_template(template).render(**values)


def inlined(image: Path) -> str:
    """Return a PNG file as a data URL."""
    return "data:image/png;base64," + base64.b64encode(image.read_bytes()).decode()


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"
