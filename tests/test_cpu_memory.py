"""What is not left to stock's op on a CPU takes no more memory than that does."""

from __future__ import annotations

import itertools

import pytest
import torch

from benchmarks import workloads
from benchmarks.memory import Meter, way
from benchmarks.peers import OURS, STOCK
from benchmarks.results import RESIDENT
from benchmarks.workloads import Shape, Workload
from fastlstm import cpu_rules, dispatch
from fastlstm.problem import Problem, device_of

CPU = torch.device("cpu")
pytestmark = [
    pytest.mark.skipif(not cpu_rules.onednn_has(torch.float32), reason="needs oneDNN"),
    pytest.mark.skipif(way(CPU) != RESIDENT, reason="needs Linux's /proc and glibc"),
]
# of ours to stock's
BOUNDS = {("fp32", True): 1.0, ("fp32", False): 0.9, ("bf16", True): 1.1, ("bf16", False): 1.1}


@pytest.fixture(scope="module")
def peak():
    """Return a function that measures a workload's peak: stock's, and ours."""
    with Meter(CPU) as meter:
        yield lambda workload: (meter(workload, STOCK), meter(workload, OURS))


@pytest.mark.parametrize(("dtype", "lengths"), [("fp32", "uniform"), ("bf16", "uniform"), ("bf16", "")])
def test_what_is_not_left_to_stock(dtype, lengths, peak):
    widened = cpu_rules.is_widened(workloads.DTYPES[dtype])
    if not lengths and not widened:
        pytest.skip("stock's op runs dense rows in one call a layer here")
    shapes = [((100, 64, 64, 128), 0), ((100, 64, 64, 128), 32)]
    if lengths:
        shapes += [((100, 48, 256, 48), 0), ((50, 80, 128, 256), 0)]
    if widened:
        shapes += [((400, 16, 64, 128), 0)]  # in chunks
    elif dtype == "bf16":
        shapes += [((48, 70, 128, 256), 0)]  # leaves no room for workspaces
    compared = 0
    for (sizes, P), training in itertools.product(shapes, (True, False)):
        runs = 2 if lengths else 0
        problem = Problem(*sizes, P, dtype=workloads.DTYPES[dtype], training=training, runs=runs)
        if dispatch.decide(problem, device_of(CPU)).backend == "torch":
            continue
        compared += 1
        stock, ours = peak(Workload(Shape("s", *sizes), dtype, training, lengths, proj_size=P))
        assert stock
        assert ours
        assert ours <= BOUNDS[dtype, training] * stock, f"{sizes}, {P}, training={training}: {ours}, stock {stock}"
    assert compared > len(shapes) // 2


@pytest.mark.parametrize(
    ("dtype", "sizes", "bound"),
    [("fp32", (8, 12, 200, 300), 1.0), ("fp64", (16, 4, 300, 200), 1.0), ("fp32", (50, 64, 1024, 64), 0.8)],
    ids=["few rows", "few rows of float64", "many rows"],
)
def test_two_directions_by_the_loop(dtype, sizes, bound, peak, monkeypatch):
    """Training makes no copy of both directions' weights, nor of a gradient while it is made."""
    monkeypatch.setenv("FASTLSTM_BACKEND", "reference")
    workload = Workload(Shape("s", *sizes), dtype, True, "uniform", bidirectional=True)
    with Meter(CPU) as meter:  # that of `peak` may have started without the variable
        ours = meter(workload, OURS)
    stock, _ = peak(workload)
    assert stock
    assert ours
    assert ours <= bound * stock, f"{ours}, stock {stock}"


@pytest.mark.skipif(device_of(CPU).target != "amx", reason="needs a CPU with AMX")
def test_dense_with_an_odd_number_of_inputs(peak):
    for sizes in ((128, 64, 129, 64), (128, 64, 513, 128)):
        stock, ours = peak(Workload(Shape("s", *sizes), "bf16", False))
        assert stock
        assert ours
        assert ours <= stock, f"{sizes}: {ours}, stock {stock}"
