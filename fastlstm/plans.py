"""How the Triton kernels are laid out over a GPU: tile sizes and warps for a problem on a device.

Pure functions of sizes and limits: no tensors, no triton, no GPU needed. Every figure here was found by compiling ahead
of time for the target (`python -m fastlstm.kernels.targets`); a plan that spills or does not fit has no place here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fastlstm.problem import Device, Problem


@dataclass(frozen=True)
class Plan:
    """How one layer's recurrence is laid out over a GPU.

    Attributes:
        regime: "resident" (W_hh stays inside one program for all T), "persistent" (W_hh stays on the chip, spread over
            programs that meet once a step) or "stepwise" (one launch a step).
        BLOCK_H: hidden units of one program, a power of two (resident: H rounded up).
        BLOCK_B: batch rows of one program, a power of two.
        BLOCK_K: length of one chunk of the dot's inner dimension (resident: BLOCK_H).
        num_warps: warps of one program.
        num_stages: depth of the compiler's software pipeline over chunks.
        TAIL_K: length of the last chunk (persistent, as all that follow).
        KEPT: chunks of W_hh that stay on the chip; the others would be read each step.
        AHEAD: chunks of h on their way at once (forward).
        SPLIT: warps among which each chunk is dealt out (forward).
    """

    regime: str
    BLOCK_H: int
    BLOCK_B: int
    BLOCK_K: int
    num_warps: int
    num_stages: int = 1
    TAIL_K: int = 0
    KEPT: int = 0
    AHEAD: int = 0
    SPLIT: int = 1


# bytes of shared memory (LDS) that one program can have, for every target whose plans were compiled
SHARED_MEMORY = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_87": 163 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_103": 227 * 1024,
    "sm_120": 99 * 1024,
    "sm_121": 99 * 1024,
    "gfx942": 64 * 1024,
    "gfx950": 160 * 1024,
}

# num_warps of the resident kernels by BLOCK_H, found by compiling: with fewer, a thread's registers spill; with more,
# the gates of a unit part company and meet through shared memory. float32 with 16 units spills in 2 warps.
_FORWARD_WARPS = {2: {16: 2, 32: 4, 64: 8, 128: 16}, 4: {16: 4, 32: 4, 64: 8}}  # by bytes of an element
_BACKWARD_WARPS = {16: 2, 32: 4, 64: 4, 128: 8}


def choose(problem: Problem, device: Device, backward: bool = False) -> Plan:
    """Lay out the Triton kernels of one layer. T does not matter, and B only to the nearest tile.

    A target that is not in `SHARED_MEMORY` gets plans that need little.

    Example:
        >>> plan = choose(Problem(T=100, B=16, I=64, H=64, dtype=torch.bfloat16), Device("cuda", "sm_90"))
        >>> plan.regime, plan.BLOCK_H, plan.BLOCK_B, plan.num_warps
        ('resident', 64, 8, 8)
    """
    vendor = "hip" if device.kind == "hip" else "cuda"
    itemsize = problem.dtype.itemsize
    BLOCK_H = max(16, 1 << (problem.H - 1).bit_length())
    warps = _BACKWARD_WARPS if backward else _FORWARD_WARPS[min(itemsize, 4)]
    # W_hh lies in shared memory beside, on NVIDIA, the tiles that change layout: a quarter more at most
    shared = 4 * BLOCK_H * BLOCK_H * itemsize * (4 if vendor == "hip" else 5) // 4
    if BLOCK_H in warps and shared <= SHARED_MEMORY.get(device.target, 64 * 1024):
        # the matrix units' narrowest tile: the fewer rows a program has, the sooner a step is done
        return Plan("resident", BLOCK_H, 16 if vendor == "hip" else 8, BLOCK_H, warps[BLOCK_H])
    if plan := _choose_persistent(problem, device, backward):
        return plan
    BLOCK_B = 16 if problem.B <= 16 else 64 if vendor == "cuda" else 32
    return Plan("stepwise", 16, BLOCK_B, 128 // itemsize, 4, 3 if vendor == "cuda" else 2)


# largest H of a persistent plan by target and bytes of an element, found by compiling: beyond it a program spills or
# does not fit. No AMD target: whether a block barrier there waits for the other waves' stores is not settled.
_LARGEST_PERSISTENT = {
    "sm_80": {2: 1024, 4: 864},
    "sm_86": {2: 512, 4: 512},
    "sm_90": {2: 1536, 4: 1024},
    "sm_100": {2: 1024, 4: 1024},
    "sm_120": {2: 512, 4: 512},
}


def _choose_persistent(problem: Problem, device: Device, backward: bool) -> Plan | None:
    """Return a plan whose programs are all on the chip at once, each alone on its processor, or None."""
    itemsize, H = problem.dtype.itemsize, problem.H
    if _LARGEST_PERSISTENT.get(device.target, {}).get(itemsize, 0) < H:
        return None
    if itemsize == 4 and not problem.tf32:
        return None  # no matrix unit of NVIDIA's multiplies float32, and W_hh spills as an operand of plain FMAs
    if H > 768 and H * itemsize % 8:
        return None  # rows that are read in smaller pieces need too many registers for their addresses
    little = SHARED_MEMORY[device.target] < 128 * 1024
    BLOCK_H = 8 if itemsize == 4 and (H > 512 or little) else 16
    for BLOCK_B in (16, 32):
        if device.processors >= -(-H // BLOCK_H) * -(-problem.B // BLOCK_B) * problem.D:
            layout = _persistent_layout(H, BLOCK_B > 16, itemsize, device.target, little, backward)
            if layout is None:
                return None
            largest, SPLIT, ahead, num_warps = layout
            # a dot takes 16 or more along K from each of SPLIT warps, and wgmma 64 rows, which backward are units
            BLOCK_K, TAIL_K = _chunks(H, largest, 16 * SPLIT if SPLIT > 1 else 64)
            KEPT = -(-(H - TAIL_K) // BLOCK_K) + 1
            return Plan("persistent", BLOCK_H, BLOCK_B, BLOCK_K, num_warps, 1, TAIL_K, KEPT, min(ahead, KEPT), SPLIT)
    return None


def _persistent_layout(
    H: int, wide: bool, itemsize: int, target: str, little: bool, backward: bool
) -> tuple[int, int, int, int] | None:
    """Return (longest chunk, SPLIT, AHEAD, warps) as found by compiling, or None where all that was tried spills."""
    if target == "sm_90" and H > 1024:  # W_hh in shared memory, for wgmma
        if wide:
            return None
        if backward:
            return 1024, 1, 8, 8
        return (1024, 1, 1, 4) if H * itemsize % 16 == 0 else (512, 1, 2, 4)
    if target == "sm_90":
        wgmma = backward or (wide and H & (H - 1) == 0 and (H <= 512 or itemsize == 2))
        return 1024, 1 if wgmma else 8, 8, 8
    aligned = H * itemsize % 16 == 0
    if (wide and (little or itemsize == 4 or not aligned)) or (little and not aligned):
        return None
    if target == "sm_100":
        return 1024, 1 if backward else 8, 8, 8
    if backward:
        return 128 if H <= 512 else 256, 1, 8, 8
    if wide and H > 768:
        return 128, 1, 2, 8
    return 1024, 8, 8, 8


def _chunks(H: int, largest: int, smallest: int) -> tuple[int, int]:
    """Cover H by powers of two, so that no size pays for the next one: (all chunks but the last, the last)."""
    full = max(smallest, 1 << (H - 1).bit_length())
    if full > largest:
        full = 2 * largest
    BLOCK_K = full // 2
    rest = H - (H - 1) // BLOCK_K * BLOCK_K
    TAIL_K = max(smallest, 1 << (rest - 1).bit_length())
    return (BLOCK_K, TAIL_K) if TAIL_K < BLOCK_K or full > largest else (full, full)


def every_plan(dtype: torch.dtype, target: str, tf32: bool = True) -> Iterator[tuple[int, bool, Plan]]:
    """Yield (H, backward, plan) for every plan that `choose` can return for a dtype on a target.

    H is the largest that the plan serves (for stepwise plans, which serve any, 4096); for persistent plans, whose loads
    depend on it, the largest of each alignment of the rows of W_hh.
    """
    kind = "hip" if target.startswith("gfx") else "cuda"
    found = {}
    for H in (*range(1, 1537), 4096):
        for B in (16, 32, 1024):
            # with so many processors, that many rows need tiles of just that size
            for processors in (-(-H // 16), -(-H // 8)):
                device = Device(kind, target, processors=processors)
                for backward in (False, True):
                    plan = choose(Problem(1, B, H, H, dtype=dtype, tf32=tf32), device, backward)
                    alignment = math.gcd(H * dtype.itemsize, 16) if plan.regime == "persistent" else 16
                    found[plan, backward, alignment] = H
    yield from ((H, backward, plan) for (plan, backward, _), H in found.items())


def precisions(dtype: torch.dtype, target: str) -> tuple[str, ...]:
    """Return the dot precisions a dtype may be compiled for: float32 follows torch's TF32 settings on NVIDIA."""
    return ("tf32", "ieee") if dtype == torch.float32 and target.startswith("sm_") else ("ieee",)
