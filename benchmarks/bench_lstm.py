"""The workloads under pytest-benchmark: `pytest benchmarks`, grouped by workload, one entry per column.

The list is --quick's; -k selects, e.g. `pytest benchmarks -k packed`. `python -m benchmarks` is the fairer clock
(columns in turns, ratios by round); this is for --benchmark-compare and its kin.
"""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks.machine import find_device
from benchmarks.measure import build, check, make_step, route, worst
from benchmarks.peers import OURS, PEERS
from benchmarks.suites import SUITES, quick_workloads
from benchmarks.workloads import Workload

DEVICE = find_device()
COLUMNS = {name: PEERS[name] for name in SUITES["default"].peers}


@functools.lru_cache(maxsize=1)
def prepare(workload: Workload):
    """Build and check a workload once for its columns, which follow one another."""
    x = workload.make_input(DEVICE)
    modules = build(workload, DEVICE, COLUMNS)
    return x, modules, check(workload, modules, x)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("workload", quick_workloads(DEVICE.type), ids=lambda workload: workload.name)
def test_speed(benchmark, workload: Workload, column: str):
    x, modules, checked = prepare(workload)
    status, errors = checked[column]
    assert status.startswith(("ok", "rough")), f"refused to time {column}: {status}"
    step = make_step(modules[column], x, workload)

    def run() -> None:
        step()
        if DEVICE.type != "cpu":
            torch.cuda.synchronize(DEVICE)

    benchmark.group = workload.name
    benchmark.extra_info |= {"error": worst(errors), "threads": torch.get_num_threads()}
    if column == OURS:
        benchmark.extra_info["route"] = route(modules[column], x, workload.training)
    benchmark(run)
