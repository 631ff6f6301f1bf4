"""The page's charts, each one SVG: heat-map, time per step, roofline, accuracy, memory."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from benchmarks.peers import OURS, STOCK
from benchmarks.plot import FASTER, INK, QUIET, SLOWER
from benchmarks.probe import BANDWIDTH
from benchmarks.results import SMALLEST_PEAK, Result, Row, verdict
from benchmarks.workloads import DTYPES

# stock, ours, and the others in the order in which a file names them
PALETTE = {STOCK: INK, OURS: FASTER}
OTHERS = ("#3b6fb6", "#b8862b", "#8a5aa8", "#5aa3a8", "#c8553d", "#7a7a52", "#b0679a")
SPLIT = LinearSegmentedColormap.from_list("ratio", [SLOWER, "#f7f5ef", FASTER])
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fastlstm",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "legend.frameon": False,
}
SMALL = (4.3, 3.1)  # inches: one column of a page, the width of a phone


class Chart(NamedTuple):
    """What is shown, and the SVG element."""

    title: str
    svg: str


class Section(NamedTuple):
    """Charts of one kind, under their heading and how to read them."""

    title: str
    note: str
    charts: list[Chart]


def sections(result: Result) -> list[Section]:
    """Draw every chart for which the file holds rows."""
    with mpl.rc_context(STYLE):
        drawn = [Section(title, note, list(make(result))) for make, title, note in SECTIONS]
    return [section for section in drawn if section.charts]


def svg(figure: Figure) -> str:
    """Return a figure's SVG element, without the XML header; text stays text."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def _small(ylabel: str, xlabel: str, size: tuple[float, float] = SMALL) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    return figure, axis


def _colors(result: Result) -> dict[str, str]:
    others = [name for name in result["columns"] if name not in PALETTE]
    return PALETTE | {name: OTHERS[index % len(OTHERS)] for index, name in enumerate(others)}


def _mode(row: Row) -> str:
    return f"{row['dtype']} {'training' if row['training'] else 'forward'}"


def _grouped(rows: list[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _plain_log(axis: Axes, which: str, ticks: list[int] | None = None) -> None:
    """A log axis with numbers instead of powers; at the ticks alone, if there are any."""
    (axis.set_xscale if which == "x" else axis.set_yscale)("log")
    side = axis.xaxis if which == "x" else axis.yaxis
    side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    side.set_minor_formatter(NullFormatter())
    if ticks:
        side.set_ticks(ticks)
        side.set_minor_locator(NullLocator())


def _heat_maps(result: Result) -> Iterator[Chart]:
    """Fastlstm's ratio to stock over H and B, a map for each T, dtype and mode of the sweep."""
    rows = [row for row in result["rows"] if row["suite"] == "sweep" and row["columns"][OURS]["ratio"]]
    heights, widths = (sorted({row["shape"][size] for row in rows}) for size in "HB")
    for (mode, T), group in sorted(_grouped(rows, lambda row: (_mode(row), row["shape"]["T"])).items()):
        figure, axis = _small("H, hidden size", "B, batch size", (SMALL[0], 0.9 + 0.3 * len(heights)))
        grid = [[math.nan] * len(widths) for _ in heights]
        for row in group:
            ratio = row["columns"][OURS]["ratio"]
            assert ratio
            y, x = heights.index(row["shape"]["H"]), widths.index(row["shape"]["B"])
            grid[y][x] = ratio["median"]
            loses = verdict(ratio) == "slower"
            color = "white" if not 0.7 < ratio["median"] < 1.6 else "#8c2410" if loses else INK
            look = {"fontsize": 8, "color": color, "weight": "bold" if loses else "normal"}
            axis.text(x + 0.5, y + 0.5, f"{ratio['median']:.2f}", ha="center", va="center", **look)
        axis.set_facecolor("#ececec")
        # half and twice stock's speed are full color
        axis.pcolormesh(np.ma.masked_invalid(grid), cmap=SPLIT, norm=LogNorm(0.5, 2), edgecolors="white", linewidth=1)
        axis.set_xticks(np.arange(len(widths)) + 0.5, [str(B) for B in widths])
        axis.set_yticks(np.arange(len(heights)) + 0.5, [str(H) for H in heights])
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        yield Chart(f"T={T}, {mode}", svg(figure))


def _times_per_step(result: Result) -> Iterator[Chart]:
    """Microseconds a step against T, for up to eight of the sweep's (H, B) with three T or more."""
    rows = sorted((row for row in result["rows"] if row["suite"] == "sweep"), key=lambda row: row["shape"]["T"])
    groups = _grouped(rows, lambda row: (row["training"], row["shape"]["H"], row["shape"]["B"], _mode(row)))
    colors = _colors(result)
    for training in (False, True):
        keys = sorted(key for key, group in groups.items() if key[0] == training and len(group) >= 3)
        # at most four, spread evenly over the sizes
        for key in [keys[len(keys) * (2 * i + 1) // 8] for i in range(4)] if len(keys) > 4 else keys:
            figure, axis = _small("microseconds a step", "T, steps")
            for name, color in colors.items():
                points = [
                    (row["shape"]["T"], 1e3 * ms["median"] / row["shape"]["T"])
                    for row in groups[key]
                    if (column := row["columns"].get(name)) and (ms := column["ms"])
                ]
                if points:
                    axis.plot(*zip(*points, strict=True), marker="o", markersize=4, color=color, label=name)
            _plain_log(axis, "x", sorted({row["shape"]["T"] for row in groups[key]}))
            axis.set_ylim(0)
            axis.legend()
            yield Chart(f"H={key[1]}, B={key[2]}, {key[3]}", svg(figure))


def _rooflines(result: Result) -> Iterator[Chart]:
    """GFLOP/s against the intensity of a recurrence that reads its weights anew in every step."""
    roofs = result["probe"]
    suites = ("default", "deepbench", "flashrnn", "sweep")
    rows = [row for row in result["rows"] if row["suite"] in suites and row["dtype"] in roofs]
    for mode, group in sorted(_grouped(rows, _mode).items()):
        peak, bandwidth = roofs[group[0]["dtype"]], roofs[BANDWIDTH]
        figure, axis = _small("GFLOP/s", "FLOP per byte of weights, were they read in every step")
        shown = []
        for name, color in ((STOCK, QUIET), (OURS, FASTER)):
            points = [
                (row["flops"] / (row["shape"]["T"] * row["weight_bytes"]), row["flops"] / column["ms"]["median"] / 1e6)
                for row in group
                if (column := row["columns"].get(name)) and column["ms"]
            ]
            if points:
                shown += points
                axis.plot(
                    *zip(*points, strict=True), "o" if name == OURS else "x", markersize=4, color=color, label=name
                )
        if not shown:
            continue
        knee = peak / bandwidth
        low, high = min([knee / 4, *(x / 2 for x, _ in shown)]), max([knee * 4, *(x * 2 for x, _ in shown)])
        axis.plot([low, knee, high], [bandwidth * low, peak, peak], color=INK, linewidth=1)
        axis.text(high, peak * 1.1, f"products {peak:,.0f} GFLOP/s", ha="right", va="bottom", fontsize=8)
        axis.text(low, bandwidth * low / 1.3, f"copy {bandwidth:,.0f} GB/s", ha="left", va="top", fontsize=8)
        _plain_log(axis, "x")
        _plain_log(axis, "y")
        axis.set_ylim(min([bandwidth * low / 3, *(y / 2 for _, y in shown)]), peak * 3)
        axis.legend(loc="lower right")
        yield Chart(mode, svg(figure))


def _accuracy(result: Result) -> Iterator[Chart]:
    """The error of a tensor to float64 against T, a line for each column; one scale for all tensors of a dtype."""
    rows = sorted((row for row in result["rows"] if row["suite"] == "accuracy"), key=lambda row: row["shape"]["T"])
    colors = _colors(result)
    # wide and pale under narrow, for lines that lie on one another are the answer that one hopes for
    looks = {STOCK: {"linewidth": 6, "alpha": 0.25}, OURS: {"linewidth": 2.5}}
    for key, group in _grouped(rows, lambda row: f"{row['dtype']}, {row['kind']}").items():
        epsilon = torch.finfo(DTYPES[group[0]["dtype"]]).eps
        found = [item for row in group for column in row["columns"].values() for item in column["errors"].items()]
        there = {tensor for tensor, error in found if error}
        errors = [error for _, error in found if error]
        for tensor in [name for name in ("output", "dx", "dweight_ih_l0", "dweight_hh_l0") if name in there]:
            figure, axis = _small("relative error to float64", "T, steps")
            for name, color in colors.items():
                errors_by_T = {
                    row["shape"]["T"]: row["columns"][name]["errors"].get(tensor)
                    for row in group
                    if name in row["columns"]
                }
                points = [(T, error) for T, error in errors_by_T.items() if error]
                if points:
                    look = looks.get(name, {"linewidth": 1, "marker": "o", "markersize": 3})
                    axis.plot(*zip(*points, strict=True), color=color, label=name, **look)
            axis.axhline(epsilon, color=QUIET, linewidth=0.8, linestyle=":", zorder=0)
            axis.set_yscale("log")
            axis.set_ylim(min([epsilon, *errors]) / 2, max([epsilon, *errors]) * 5)
            _plain_log(axis, "x", sorted({row["shape"]["T"] for row in group}))
            axis.legend(ncols=2, loc="upper left", fontsize=8)
            yield Chart(f"{tensor}, {key}", svg(figure))


def _memory(result: Result) -> Iterator[Chart]:
    """Fastlstm's peak memory over stock's, against stock's, where that is more than noise."""
    for training in (False, True):
        figure, axis = _small("fastlstm's peak / stock's", f"stock's peak, MiB ({result['settings']['memory']})")
        drawn = False
        for packed, color in ((False, QUIET), (True, FASTER)):
            points = []
            for row in result["rows"]:
                stock, ours = (row["columns"].get(name) for name in (STOCK, OURS))
                wanted = row["training"] == training and row["kind"].startswith("packed") == packed
                if not (wanted and stock and ours and stock["peak_bytes"] and ours["peak_bytes"]):
                    continue
                if stock["peak_bytes"] >= SMALLEST_PEAK:
                    points.append((stock["peak_bytes"] / 2**20, ours["peak_bytes"] / stock["peak_bytes"]))
            if points:
                drawn = True
                label = "packed input" if packed else "dense input"
                axis.plot(*zip(*points, strict=True), "o", markersize=4, color=color, label=label)
        if not drawn:
            continue
        axis.axhline(1, color=INK, linewidth=0.9, zorder=0)
        low, high = axis.get_ylim()
        axis.set_ylim(min(0, low), max(2, high))
        axis.axhspan(1, axis.get_ylim()[1], color=SLOWER, alpha=0.05, linewidth=0)
        _plain_log(axis, "x")
        axis.legend()
        yield Chart("training" if training else "forward", svg(figure))


SECTIONS = (
    (
        _heat_maps,
        "Where is it faster: ratio to stock over H and B",
        "Stock's time / fastlstm's. Green is faster, red is slower than stock by more than its noise; grey was not "
        "measured.",
    ),
    (_times_per_step, "Time of a step as sequences grow", "The median time of a call / T."),
    (
        _rooflines,
        "Roofline: against what this machine can do",
        "The flat roof is a matrix product (float32: without TF32) or, on a CPU, oneDNN's product or LSTM on a large "
        "batch, whichever is fastest; the slanted one a copy; both are measured before the run. The input product's "
        "weights count too, though one product for all steps reads them less often: a point more than (I + H) / H "
        "above the slanted roof is only possible where the recurrent weights stay in registers or caches between "
        "steps; one above the flat roof shows that the clock has risen since.",
    ),
    (
        _accuracy,
        "Accuracy as sequences grow",
        "The largest absolute difference, relative to the largest magnitude in the float64 result or to 1. The dotted "
        "line is the dtype's machine epsilon.",
    ),
    (
        _memory,
        "Memory at the peak of a call",
        "What one call needs at its peak beyond what is held before it, its results and gradients included; above 1, "
        "in the shaded part, fastlstm needs more than stock. None is drawn under half a MiB.",
    ),
)
