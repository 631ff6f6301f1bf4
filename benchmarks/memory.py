"""The most memory that one call needs: on a GPU by torch's allocator, on a CPU by the operating system.

On a CPU each call is made in a process of its own, forked from one that has loaded torch and run nothing, so that it
finds no memory that another has freed. Counting tensors instead, as is done where the system keeps no such record
(macOS, Windows, musl), counts what is reserved and never touched, too.

`python -m benchmarks.memory` is that other process: it answers a pickled (workload, column) with bytes.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import subprocess
import sys

import torch
from torch.autograd.profiler import profile

from benchmarks.machine import ROOT
from benchmarks.measure import build, make_step
from benchmarks.peers import PEERS
from benchmarks.results import ALLOCATED, RESIDENT, TENSORS
from benchmarks.timing import Step
from benchmarks.workloads import Workload

_RESET_PEAK = "/proc/self/clear_refs"
_M_MMAP_THRESHOLD = -3  # glibc's malloc.h


def way(device: torch.device) -> str:
    """How memory is measured here: RESIDENT, TENSORS or ALLOCATED."""
    if device.type != "cpu":
        return ALLOCATED
    linux = sys.platform == "linux" and os.access(_RESET_PEAK, os.W_OK) and hasattr(ctypes.CDLL(None), "malloc_trim")
    return RESIDENT if linux else TENSORS


class Meter:
    """Measures the peak of a column's call, beyond what is held before it, its results and gradients included.

    On a CPU with one thread, and by the route that is taken with one, whatever the times are taken with: the two differ
    by a few per cent, and the threads of many short-lived processes wait for one another.
    """

    def __init__(self, device: torch.device):
        self.device, self.way = device, way(device)
        self.server: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: object) -> None:
        if self.server:
            self.server.terminate()
            self.server.communicate()
            self.server = None

    def __call__(self, workload: Workload, name: str) -> int | None:
        """Return the bytes, or None if the process died."""
        if self.way != RESIDENT:
            return (allocated_peak if self.way == ALLOCATED else tensor_peak)(_step(workload, name, self.device))
        if not self.server:
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.memory"]
            # in a session of its own, out of reach of the terminal's Ctrl-C
            self.server = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, start_new_session=True
            )
        assert self.server.stdin
        assert self.server.stdout
        try:
            pickle.dump((workload, name), self.server.stdin)
            self.server.stdin.flush()
            answer = self.server.stdout.readline()
        except BrokenPipeError:
            answer = b""
        if not answer:  # the server itself was killed, e.g. for want of memory; the next call starts another
            self.__exit__()
        return int(answer) if answer.strip().isdigit() else None


def _step(workload: Workload, name: str, device: torch.device) -> Step:
    """Build a column's call and make it once, so that all is loaded, compiled and cached."""
    module = build(workload, device, {name: PEERS[name]})[name]
    step = make_step(module, workload.make_input(device), workload)
    step()
    return step


def allocated_peak(step: Step) -> int:
    """The count of torch's caching allocator on a GPU."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def tensor_peak(step: Step) -> int:
    """The running sum of the allocations and frees that torch's profiler records, touched or not."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports its start and stop on stderr
    profiler = profile(profile_memory=True)
    with profiler:
        step()
    assert profiler.kineto_results is not None  # read as recorded: turning it into a trace takes seconds
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]  # torch's stub lacks it
        peak = max(peak, held)
    return peak


def resident_peak(step: Step) -> int:
    """The growth of this process's resident set, at its peak."""
    ctypes.CDLL(None).malloc_trim(0)
    with open(_RESET_PEAK, "w") as file:
        file.write("5")
    before = _status("VmRSS")
    step()
    return max(0, _status("VmHWM") - before)


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(key))


def serve() -> None:
    """Answer every question on standard input from a process forked for it; "failed" where that one dies."""
    torch.set_num_threads(1)
    while True:
        try:
            workload, name = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        if child := os.fork():
            _, status = os.waitpid(child, 0)
            if status:
                print("failed", flush=True)
            continue
        # blocks of this size go back to the system when they are freed: what is resident is in use
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 16)
        print(resident_peak(_step(workload, name, torch.device("cpu"))), flush=True)
        os._exit(0)


if __name__ == "__main__":
    serve()
