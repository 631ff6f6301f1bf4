"""Barriers with one fault each, a way to put them into a kernel, and the smallest kernel that needs a right one.

What must be reported by the scheduler, and by the test of the compiled code, is written here once, for synthetic
kernels and for the package's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import triton
import triton.language as tl

from fastlstm.kernels import barrier
from fastlstm.kernels.barrier import arrive, gather_stores, slot, wait


@triton.jit
def exchange(
    values_ptr,
    counters_ptr,
    result_ptr,
    T,
    BLOCK: tl.constexpr,
    N: tl.constexpr,
    HIP: tl.constexpr = False,  # pyright: ignore
):
    """Each program adds up what all N programs of its group wrote in the step before. Grid: (N, groups).

    values: [2, groups, N, BLOCK] int32, counters: [groups] int32, zeros, result: [groups, N, BLOCK] int32.
    """
    program = tl.program_id(0)
    group = tl.program_id(1)
    groups = tl.num_programs(1)
    i = tl.arange(0, BLOCK)
    n = tl.arange(0, N)
    own = values_ptr + (group * N + program) * BLOCK + i
    everyone = values_ptr + (group * N + n)[:, None] * BLOCK + i[None, :]

    x = program + i
    for s in range(T):
        offset = slot(s) * groups * N * BLOCK
        tl.store(own + offset, x)
        arrive(counters_ptr + group, HIP)
        wait(counters_ptr + group, (s + 1) * N)
        x = (tl.sum(tl.load(everyone + offset), axis=0) + program) % 997
    tl.store(result_ptr + (group * N + program) * BLOCK + i, x)


@triton.jit
def _arrive_never(counter_ptr, HIP: tl.constexpr):
    pass


@triton.jit
def _wait_never(counter_ptr, target):
    pass


@triton.jit
def _arrive_relaxed(counter_ptr, HIP: tl.constexpr):
    gather_stores(HIP)
    tl.atomic_add(counter_ptr, 1, sem="relaxed", scope="gpu")


@triton.jit
def _wait_volatile(counter_ptr, target):
    while tl.load(counter_ptr, volatile=True) < target:
        pass
    tl.debug_barrier()


@triton.jit
def _wait_relaxed(counter_ptr, target):
    while tl.atomic_add(counter_ptr, 0, sem="relaxed", scope="gpu") < target:
        pass
    tl.debug_barrier()


@triton.jit
def _arrive_cta(counter_ptr, HIP: tl.constexpr):
    gather_stores(HIP)
    tl.atomic_add(counter_ptr, 1, sem="release", scope="cta")


@triton.jit
def _wait_cta(counter_ptr, target):
    while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="cta") < target:
        pass
    tl.debug_barrier()


@triton.jit
def _wait_one_less(counter_ptr, target):
    while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < target - 1:
        pass
    tl.debug_barrier()


@triton.jit
def _wait_one_more(counter_ptr, target):
    while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < target + 1:
        pass
    tl.debug_barrier()


@triton.jit
def _one_slot(step):
    return step * 0


@triton.jit
def _arrive_alone(counter_ptr, HIP: tl.constexpr):
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit
def _wait_alone(counter_ptr, target):
    while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < target:
        pass


@triton.jit
def _arrive_early(counter_ptr, HIP: tl.constexpr):
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


# fault -> what stands in for the functions of fastlstm/kernels/barrier.py
MUTANTS: dict[str, dict[str, Any]] = {
    "no barrier": {"arrive": _arrive_never, "wait": _wait_never},
    "relaxed arrive": {"arrive": _arrive_relaxed},
    "no acquire": {"wait": _wait_relaxed},
    "volatile poll": {"wait": _wait_volatile},
    "cta scope": {"arrive": _arrive_cta, "wait": _wait_cta},
    "waits for N-1": {"wait": _wait_one_less},
    "single buffer": {"slot": _one_slot},
    "no block barrier before the arrive": {"arrive": _arrive_alone},
    "no block barrier after the wait": {"wait": _wait_alone},
}
# right where a block barrier, with the release after it, covers the stores of all waves: not on AMD
ARRIVES_EARLY = {"arrive": _arrive_early}
WAITS_FOR_TOO_MANY = {"wait": _wait_one_more}


@contextlib.contextmanager
def replaced(module: ModuleType, functions: dict[str, Any]) -> Iterator[None]:
    """Replace barrier functions by name in a module of kernels, and in the module of the barrier itself.

    Raises:
        LookupError: the module has none of a name, so that nothing would be changed.
    """
    if missing := functions.keys() - vars(module).keys():
        raise LookupError(f"{module.__name__} does not use {', '.join(sorted(missing))}")
    with contextlib.ExitStack() as undo:
        for place in (module, barrier):
            for name, function in functions.items():
                undo.callback(setattr, place, name, getattr(place, name))
                setattr(place, name, function)
        yield
