"""The figures of a run and of a comparison, as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from simulations import probing
from simulations.config import Experiment
from tasks.data import Data
from tasks.poisoning import Trigger, stamp

FOLDER = "plots"

# Blue against vermilion stays apart for every kind of colour vision.
BA, ASR = "#2f6fb0", "#d1432f"
RECOVERED, INK, FAINT, GRID = "#8a9aa8", "#1f2933", "#7b8794", "#e4e7eb"
EVIDENCE = LinearSegmentedColormap.from_list("evidence", ["#f7f5f3", "#f0b49e", ASR, "#5c1408"])
STYLE = {
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": FAINT,
    "axes.edgecolor": GRID,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "image.interpolation": "nearest",
    "savefig.facecolor": "white",
}
NEURONS_SHOWN = 6


def draw(output: Path, experiment: Experiment, result: Mapping[str, Any]) -> list[Path]:
    """Draw all figures of a run that its files allow.

    Parameters
    ----------
    output : Path
        The run's folder; figures go to ``plots/`` in it.
    experiment : Experiment
        What was run.
    result : mapping
        The content of ``result.json``.

    Returns
    -------
    list of Path
        The files.
    """
    folder = output / FOLDER
    folder.mkdir(exist_ok=True)
    loaded = probing.load_data(experiment)
    with mpl.rc_context(STYLE):
        figures = {"accuracy.png": accuracy(result)}
        if (output / probing.EVIDENCE).exists():
            with np.load(output / probing.EVIDENCE, allow_pickle=False) as arrays:
                figures["evidence.png"] = evidence(arrays, result["truth"]["malicious"])
        probe = probing.probe(output, experiment, loaded, neurons=NEURONS_SHOWN)
        if probe is not None:
            figures["activations.png"] = activations(probe)
        figures["trigger.png"] = triggers(loaded, experiment.trigger, experiment.attack.target)
        if (output / probing.PATTERNS).exists():
            with np.load(output / probing.PATTERNS, allow_pickle=False) as arrays:
                figures["found.png"] = found(arrays, loaded)
        return [_save(figure, folder / name) for name, figure in figures.items()]


def accuracy(result: Mapping[str, Any]) -> Figure:
    """Draw BA, ASR and recovered accuracy over rounds, with the rounds that reset neurons."""
    rounds = result["rounds"]
    figure, axes = _figure(8.2, 4.2)
    numbers = [entry["round"] for entry in rounds]
    resets = [entry["round"] for entry in rounds if entry["neurons_reset"]]
    for number in resets:
        axes.axvline(number, color=FAINT, linewidth=0.8, alpha=0.45, zorder=0)
    lines = [("recovered", RECOVERED, 1.2), ("asr", ASR, 2.2), ("ba", BA, 2.2)]
    for score, colour, width in lines:
        values = [entry[score] for entry in rounds]
        style = (0, (4, 2)) if score == "recovered" else "-"
        axes.plot(numbers, values, color=colour, linewidth=width, linestyle=style, clip_on=False)
    labels = {"ba": "BA", "asr": "ASR", "recovered": "recovered"}
    _label_ends(
        axes,
        numbers[-1],
        [(rounds[-1][score], labels[score], colour) for score, colour, _ in lines],
    )
    _percent(axes)
    _rounds(axes, numbers)
    _title(axes, result["configuration"]["experiment"]["name"], subtitle(result))
    if resets:
        text = f"vertical lines: neurons reset after the round ({len(resets)} of {numbers[-1]})"
        axes.text(0, -0.17, text, transform=axes.transAxes, color=FAINT, fontsize=8.5, va="top")
    return figure


def evidence(arrays: Mapping[str, Any], malicious: Sequence[int]) -> Figure:
    """Draw what speaks against each neuron, client by client, each layer sorted by its score."""
    clients, reset = arrays["clients"].astype(int), arrays["reset"].astype(bool)
    scores, layers = np.nan_to_num(arrays["scores"]), arrays["layer_names"]
    rows = sorted(range(len(clients)), key=lambda i: (clients[i] not in malicious, clients[i]))
    shown = np.clip(np.nan_to_num(arrays["client_evidence"])[rows], 0, None)
    highest = max(float(np.quantile(shown, 0.995)), 1e-9)
    columns = [np.flatnonzero(arrays["layer_of"] == layer) for layer in range(len(layers))]
    tilted = len(layers) > 8
    height = 1.3 + 0.42 * max(len(rows), 2) + (0.8 if tilted else 0)
    widths = [max(np.sqrt(len(each)), 3) for each in columns]
    # Laid out by hand: labels wider than a narrow layer would squeeze everything else.
    figure, grid = _figure(
        10, height, columns=len(layers), layout=None, width_ratios=widths, squeeze=False
    )
    bottom, top = (1.2 if tilted else 0.4) / height, 1 - 0.85 / height
    figure.subplots_adjust(left=0.165, right=0.9, bottom=bottom, top=top, wspace=0.06)
    for axes, layer, neurons in zip(grid.flat, layers, columns, strict=True):
        order = neurons[np.argsort(-scores[neurons], kind="stable")]
        image = axes.imshow(shown[:, order], EVIDENCE, vmin=0, vmax=highest, aspect="auto")
        marked = np.flatnonzero(reset[order])
        axes.plot(marked, np.full(len(marked), -0.72), "|", color=INK, markersize=7, clip_on=False)
        axes.set(xticks=[], yticks=[], xlim=(-0.5, len(order) - 0.5), ylim=(len(rows) - 0.5, -0.5))
        tilt = {"rotation": 40, "ha": "right"} if tilted else {}
        axes.set_xlabel(layer if tilted else f"{layer} ({len(order)})", **tilt)
        axes.spines[:].set_visible(False)
    names = [f"client {c}" + (" (malicious)" if c in malicious else "") for c in clients[rows]]
    grid.flat[0].set_yticks(range(len(rows)), names, color=INK)
    scale = figure.add_axes((0.915, bottom, 0.014, top - bottom))
    bar = figure.colorbar(image, cax=scale)
    bar.outline.set_visible(False)
    bar.set_label("evidence")
    _header(
        figure,
        f"Evidence against neurons, round {int(arrays['round'])}",
        f"{reset.sum()} of {len(reset)} neurons reset (marked above); "
        "columns: a layer's neurons, the most suspect first",
    )
    return figure


def activations(probe: probing.Probe) -> Figure:
    """Draw how the worst neurons' values are distributed without and with the trigger."""
    figure, grid = _figure(9.6, 5.2, rows=2, columns=3)
    for axes, neuron in zip(grid.flat, probe.neurons, strict=False):
        both = np.concatenate([neuron.clean, neuron.stamped])
        bins = np.linspace(both.min(), both.max(), 41)
        for values, colour in ((neuron.clean, BA), (neuron.stamped, ASR)):
            axes.hist(values, bins, color=colour, alpha=0.35, linewidth=0)
            axes.hist(values, bins, color=colour, histtype="step", linewidth=1.3)
        axes.set_title(neuron.name + ("  (reset)" if neuron.reset else ""), fontsize=9.5)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(4))
    for axes in list(grid.flat)[len(probe.neurons) :]:
        axes.set_visible(False)
    _header(
        figure,
        f"The {len(probe.neurons)} neurons {probe.chosen}",
        f"{probe.model}; {len(probe.neurons[0].clean)} test images",
    )
    for x, text, colour in ((0.86, "without trigger", BA), (0.985, "with trigger", ASR)):
        style = {"color": colour, "ha": "right", "fontsize": 9.5, "fontweight": "bold"}
        figure.text(x, _below_title(figure), text, **style)
    figure.supxlabel("value before the activation function (maximum over space)", fontsize=9)
    return figure


def triggers(loaded: Data, trigger: Trigger, target: int) -> Figure:
    """Draw a test image clean, with each part of the trigger, and with the whole of it."""
    first = int((loaded.test_labels != target).nonzero()[0])
    image = loaded.test_images[first]
    parts = [(f"part {p + 1}", trigger.part(p)) for p in range(len(trigger.parts))]
    panels = [("clean", ()), *parts, ("whole trigger", trigger.whole())]
    figure, grid = _figure(1.75 * len(panels), 2.5, columns=len(panels))
    for axes, (name, pixels) in zip(grid.flat, panels, strict=True):
        shown = stamp(image, pixels).permute(1, 2, 0).numpy()
        axes.imshow(shown.squeeze(), cmap="gray", vmin=0, vmax=255)
        axes.set_title(name, fontsize=9.5, color=ASR if name == "whole trigger" else INK)
        axes.set_axis_off()
    label, wanted = loaded.classes[int(loaded.test_labels[first])], loaded.classes[target]
    text = f'a test image of class "{label}", which the attack wants to be taken for "{wanted}"'
    _header(figure, "Trigger", text)
    return figure


def found(patterns: Mapping[str, Any], loaded: Data) -> Figure:
    """Draw the triggers that clients found and show: where (mask), and what is seen there."""
    labels = sorted(int(name) for name in patterns if name != "round")
    figure, grid = _figure(3.6 * len(labels), 2.5, columns=2 * len(labels))
    for n, label in enumerate(labels):
        mask, pattern = patterns[str(label)][0] / 255, patterns[str(label)][1:] / 255
        panels = {"mask": mask, "trigger": (mask * pattern).transpose(1, 2, 0)}
        for axes, (name, image) in zip(grid.flat[2 * n : 2 * n + 2], panels.items(), strict=True):
            axes.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=1)
            axes.set_title(f'{name} for "{loaded.classes[label]}"', fontsize=9.5, color=INK)
            axes.set_axis_off()
    text = f"median over the clients that show theirs, round {int(patterns['round'])}"
    _header(figure, "Triggers that clients found", text)
    return figure


def curves(runs: Sequence[tuple[str, Mapping[str, Any]]]) -> Figure:
    """Draw BA and ASR of several runs side by side; a run has one colour in both."""
    figure, grid = _figure(11, 4.4, columns=2)
    colours = mpl.colormaps["tab10"].colors if len(runs) > len(RUNS) else RUNS
    for axes, score, title in zip(
        grid.flat, ("ba", "asr"), ("Benign accuracy", "Attack success rate"), strict=True
    ):
        ends = []
        for i, (label, result) in enumerate(runs):
            numbers = [entry["round"] for entry in result["rounds"]]
            values = [entry[score] for entry in result["rounds"]]
            colour = colours[i % len(colours)]
            axes.plot(numbers, values, color=colour, linewidth=2, clip_on=False)
            ends.append((values[-1], label, colour))
        longest = [entry["round"] for _, result in runs for entry in result["rounds"]]
        _label_ends(axes, max(longest), ends)
        _percent(axes)
        _rounds(axes, sorted(set(longest)))
        _title(axes, title, "share of test images, after each round")
    return figure


# Okabe and Ito's palette, without yellow, which vanishes on white.
RUNS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#1f2933")


def save_curves(runs: Sequence[tuple[str, Mapping[str, Any]]], path: Path) -> Path:
    """Draw `curves` into a file."""
    with mpl.rc_context(STYLE):
        return _save(curves(runs), path)


def _figure(
    width: float,
    height: float,
    rows: int = 1,
    columns: int = 1,
    layout: Literal["constrained"] | None = "constrained",
    **options: Any,
) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, **options)


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=160)
    return path


def _title(axes: Axes, title: str, subtitle: str) -> None:
    """Head one of several axes."""
    axes.set_title(f"{title}\n", fontsize=12, fontweight="bold")
    axes.annotate(
        subtitle,
        (0, 1),
        (0, 8),
        xycoords="axes fraction",
        textcoords="offset points",
        color=FAINT,
        fontsize=9.5,
    )


def _header(figure: Figure, title: str, subtitle: str) -> None:
    """Head a whole figure."""
    # A layout engine keeps room for a title only where it may place it.
    place = {} if figure.get_layout_engine() else {"y": 1 - 0.08 / figure.get_figheight()}
    figure.suptitle(f"{title}\n", x=0.01, ha="left", fontsize=12, fontweight="bold", **place)
    figure.text(0.01, _below_title(figure), subtitle, color=FAINT, fontsize=9.5)


def _below_title(figure: Figure) -> float:
    """Return the height of the line below a figure's title, as a share of the figure's."""
    return 1 - 0.4 / float(figure.get_figheight())


def subtitle(result: Mapping[str, Any]) -> str:
    """Say in a line what was run."""
    settings = result["configuration"]
    attack, defense = settings["attack"], settings["defense"]["name"]
    who = "no attacker"
    if attack["name"] != "none":
        clients = settings["experiment"]["clients"]
        who = f"{attack['name']}, {attack['malicious']} of {clients} clients malicious"
    return f"{settings['task']['dataset']} · {who} · {defense}"


def _percent(axes: Axes) -> None:
    axes.set_ylim(-0.01, 1.01)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines["left"].set_visible(False)


def _rounds(axes: Axes, numbers: Sequence[int]) -> None:
    axes.set_xlim(numbers[0], max(numbers[-1], numbers[0] + 1))
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_xlabel("round")


def _label_ends(axes: Axes, x: float, ends: Sequence[tuple[float, str, str]]) -> None:
    """Write each line's name and last value beside its end, moved apart where they would touch."""
    ends = sorted(ends)
    for (value, label, colour), y in zip(ends, _apart([end[0] for end in ends]), strict=True):
        axes.annotate(
            f"{label}  {value:.1%}",
            (x, y),
            (8, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            fontweight="bold",
            fontsize=9.5,
            annotation_clip=False,
        )


def _apart(positions: Sequence[float], gap: float = 0.062) -> list[float]:
    """Push ascending positions apart, as little as possible, until none is nearer than `gap`."""
    placed = list(positions)
    for _ in range(100):
        for i in range(len(placed) - 1):
            short = gap - (placed[i + 1] - placed[i])
            if short > 0:
                placed[i] -= short / 2
                placed[i + 1] += short / 2
    return placed
