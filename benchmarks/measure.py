"""Check, then time, the columns of one workload.

Nothing is timed that has not just been compared, on this very input, with stock in float64. Columns are timed in
turns inside one loop, so that a busy neighbour or a falling clock hits all alike, and a ratio is the median over
rounds of (stock's time / the column's time) of the same round.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import chain, repeat

import torch
from torch import Tensor, nn
from torch.nn import RNNBase
from torch.nn.utils.rnn import PackedSequence

import fastlstm
from benchmarks.peers import OURS, STOCK, STOCK_LSTM, Peer
from benchmarks.results import Column, Row, outcome, rounded, untimed
from benchmarks.suites import SUITES
from benchmarks.timing import Step, interleave, spread
from benchmarks.workloads import DTYPES, Workload
from tests.helpers import TOLERANCES, relative_error, run_lstm

# a column that is not ours may be this many times over the allowance: it is timed and marked, so that 16-bit sums
# of others stand beside ours; more is a wrong result
ROUGH = 10.0

Input = Tensor | PackedSequence


def run_workload(
    workload: Workload,
    device: torch.device,
    *,
    budget_s: float,
    min_rounds: int = 5,
    suite: str = "default",
    peers: Mapping[str, Peer],
) -> Row:
    """Build, check and time every column of a workload; its memory is measured by `memory.py`, elsewhere.

    Args:
        workload: what to run.
        device: where.
        budget_s: seconds to spend on timing; checks and warm-up come on top.
        min_rounds: rounds to time even when that exceeds the budget.
        suite: the suite it is run for; its `measure` says how.
        peers: the columns, stock first.
    """
    x = workload.make_input(device)
    limits = {name: peer.limits(workload) for name, peer in peers.items()}
    able = {name: peer for name, peer in peers.items() if not limits[name]}
    modules = build(workload, device, able)
    complete = {name: module for name, module in modules.items() if able[name].complete}
    checked = check(workload, complete, x)

    found: dict[str, Column] = {}
    for name in peers:
        status, errors = checked.get(name, (f"not supported: {limits[name]}" if limits[name] else "ok", {}))
        found[name] = untimed(status, worst(errors), errors)
    ours = found.get(OURS)
    one_call = x[:1] if workload.streaming and isinstance(x, Tensor) else x
    row: Row = {
        "name": workload.name,
        "suite": suite,
        "shape": {size: getattr(workload.shape, size) for size in "TBIH"},
        "kind": workload.kind,
        "dtype": workload.dtype,
        "training": workload.training,
        "budget_s": budget_s,
        "flops": workload.flops,
        "weight_bytes": sum(w.numel() * w.element_size() for w in modules[STOCK].parameters()),
        # where the call fails, e.g. by a FASTLSTM_BACKEND that cannot run here, so does the question
        "route": "" if ours is None or outcome(ours) == "failed" else route(modules[OURS], one_call, workload.training),
        "columns": found,
    }
    measure = SUITES[suite].measure
    if measure == "accuracy":
        return row
    steps = {name: make_step(modules[name], x, workload) for name in modules if outcome(found[name]) in ("ok", "rough")}
    samples, calls = interleave(steps, device, budget_s, min_rounds, single=measure == "latency")
    for name, times in samples.items():
        column = found[name]
        column["rounds"], column["calls"] = len(times), calls[name]
        column["ms"] = spread(times)
        if STOCK in samples:
            column["ratio"] = spread([theirs / own for theirs, own in zip(samples[STOCK], times, strict=True)])
        column["samples"] = [rounded(value) for value in times]
    return row


def worst(errors: Mapping[str, float | None]) -> float | None:
    """The largest error; None if there is none, or one that is not finite."""
    finite = [error for error in errors.values() if error is not None]
    return max(finite) if finite and len(finite) == len(errors) else None


def build(workload: Workload, device: torch.device, peers: Mapping[str, Peer]) -> dict[str, RNNBase]:
    """Make one module per column, all with the same weights."""
    torch.manual_seed(0)
    dtype = DTYPES[workload.dtype]
    weights = STOCK_LSTM(**workload.arguments, dtype=dtype).state_dict()
    modules = {}
    for name, peer in peers.items():
        modules[name] = peer.make(**workload.arguments, device=device, dtype=dtype)
        modules[name].load_state_dict(weights)
    return modules


class Streaming(nn.Module):
    """Runs a module one step a call, carrying its state, over a whole sequence."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return what one call on all of x would."""
        outputs, state = [], None
        for step in x.split(1):
            output, state = self.module(step, state)
            outputs.append(output)
        assert state is not None
        return torch.cat(outputs), state


def check(
    workload: Workload, modules: Mapping[str, RNNBase], x: Input
) -> dict[str, tuple[str, dict[str, float | None]]]:
    """Compare every module with stock in float64: name -> (status, relative error of each tensor).

    The status is "ok"; "rough: ...", of a column that is not ours, up to ROUGH times over the allowance; or what is
    wrong. Output and final states are compared, for a training workload the gradients of input and weights too, by the
    tests' own table of tolerances, in which stock's own error counts; where stock failed,
    only the table's constant is allowed.
    """
    run = run_lstm if workload.training else run_forward
    first = next(iter(modules.values()))
    oracle = STOCK_LSTM(**workload.arguments, device=x.data.device, dtype=torch.float64)
    oracle.load_state_dict(first.state_dict())
    truth = run(oracle, x._replace(data=x.data.double()) if isinstance(x, PackedSequence) else x.double())
    dtype = DTYPES[workload.dtype]
    allowed = dict.fromkeys(truth, allowance(dtype))

    found: dict[str, tuple[str, dict[str, float | None]]] = {}
    for name, module in modules.items():
        try:
            actual = run(Streaming(module) if workload.streaming else module, x)
            for key, expected in truth.items():
                if actual[key].shape != expected.shape:
                    raise ValueError(f"{key}: shape {tuple(actual[key].shape)}, expected {tuple(expected.shape)}")
        # whatever a third party raises is a finding, not the end of the run
        except Exception as problem:
            found[name] = (f"failed: {type(problem).__name__}: {' '.join(str(problem).split())[:300]}", {})
            continue
        errors = {key: relative_error(actual[key], expected) for key, expected in truth.items()}
        if name == STOCK:
            allowed = {key: allowance(dtype, error) for key, error in errors.items()}
        # a NaN is over, too
        over = [key for key, error in errors.items() if not error <= allowed[key]]
        rough = not name.startswith(OURS) and all(errors[key] <= ROUGH * allowed[key] for key in over)
        problems = ", ".join(f"{key}: error {errors[key]:.3e} exceeds {allowed[key]:.3e}" for key in over)
        status = f"{'rough' if rough else 'wrong result'}: {dtype}: {problems}" if over else "ok"
        found[name] = (status, {key: rounded(error) if math.isfinite(error) else None for key, error in errors.items()})
    return found


def allowance(dtype: torch.dtype, stock: float = 0.0) -> float:
    """The relative error that the tests' table of tolerances allows, where stock's own is `stock`."""
    return TOLERANCES[dtype].atol + TOLERANCES[dtype].factor * stock


def run_forward(module: nn.Module, x: Input) -> dict[str, Tensor]:
    """Return output and final states by name, under no_grad as forward workloads are timed."""
    with torch.no_grad():
        output, (h_n, c_n) = module(x)
    return {"output": output.data, "h_n": h_n, "c_n": c_n}


def make_step(module: RNNBase, x: Input, workload: Workload) -> Step:
    """Return a call of no arguments that runs the module once and keeps nothing of it but a stream's state."""
    if workload.streaming:
        assert isinstance(x, Tensor)
        state, steps = None, chain.from_iterable(repeat(x.split(1)))

        def advance() -> None:
            nonlocal state
            with torch.no_grad():
                _, state = module(next(steps), state)

        return advance
    if not workload.training:

        def forward() -> None:
            with torch.no_grad():
                module(x)

        return forward

    # the input asks for its gradient, as it does in any layer but the first
    data = x.data.detach().clone().requires_grad_()
    inputs = x._replace(data=data) if isinstance(x, PackedSequence) else data
    wanted = [data, *(parameter for parameter in module.parameters() if parameter.requires_grad)]
    with torch.no_grad():
        like = module(x)[0].data
    cotangent = torch.randn(like.shape, generator=torch.Generator().manual_seed(1)).to(like)

    def forward_backward() -> None:
        output, _ = module(inputs)
        if isinstance(output, PackedSequence):
            output = output.data
        torch.autograd.grad(output, wanted, cotangent)

    return forward_backward


def route(module: RNNBase, x: Input, training: bool) -> str:
    """Say which code fastlstm runs here, backend and regime; "" for a module that is not ours."""
    if not isinstance(module, fastlstm.LSTM):
        return ""
    with torch.set_grad_enabled(training):
        decision = fastlstm.explain(module, x)
    return f"{decision.backend} {decision.regime}"
