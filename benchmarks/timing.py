"""How long a call takes, on a CPU or a GPU."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from benchmarks.results import Spread, percentile

Step = Callable[[], object]

SAMPLE_S = 5e-3  # a short call is repeated until a sample lasts about this long
MAX_CALLS = 200
MAX_ROUNDS = 60  # all samples are stored, for `python -m benchmarks compare`
MAX_SINGLE_ROUNDS = 500
SLOW_S, SLOW_ROUNDS = 1.0, 3  # calls of more than a second are timed no oftener than that, whatever the budget


def spread(values: Sequence[float]) -> Spread:
    """Median with the 20th and 80th percentiles."""
    return {"median": statistics.median(values), "p20": percentile(values, 20), "p80": percentile(values, 80)}


def sample_seconds(step: Step, device: torch.device, calls: int = 1) -> float:
    """Seconds per call, over `calls` calls; on a GPU between two device events, the device idle at the start."""
    if device.type == "cpu":
        begin = time.perf_counter()
        for _ in range(calls):
            step()
        return (time.perf_counter() - begin) / calls
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    start.record()
    for _ in range(calls):
        step()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3 / calls


def call_seconds(step: Step, device: torch.device, calls: int = 1) -> float:
    """Seconds that one who waits for a single call waits; `calls` must be 1."""
    assert calls == 1
    begin = time.perf_counter()
    step()
    if device.type != "cpu":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def interleave(
    steps: Mapping[str, Step], device: torch.device, budget_s: float, min_rounds: int, single: bool = False
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Time the steps in turns.

    Args:
        steps: name -> what to call.
        device: where it runs.
        budget_s: seconds to spend.
        min_rounds: rounds to time even when that exceeds the budget.
        single: time each call by itself, with what its caller waits for; otherwise samples of several short calls.

    Returns:
        name -> milliseconds per call, one entry a round, so that entries of one round stand side by side; and
        name -> calls that one entry averages over.
    """
    clock, max_rounds = (call_seconds, MAX_SINGLE_ROUNDS) if single else (sample_seconds, MAX_ROUNDS)
    calls = {}
    for name, step in steps.items():
        step()  # compiles or prepares
        seconds = sample_seconds(step, device)
        if seconds < SLOW_S:  # that call filled the caches
            seconds = sample_seconds(step, device)
        else:
            min_rounds = min(min_rounds, SLOW_ROUNDS)
        enough = math.ceil(SAMPLE_S / max(seconds, 1e-9))
        calls[name] = 1 if single else min(MAX_CALLS, enough)

    samples: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    rounds = 0
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        deadline = time.perf_counter() + budget_s
        while rounds < min_rounds or (rounds < max_rounds and time.perf_counter() < deadline):
            for name in order:
                samples[name].append(1e3 * clock(steps[name], device, calls[name]))
            order = order[1:] + order[:1]  # no column always runs after the same one
            rounds += 1
    finally:
        if collecting:
            gc.enable()
    return samples, calls
