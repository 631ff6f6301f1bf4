"""One style of plot for the examples: figures that save themselves, and bars of scores."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from cycler import cycler
from matplotlib.axes import Axes
from PIL import Image

LSTM_COLOR, BASELINE_COLOR, ACCENT_COLOR, INK = "#2a7f62", "#9aa5a0", "#c8553d", "#22302b"
GREYS = ("#7d8a85", "#b3bcb8", "#dfe5e2")
STYLE: Any = {
    "axes.edgecolor": "#c5ccc9",
    "axes.labelcolor": INK,
    "axes.prop_cycle": cycler(color=[LSTM_COLOR, ACCENT_COLOR, BASELINE_COLOR, "#3c6e9f", "#d9a441", "#7a5c99"]),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "font.size": 9,
    "legend.frameon": False,
    "savefig.dpi": 100,
    "text.parse_math": False,
}


@contextmanager
def figure(
    options: argparse.Namespace,
    panels: int = 1,
    size: tuple[float, float] = (8, 3),
    ratios: Sequence[float] | None = None,
) -> Iterator[list[Axes]]:
    """Hand out the axes of a figure in the examples' style, and save it as OUT/NAME_OF_THE_EXAMPLE.png."""
    with plt.rc_context(STYLE):
        drawing, axes = plt.subplots(1, panels, figsize=size, width_ratios=ratios, squeeze=False, layout="constrained")
        yield list(axes[0])
        path = options.out / f"{Path(sys.argv[0]).stem}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        drawing.savefig(path)
        with Image.open(path) as picture:  # a palette is a third of the bytes, and few colors are in use
            picture.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
        plt.close(drawing)
    print(f"plot: {path}")


def bars(axes: Axes, groups: Mapping[str, Mapping[str, float]], title: str) -> None:
    """Draw groups of scores by name as bars with their figures: the first, ours, in green, the baselines in grey."""
    names = list(next(iter(groups.values())))
    for place, (name, color) in enumerate(zip(names, (LSTM_COLOR, *GREYS), strict=False)):
        middles = [group + (place - (len(names) - 1) / 2) * 0.9 / len(names) for group in range(len(groups))]
        drawn = axes.bar(
            middles, [scores[name] for scores in groups.values()], 0.9 / len(names), color=color, label=name
        )
        axes.bar_label(drawn, fmt="%.2f", fontsize=7)
    axes.set_xticks(range(len(groups)), list(groups), fontsize=8)
    axes.tick_params("x", length=0)
    axes.set_title(title)
    axes.margins(y=0.35)  # room for the legend
    axes.legend(fontsize=7, loc="upper left", ncols=2)


def page(axes: Axes, text: str, colors: Sequence[str], title: str) -> None:
    """Write text in letters of one width, each in its color; there is room for 18 lines of 66 letters."""
    line = column = 0
    for letter, color in zip(text, colors, strict=True):
        axes.text(column, -line, letter, family="monospace", fontsize=7, color=color, clip_on=True)
        line, column = (line + 1, 0) if letter == "\n" else (line, column + 1)
    axes.set(title=title, xlim=(0, 66), ylim=(-17.5, 1))
    axes.axis("off")
