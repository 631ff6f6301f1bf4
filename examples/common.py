"""What the examples share: arguments, a progress bar, the comparison with stock, the verdict and one style of plot."""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import torch
from cycler import cycler
from matplotlib.axes import Axes
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

import fastlstm

M = TypeVar("M", bound=nn.Module)
LSTM_COLOR, BASELINE_COLOR, ACCENT_COLOR, INK = "#2a7f62", "#9aa5a0", "#c8553d", "#22302b"
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


def arguments(doc: str | None) -> argparse.Namespace:
    """Parse --smoke, --seed and --out, and seed torch and random; `doc` is the example's docstring."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few seconds: does it run?")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "output", help="where the plot goes")
    options = parser.parse_args()
    random.seed(options.seed)
    torch.manual_seed(options.seed)
    return options


def train(step: Callable[[int], Tensor], steps: int) -> list[float]:
    """Call `step(number)`, which makes one optimizer step and returns its loss, `steps` times; return the losses."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    begin, losses = time.perf_counter(), []
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("training", total=steps)
        for number in range(steps):
            losses.append(step(number).item())
            recent = statistics.mean(losses[-20:])
            progress.update(task, advance=1, description=f"training, loss {recent:.3f}")
    seconds = time.perf_counter() - begin
    print(f"trained {steps} steps in {seconds:.0f} s, loss {losses[0]:.3f} to {statistics.mean(losses[-20:]):.3f}")
    return losses


def fit(model: nn.Module, loss: Callable[[], Tensor], steps: int, learning_rate: float) -> list[float]:
    """Train with Adam, a one-cycle schedule and clipped gradients; `loss()` draws a batch and returns its loss."""
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.2)

    def step(_: int) -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        return value

    return train(step, steps)


def explain_and_compare(model: M, loss: Callable[[M], Tensor], rounds: int = 15) -> None:
    """Print what fastlstm runs for each LSTM of `model`, and its time beside stock's on this very model.

    `loss(model)` is the model's loss on one batch. What is timed is that and, if it asks for a gradient, its backward:
    stock and ours in turns, for `rounds` rounds or three seconds.
    """
    stock, ours = _with_stock_lstms(model), copy.deepcopy(model)
    fastlstm.convert(ours)
    decisions: dict[str, str] = {}

    def explain(name: str, lstm: fastlstm.LSTM, inputs: tuple, keywords: dict) -> None:
        decisions[name] = f"explain({name}): {fastlstm.explain(lstm, *inputs, **keywords)}"

    lstms = [(name, module) for name, module in ours.named_modules() if isinstance(module, fastlstm.LSTM)]
    hooks = [lstm.register_forward_pre_hook(partial(explain, name), with_kwargs=True) for name, lstm in lstms]
    for each in (stock, ours):  # warm up, and explain
        _seconds(each, loss)
    for hook in hooks:
        hook.remove()
    print(*decisions.values(), sep="\n")

    pairs, begin = [], time.perf_counter()
    while len(pairs) < rounds and (len(pairs) < 3 or time.perf_counter() - begin < 3):
        pairs.append((_seconds(stock, loss), _seconds(ours, loss)))
    theirs, own = (1e3 * statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    print(
        f"time: {theirs:.3g} ms with torch.nn.LSTM, {own:.3g} ms with fastlstm: {ratio:.2f}x (median of {len(pairs)})"
    )


def _with_stock_lstms(model: M) -> M:
    """Return a copy whose fastlstm.LSTMs are torch.nn.LSTMs with the same weights: `fastlstm.convert` backwards."""
    stock = copy.deepcopy(model)
    for name, lstm in [(name, lstm) for name, lstm in stock.named_modules() if isinstance(lstm, fastlstm.LSTM)]:
        sizes = (lstm.input_size, lstm.hidden_size, lstm.num_layers, lstm.bias, lstm.batch_first, lstm.dropout)
        twin = nn.LSTM(*sizes, lstm.bidirectional, lstm.proj_size).train(lstm.training)
        twin.load_state_dict(lstm.state_dict())
        stock.set_submodule(name, twin)
    return stock


def _seconds(model: M, loss: Callable[[M], Tensor]) -> float:
    model.zero_grad(set_to_none=True)
    begin = time.perf_counter()
    value = loss(model)
    if value.requires_grad:
        value.backward()
    return time.perf_counter() - begin


def report(metric: str, value: float, baselines: Mapping[str, float], *, better: str = "higher") -> None:
    """Print the model's value beside the baselines', in one line; `better` is "higher" or "lower"."""
    others = ", ".join(f"{name} {other:.3f}" for name, other in baselines.items())
    print(f"result: {metric} ({better} is better): LSTM {value:.3f}, {others}")


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
