"""The benchmark's memory column: on a CPU what the operating system gives, in a process that has run nothing else."""

from __future__ import annotations

import pytest
import torch

from benchmarks.memory import Meter, resident_peak, tensor_peak, way
from benchmarks.peers import INPUT_PRODUCT, OURS
from benchmarks.results import RESIDENT, TENSORS
from benchmarks.workloads import Shape, Workload

CPU = torch.device("cpu")
NEEDS_PROC = pytest.mark.skipif(way(CPU) != RESIDENT, reason="needs Linux's /proc and glibc")


def test_peak_memory_is_what_is_held_at_once():
    MiB = 2**20

    def step():
        first = torch.zeros(MiB, dtype=torch.uint8)
        second = torch.zeros(2 * MiB, dtype=torch.uint8)
        del first
        torch.zeros(3 * MiB, dtype=torch.uint8)
        return second

    assert 5 * MiB <= tensor_peak(step) < 5 * MiB + 4096


@NEEDS_PROC
def test_reserved_memory_is_no_memory_until_it_is_touched():
    MiB = 2**20
    torch.use_deterministic_algorithms(False)  # which fills what is empty

    def step():
        touched = torch.ones(48 * MiB, dtype=torch.uint8)
        return touched, torch.empty(96 * MiB, dtype=torch.uint8)

    torch.ones(96 * MiB, dtype=torch.uint8)  # an earlier peak, which does not count
    assert tensor_peak(step) >= 144 * MiB
    assert 47 * MiB < resident_peak(step) < 52 * MiB


@NEEDS_PROC
def test_memory_is_measured_in_fresh_processes(monkeypatch):
    workload = Workload(Shape("s", 64, 32, 64, 64), training=True)
    with Meter(CPU) as peak:
        first, again = peak(workload, OURS), peak(workload, OURS)
        assert first
        assert again == pytest.approx(first, rel=0.1)
        assert first > 4 * workload.tokens * (64 + 6 * 64)  # the input's gradient and what is saved
        assert peak(Workload(Shape("tiny", 5, 4, 3, 6)), INPUT_PRODUCT) is not None
        assert peak(workload, "nobody") is None  # that process has died; the run goes on
        assert peak(workload, OURS) == pytest.approx(first, rel=0.1)
        assert peak.server
        peak.server.kill()
        assert peak(workload, OURS) is None
        assert peak(workload, OURS) == pytest.approx(first, rel=0.1)
    monkeypatch.setattr("benchmarks.memory.os.access", lambda *_: False)
    assert way(CPU) == TENSORS
    with Meter(CPU) as peak:
        assert peak(workload, OURS)
