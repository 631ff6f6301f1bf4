"""What the examples share: arguments, a split, training with a progress bar, the comparison with stock, the verdict."""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

import fastlstm

M = TypeVar("M", bound=nn.Module)
Item = TypeVar("Item")


def arguments(doc: str | None, *, validate: bool = False) -> argparse.Namespace:
    """Parse --smoke, --seed and --out, and seed torch and random; `doc` is the example's docstring.

    With `validate` there is --validate too, for examples that can be judged on a part of their training data.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few seconds: does it run?")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "output", help="where the plot goes")
    if validate:
        text = "judge on a part of the training data, to choose settings without a look at the test"
        parser.add_argument("--validate", action="store_true", help=text)
    options = parser.parse_args()
    random.seed(options.seed)
    torch.manual_seed(options.seed)
    return options


def split(items: Collection[Item], share: float, *, validate: bool = False) -> tuple[list[Item], list[Item]]:
    """Return (seen, held out), drawn at random; to validate, both come from what would be seen otherwise."""
    shuffled = random.sample(list(items), len(items))
    cut = round(share * len(shuffled))
    seen, held_out = shuffled[cut:], shuffled[:cut]
    return split(seen, share) if validate else (seen, held_out)


def fit(model: nn.Module, loss: Callable[[], Tensor], steps: int, learning_rate: float) -> list[float]:
    """Train with Adam, a one-cycle schedule and clipped gradients; `loss()` draws a batch and returns its loss.

    Shows the progress and returns the loss of each step.
    """
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.2)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    begin, losses = time.perf_counter(), []
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("training", total=steps)
        for _ in range(steps):
            optimizer.zero_grad()
            value = loss()
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(value.item())
            recent = statistics.mean(losses[-20:])
            progress.update(task, advance=1, description=f"training, loss {recent:.3f}")
    seconds = time.perf_counter() - begin
    print(f"trained {steps} steps in {seconds:.0f} s, loss {losses[0]:.3f} to {statistics.mean(losses[-20:]):.3f}")
    return losses


def explain_and_compare(options: argparse.Namespace, model: M, loss: Callable[[M], Tensor], rounds: int = 15) -> None:
    """Print what fastlstm runs for each LSTM of `model`, and its time beside stock's on this very model.

    `loss(model)` is the model's loss on one batch. What is timed is that and, if it asks for a gradient, its backward:
    stock and ours in turns, for `rounds` rounds or three seconds, or once in smoke mode.
    """
    stock, ours = copy.deepcopy(model), copy.deepcopy(model)
    fastlstm.revert(stock)
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
    rounds = 1 if options.smoke else rounds
    while len(pairs) < rounds and (len(pairs) < 3 or time.perf_counter() - begin < 3):
        pairs.append((_seconds(stock, loss), _seconds(ours, loss)))
    theirs, own = (1e3 * statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    print(
        f"time: {theirs:.3g} ms with torch.nn.LSTM, {own:.3g} ms with fastlstm: {ratio:.2f}x (median of {len(pairs)})"
    )


def _seconds(model: M, loss: Callable[[M], Tensor]) -> float:
    model.zero_grad(set_to_none=True)
    begin = time.perf_counter()
    value = loss(model)
    if value.requires_grad:
        value.backward()
    return time.perf_counter() - begin


def report(metric: str, value: float, baselines: Mapping[str, float], *, better: str = "higher") -> dict[str, float]:
    """Print the model's value beside the baselines', in one line, and return them; `better` is "higher" or "lower"."""
    scores = {"LSTM": value, **baselines}
    print(f"result: {metric} ({better} is better):", ", ".join(f"{name} {score:.3f}" for name, score in scores.items()))
    return scores
