"""Check, then time, the columns of one workload.

Nothing is timed that has not just been compared, on this very input, with stock in float64. Columns are timed in
turns inside one loop, so that a busy neighbour or a falling clock hits all alike, and a ratio is the median over
rounds of (stock's time / the column's time) of the same round.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import RNNBase
from torch.nn.utils.rnn import PackedSequence

import fastlstm
from benchmarks.peers import COLUMNS, STOCK_LSTM
from benchmarks.results import Column, Row
from benchmarks.timing import Step, interleave, peak_bytes, spread
from benchmarks.workloads import DTYPES, Workload
from tests.helpers import assert_close, relative_error, run_lstm


def run_workload(
    workload: Workload,
    device: torch.device,
    *,
    budget_s: float,
    min_rounds: int = 5,
    columns: Mapping[str, type[RNNBase]] = COLUMNS,
) -> Row:
    """Build, check and time every column of a workload.

    Args:
        workload: what to run.
        device: where.
        budget_s: seconds to spend on timing; checks and warm-up come on top.
        min_rounds: rounds to time even when that exceeds the budget.
        columns: name -> class; the first is what the others are compared with.
    """
    x = workload.make_input(device)
    modules = build(workload, device, columns)
    checked = check(workload, modules, x)
    passed = [name for name, (status, _) in checked.items() if status == "ok"]
    steps = {name: make_step(modules[name], x, workload.training) for name in passed}
    samples, calls = interleave(steps, device, budget_s, min_rounds)

    baseline = samples.get(next(iter(columns)))
    found: dict[str, Column] = {}
    for name, (status, error) in checked.items():
        times = samples.get(name)
        ratios = [theirs / own for theirs, own in zip(baseline, times, strict=True)] if baseline and times else None
        found[name] = {
            "status": status,
            "error": error,
            "rounds": len(times) if times else 0,
            "calls": calls.get(name, 0),
            "ms": spread(times) if times else None,
            "ratio": spread(ratios) if ratios else None,
            "peak_bytes": peak_bytes(steps[name], device) if times else None,
        }
    return {
        "name": workload.name,
        "shape": {size: getattr(workload.shape, size) for size in "TBIH"},
        "kind": workload.kind,
        "dtype": workload.dtype,
        "training": workload.training,
        "route": "".join(route(module, x, workload.training) for module in modules.values()),
        "columns": found,
    }


def build(workload: Workload, device: torch.device, columns: Mapping[str, type[RNNBase]]) -> dict[str, RNNBase]:
    """Make one module per column, all with the same weights."""
    torch.manual_seed(0)
    dtype = DTYPES[workload.dtype]
    weights = STOCK_LSTM(**workload.arguments, dtype=dtype).state_dict()
    modules = {}
    for name, make in columns.items():
        modules[name] = make(**workload.arguments, device=device, dtype=dtype)
        modules[name].load_state_dict(weights)
    return modules


def check(
    workload: Workload, modules: Mapping[str, RNNBase], x: Tensor | PackedSequence
) -> dict[str, tuple[str, float | None]]:
    """Compare every module with stock in float64: name -> ("ok" or what is wrong, largest relative error).

    Output and final states are compared, for a training workload the gradients of input and weights too, by the
    tests' own table of tolerances. The first module's error sets the allowance.
    """
    run = run_lstm if workload.training else run_forward
    first = next(iter(modules.values()))
    oracle = STOCK_LSTM(**workload.arguments, device=x.data.device, dtype=torch.float64)
    oracle.load_state_dict(first.state_dict())
    truth = run(oracle, x._replace(data=x.data.double()) if isinstance(x, PackedSequence) else x.double())
    allowance = run(first, x)

    found: dict[str, tuple[str, float | None]] = {}
    for name, module in modules.items():
        error = None
        try:
            actual = allowance if module is first else run(module, x)
            worst = max(relative_error(actual[key], expected) for key, expected in truth.items())
            error = worst if math.isfinite(worst) else None
            assert_close(actual, truth, allowance, dtype=DTYPES[workload.dtype])
            found[name] = ("ok", error)
        except AssertionError as problem:
            found[name] = (f"wrong result, {' '.join(str(problem).split())}", error)
        except RuntimeError as problem:
            found[name] = (f"failed, {problem}", error)
    return found


def run_forward(module: nn.Module, x: Tensor | PackedSequence) -> dict[str, Tensor]:
    """Return output and final states by name, under no_grad as forward workloads are timed."""
    with torch.no_grad():
        output, (h_n, c_n) = module(x)
    return {"output": output.data, "h_n": h_n, "c_n": c_n}


def make_step(module: RNNBase, x: Tensor | PackedSequence, training: bool) -> Step:
    """Return a call of no arguments that runs the module once and keeps nothing of it."""
    if not training:

        def forward() -> None:
            with torch.no_grad():
                module(x)

        return forward

    # the input asks for its gradient, as it does in any layer but the first
    data = x.data.detach().clone().requires_grad_()
    inputs = x._replace(data=data) if isinstance(x, PackedSequence) else data
    wanted = [data, *module.parameters()]
    like = run_forward(module, x)["output"]
    cotangent = torch.randn(like.shape, generator=torch.Generator().manual_seed(1)).to(like)

    def forward_backward() -> None:
        output, _ = module(inputs)
        if isinstance(output, PackedSequence):
            output = output.data
        torch.autograd.grad(output, wanted, cotangent)

    return forward_backward


def route(module: nn.Module, x: Tensor | PackedSequence, training: bool) -> str:
    """Say which code fastlstm runs here, backend and regime; "" for a module that is not ours."""
    if not isinstance(module, fastlstm.LSTM):
        return ""
    with torch.set_grad_enabled(training):
        decision = fastlstm.explain(module, x)
    return f"{decision.backend} {decision.regime}"
