"""What is fastest on this very card: candidates are timed once for each kind of call, and the answer is kept on disk.

A call with backend="auto" on a GPU asks `times`. The first call of a new kind runs stock's op, and our kernels in each
layout that `plans.candidates` thinks worth a trial, on data made up in its shape, a few milliseconds each once they are
compiled; what they took goes to `timings.py`, where all later calls of that kind find it, in other processes too.
`dispatch.decide` takes the fastest.

**Kinds.** A kind (`key`) says no more than decides who is faster, so that a batch of another length does not time anew.
T counts in three classes: what a call costs before its first step matters over few steps and vanishes over many. B
counts up to the next power of two, and whether it is a multiple of 8, which cuDNN's persistent kernel asks for. I, H,
P, L and D, fixed in a model, count as they are, and so do dtype, training, packed or dense, TF32, and whether layers
must run one after the other. An answer holds for one card with so many processors and one set of versions: fastlstm,
torch, triton, CUDA or HIP, the driver, cuDNN.

**When nothing is timed** a call takes what is known, or else what `dispatch` says by rule: FASTLSTM_AUTOTUNE=0; the
budget of the process, FASTLSTM_AUTOTUNE_MS, is spent (compiling counts; the default is 10 000); cuDNN is turned off; a
CUDA graph is being captured; another thread is timing. torch.compile, torch.func, torch.jit.trace and training with
`recompute` never ask.

**The same bits.** In torch's deterministic mode, or cuDNN's, nothing is timed and nothing known is used: the same bits
in each run are not to be had from a stopwatch. Otherwise two runs of a program may choose differently, and differ as
two dtype-correct results do, until the file holds the answer; so may the ranks of a distributed job. Of processes that
time the same kind at once, the first to write is right, for the others too.

A candidate that fails (out of memory, does not compile, disagrees with stock) is out, in this process only.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fastlstm.dispatch import Times, candidates, has_choice, interpreting
from fastlstm.problem import Device, Problem, capturing, device_of
from fastlstm.timings import timings

Run = Callable[[], list[Tensor]]
Trial = Callable[[Problem, torch.device, str], Run]

LONGEST = 128  # steps of a trial
ROUNDS = 5
ENOUGH = 0.1  # seconds for all rounds of one kind
_log = logging.getLogger(__name__)
_timing = threading.Lock()
_spent = 0.0  # seconds that this process has timed for


def times(problem: Problem, device: Device, on: torch.device, trial: Trial, asked: bool = False) -> Times:
    """Return what each candidate takes for a problem like this, fastest first, timing them if nobody has yet.

    Args:
        problem: what is about to run.
        device: the limits of `on`.
        on: where trials run.
        trial: makes a run of (problem, device, backend) on made-up data.
        asked: whether to time even where the budget, FASTLSTM_AUTOTUNE or cuDNN's switch say not to.

    Returns:
        (candidate, milliseconds) of each, infinite for one that failed; empty where nothing is known.

    Raises:
        ValueError: FASTLSTM_AUTOTUNE_MS is no number.
    """
    global _spent
    if found := known(problem, device):
        return found
    if not has_choice(problem, device) or reproducible() or (not asked and obstacle()) or capturing(on):
        return ()
    if not _timing.acquire(blocking=False):
        return ()
    started = time.perf_counter()
    try:
        timings().read()  # another process may have been first
        if found := known(problem, device):
            return found
        short = replace(problem, T=min(problem.T, LONGEST))
        backends = candidates(problem, device)
        found = _aside(on, lambda: tune(backends, lambda backend: trial(short, on, backend), stopwatch(on)))
        if device_of(on) != device:  # it turned out to have fewer processors for us
            return ()
        return timings().add(key(problem, device), found)
    finally:
        _spent += time.perf_counter() - started
        _timing.release()


def known(problem: Problem, device: Device) -> Times:
    """Return what `times` would, without timing anything: a look-up in memory."""
    if not has_choice(problem, device) or reproducible():
        return ()
    return timings().entries.get(key(problem, device), ())


def tune(backends: Sequence[str], make: Callable[[str], Run], timer: Callable[[Run], float]) -> Times:
    """Time each backend's run; one that fails, or disagrees with the first that does not, takes forever."""
    runs: dict[str, Run] = {}
    best = dict.fromkeys(backends, math.inf)
    truth: list[Tensor] = []
    for backend in backends:
        with _failing(backend, runs):
            runs[backend] = make(backend)
            results = runs[backend]()  # compiles
            truth = truth or results
            _check(results, truth)
    started = time.perf_counter()
    for _ in range(ROUNDS):
        for backend, run in list(runs.items()):  # in turn: a change of the clock meets all alike
            with _failing(backend, runs):
                best[backend] = min(best[backend], timer(run))
        if time.perf_counter() - started > ENOUGH:
            break
    found = [(backend, ms if backend in runs else math.inf) for backend, ms in best.items()]
    return tuple(sorted(found, key=lambda pair: pair[1]))


@contextlib.contextmanager
def _failing(backend: str, runs: dict[str, Run]) -> Iterator[None]:
    """Let a candidate fail: it is out, and the log says why."""
    try:
        yield
    except Exception as error:
        runs.pop(backend, None)
        _log.warning("backend %s is out of the running: %s: %s", backend, type(error).__name__, error)


def _check(results: list[Tensor], truth: list[Tensor]) -> None:
    """Raise for results that no rounding explains: compilers are not always right on a card that nobody has tried."""
    for result, expected in zip(results, truth, strict=True):
        error = (result - expected).abs().max().item()
        if not error <= 0.1 * max(1.0, expected.abs().max().item()):
            raise ArithmeticError(f"a result differs from stock's by {error:.3g}")


def _aside(on: torch.device, work: Callable[[], Times]) -> Times:
    """Do it in a thread of its own, free of the caller's modes: autocast, no_grad, hooks, dispatch modes.

    The stream is the caller's: what it has queued is done first, and freed memory goes back to where it can use it.
    """

    def in_context() -> Times:
        if stream is None:
            return work()
        with torch.cuda.device(on), torch.cuda.stream(stream):
            return work()

    stream = torch.cuda.current_stream(on) if on.type == "cuda" else None
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(in_context).result()


def stopwatch(on: torch.device) -> Callable[[Run], float]:
    """Return what takes the milliseconds of a run, the host's gaps between launches included."""

    def by_wall(run: Run) -> float:
        started = time.perf_counter()
        run()
        return 1000 * (time.perf_counter() - started)

    def by_event(run: Run) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return by_event if on.type == "cuda" else by_wall


def reproducible() -> bool:
    """Whether the user asks for the same bits in each run."""
    return torch._C._get_deterministic_algorithms() or torch._C._get_cudnn_deterministic()


def obstacle() -> str:
    """Return why nothing new is timed, or ''.

    Raises:
        ValueError: FASTLSTM_AUTOTUNE_MS is no number.
    """
    if os.environ.get("FASTLSTM_AUTOTUNE", "1").lower() in ("0", "false", "no", "off"):
        return "FASTLSTM_AUTOTUNE says so"
    given = os.environ.get("FASTLSTM_AUTOTUNE_MS", "10000")
    try:
        budget = float(given)
    except ValueError:
        raise ValueError(f"FASTLSTM_AUTOTUNE_MS must be a number of milliseconds, got {given!r}") from None
    if not 1000 * _spent < budget:  # a NaN allows nothing
        return f"this process has spent its {budget:g} ms (FASTLSTM_AUTOTUNE_MS)"
    return "" if torch.backends.cudnn.enabled else "cuDNN is turned off"


@functools.lru_cache(maxsize=4096)
def key(problem: Problem, device: Device) -> str:
    """Name the kind of call that a problem is on a device; the module's docstring says what counts."""
    p = problem
    steps = next((f"T<={most}" for most in (4, 32) if most >= p.T), "T>32")
    rows = f"B<={1 << (p.B - 1).bit_length()}" + (" B%8=0" if p.B % 8 == 0 else "")
    passes = "training" if p.training else "inference"
    layout = "packed" if p.runs else "dense"
    dtype = str(p.dtype).removeprefix("torch.") + (" tf32" if p.dtype == torch.float32 and p.tf32 else "")
    card = f"{device.name} {device.target} {device.processors} processors"
    sizes = f"I={p.I} H={p.H} P={p.P} L={p.L} D={p.D}" + (" apart" if p.apart else "")
    return f"{card}; {_versions()}; {dtype} {passes} {layout} {steps} {rows} {sizes}"


@functools.cache
def _versions() -> str:
    import triton

    import fastlstm

    kind, module = ("hip", "amdgpu") if torch.version.hip else ("cuda", "nvidia")
    driver = "unknown"
    with contextlib.suppress(OSError):
        driver = Path(f"/sys/module/{module}/version").read_text().strip()
    versions = {
        "fastlstm": fastlstm.__version__,
        "torch": torch.__version__,
        "triton": triton.__version__ + (" interpreted" if interpreting() else ""),
        kind: getattr(torch.version, kind),
        "cudnn": torch.backends.cudnn.version(),
        "driver": driver,
    }
    return ", ".join(f"{name} {version}" for name, version in versions.items())
