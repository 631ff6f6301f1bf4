"""Draw a result file: one bar per workload and mode, from stock's speed to fastlstm's.

`python -m benchmarks.plot` draws the committed result files again, and the README's table with them;
`python -m benchmarks.plot FILE...` draws others.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.peers import EAGER, OURS
from benchmarks.readme import README, fill_readme, label
from benchmarks.results import Result, Spread, committed, load, provenance, verdict

FASTER, EVEN, SLOWER, INK, FAINT = "#2a7f62", "#9aa5a0", "#c8553d", "#22302b", "#e3e8e6"
QUIET = "#5b6863"
COLORS = {"faster": FASTER, "even": EVEN, "slower": SLOWER}
TITLES = {False: "forward, no_grad", True: "forward and backward"}
TICKS = (0.02, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
EAGER_MARKER = {"marker": "D", "markersize": 3.5, "color": "white", "markeredgecolor": QUIET, "linestyle": ""}
LINE, HEADER, FOOTER = 0.25, 1.0, 0.75  # inches


@dataclass(frozen=True)
class Line:
    """A line of the figure: a workload's ratios by mode and column (None: refused), or a heading without any."""

    label: str
    modes: dict[bool, dict[str, Spread | None]]


def lines(result: Result) -> list[Line]:
    """Lay a result out from top to bottom: dense input, packed input, the real job, each under its heading."""
    families: dict[str, dict[str, Line]] = {"dense input": {}, "packed input (variable lengths)": {}, "a real job": {}}
    for row in result["rows"]:
        if row["suite"] != "default":
            continue
        family = families["dense input" if row["kind"].startswith("dense") else "packed input (variable lengths)"]
        line = family.setdefault(label(row), Line(label(row), {}))
        # a time without a ratio, where stock failed, is no refusal
        line.modes[row["training"]] = {
            name: column["ratio"] for name, column in row["columns"].items() if column["ratio"] or not column["ms"]
        }
    for job in result["jobs"]:
        text = f"character model, {job['steps']} steps"
        ratios: dict[str, Spread | None] = {name: column["ratio"] for name, column in job["columns"].items()}
        if job["status"] != "ok":
            ratios[OURS] = None
        families["a real job"][text] = Line(text, {True: ratios})
    return [line for title, found in families.items() if found for line in (Line(title, {}), *found.values())]


def figure(result: Result) -> Figure:
    """Draw the default suite of a result; there is some, i.e. `lines(result)` is not empty."""
    content = lines(result)
    modes = [training for training in (False, True) if any(training in line.modes for line in content)]
    width, height = 3.0 + 3.9 * len(modes), HEADER + FOOTER + LINE * max(4, len(content))
    drawn = Figure(figsize=(width, height))
    axes = drawn.subplots(1, len(modes), sharey=True, sharex=True, squeeze=False)
    for axis, training in zip(axes[0], modes, strict=True):
        _panel(axis, content, training)
    axes[0][0].set_yticks(range(len(content)), [line.label for line in content])
    axes[0][0].set_ylim(len(content) - 0.4, -0.6)
    for tick, line in zip(axes[0][0].get_yticklabels(), content, strict=True):
        tick.set(color=INK, fontsize=8, fontweight="normal" if line.modes else "bold")

    drawn.text(
        0.15 / width,
        1 - 0.24 / height,
        "Speed relative to torch.nn.LSTM",
        fontsize=13,
        weight="bold",
        color=INK,
        va="center",
    )
    drawn.text(0.15 / width, 1 - 0.48 / height, provenance(result), fontsize=8, color=QUIET, va="center")
    drawn.legend(handles=_legend(), loc="lower center", ncols=5, frameon=False, fontsize=8)
    drawn.tight_layout(rect=(0, 0.3 / height, 1, 1 - 0.55 / height), w_pad=1.5)
    return drawn


def draw(result: Result, path: Path) -> Path | None:
    """Write that figure as an image, the suffix of `path` naming the format; None if there is nothing to draw."""
    if not lines(result):
        return None
    figure(result).savefig(path, dpi=130)
    return path


def _panel(axis: Axes, content: list[Line], training: bool) -> None:
    """One mode: bars from 1 to fastlstm's ratio, whiskers from p20 to p80, diamonds for the eager loop."""
    axis.set_xscale("log")
    axis.set_title(TITLES[training], fontsize=9, color=INK, loc="left")
    axis.axvline(1, color=INK, linewidth=0.9, zorder=3)
    for y, line in enumerate(content):
        ratios = line.modes.get(training)
        if ratios is None:
            continue
        axis.axhline(y, color=FAINT, linewidth=0.6, zorder=0)
        eager, ours = ratios.get(EAGER), ratios.get(OURS)
        if eager:
            axis.plot(eager["median"], y, zorder=4, **EAGER_MARKER)
        if OURS not in ratios:
            continue
        color = COLORS[verdict(ours)] if ours else SLOWER
        # the figures stand in a column at the right edge, where no bar or marker reaches
        axis.text(
            0.995,
            y,
            f"{ours['median']:.2f}" if ours else "refused",
            transform=axis.get_yaxis_transform(),
            va="center",
            ha="right",
            fontsize=8,
            color=INK if color == EVEN else color,
        )
        if ours:
            axis.barh(y, ours["median"] - 1, left=1, height=0.62, color=color, zorder=2)
            axis.plot([ours["p20"], ours["p80"]], [y, y], color=INK, linewidth=0.9, zorder=5)

    shown = [ratio for line in content for ratios in line.modes.values() for ratio in ratios.values() if ratio]
    low = min([ratio["p20"] for ratio in shown], default=1.0)
    high = max([ratio["p80"] for ratio in shown], default=1.0)
    axis.set_xlim(min(low / 1.6, 0.5), max(high * 2.6, 2))
    axis.axvspan(axis.get_xlim()[0], 1, color=SLOWER, alpha=0.05, zorder=0, linewidth=0)
    axis.xaxis.set_major_locator(FixedLocator(TICKS))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.tick_params(axis="both", length=0, labelsize=8, labelcolor=INK)
    axis.set_xlabel("slower   |   faster than stock (log scale)", fontsize=8, color=QUIET)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color(FAINT)


def _legend() -> list[Patch | Line2D]:
    return [
        Patch(color=FASTER, label="fastlstm, faster"),
        Patch(color=EVEN, label="as fast (within 3 % or the spread)"),
        Patch(color=SLOWER, label="slower"),
        Line2D([], [], color=INK, linewidth=0.9, label="p20 to p80"),
        Line2D([], [], label="eager loop", **EAGER_MARKER),
    ]


def main() -> None:
    """Draw result files as PNG images beside them."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="result files; the committed ones if none")
    named = parser.parse_args().files
    files = named or committed()
    if not files:
        print("no result file is committed: python -m benchmarks --json benchmarks/results/NAME.json makes one")
    for file in files:
        print(draw(load(file), file.with_suffix(".png")) or f"{file} holds nothing of the default suite")
    if not named:
        README.write_text(fill_readme(README.read_text()))
        print(README)


if __name__ == "__main__":
    main()
