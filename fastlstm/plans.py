"""How the Triton kernels are laid out over a GPU: tile sizes and warps for a problem on a device.

Pure functions of sizes and limits: no tensors, no triton, no GPU needed. Every figure here was found by compiling ahead
of time for the target (`python -m fastlstm.kernels.targets`); a plan that spills or does not fit has no place here, but
for stepwise ones of RDNA where H is no multiple of 8: none was found there that never spills.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from fastlstm.problem import Device, Problem


@dataclass(frozen=True)
class Plan:
    """How one layer's recurrence is laid out over a GPU.

    Attributes:
        regime: "resident" (W_hh stays inside one program for all T), "persistent" (W_hh stays on the chip, spread over
            programs that meet once a step), "streaming" (the same, but a part of W_hh is read from L2 each step),
            "wavefront" (persistent, all layers of a stack at once) or "stepwise" (one launch a step).
        BLOCK_H: hidden units of one program, a power of two (resident: H rounded up).
        BLOCK_B: batch rows of one program, a power of two.
        BLOCK_K: length of one chunk of the dot's inner dimension (resident: BLOCK_H).
        num_warps: warps of one program.
        num_stages: depth of the compiler's software pipeline over chunks.
        TAIL_K: length of the chunks after the first KEPT (persistent and streaming, as all that follow): one, which
            stays on the chip as well, or, streaming, as many as it takes, read each step.
        KEPT: chunks of BLOCK_K columns of W_hh that stay on the chip.
        AHEAD: chunks of h on their way at once (forward).
        SPLIT: warps among which each chunk is dealt out (forward).
        groups: groups of programs (a tile of rows of one direction, or of one layer) that the device holds at once;
            the others follow in further launches. 0 for no bound.
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
    groups: int = 0

    @property
    def name(self) -> str:
        """What tells one layer's candidates apart."""
        return f"{self.regime}-{self.BLOCK_B}"

    @property
    def kernel(self) -> str:
        """The kernels that run it: those of "persistent" run "streaming" and "wavefront", too."""
        return "persistent" if self.regime in ("streaming", "wavefront") else self.regime


# targets that compile like another, and so have its plans
_LIKE = {"sm_87": "sm_80", "sm_89": "sm_86", "sm_103": "sm_100", "sm_121": "sm_120", "gfx1201": "gfx1100"}
# bytes of shared memory (LDS) that one program can have, for every target whose plans were compiled
SHARED_MEMORY = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
    "gfx950": 160 * 1024,
    "gfx1100": 64 * 1024,
}
SHARED_MEMORY |= {target: SHARED_MEMORY[other] for target, other in _LIKE.items()}

# num_warps of the resident kernels by BLOCK_H, found by compiling: with fewer, a thread's registers spill; with more,
# the gates of a unit part company and meet through shared memory. float32 with 16 units spills in 2 warps. What is
# missing spills whatever the warps.
_FORWARD_WARPS = {2: {16: 2, 32: 4, 64: 8, 128: 16}, 4: {16: 4, 32: 4, 64: 8}}  # by bytes of an element
_BACKWARD_WARPS = {16: 2, 32: 4, 64: 4, 128: 8}
_LARGEST_RAGGED = 113  # H up to which rows that are not aligned spill nothing with these
# RDNA spills sooner
_FORWARD_WARPS_RDNA = {2: {16: 4, 32: 8, 64: 16}, 4: {16: 4, 32: 16}}
_BACKWARD_WARPS_RDNA = {16: 4, 32: 16}


@functools.lru_cache(maxsize=4096)
def choose(problem: Problem, device: Device, backward: bool = False, layout: str = "") -> Plan:
    """Lay out the Triton kernels of one layer, or of all: the first of `candidates`.

    `layout` names another, which has won in trials; where it is no candidate, as it need not be for every B or both
    passes, the first of its regime is taken, or else the first.

    Example:
        >>> plan = choose(Problem(T=100, B=16, I=64, H=64, dtype=torch.bfloat16), Device("cuda", "sm_90"))
        >>> plan.regime, plan.BLOCK_H, plan.BLOCK_B, plan.num_warps
        ('resident', 64, 8, 8)
    """
    found = candidates(problem, device, backward)
    alike = [plan for plan in found if plan.regime == layout.partition("-")[0]]
    return next((plan for plan in alike if plan.name == layout), (alike or found)[0])


def candidates(problem: Problem, device: Device, backward: bool = False) -> list[Plan]:
    """Return every plan worth a trial for one layer, the best guess first; never empty.

    Before them comes a plan for all layers at once, where they may run together and it should pay. T does not matter,
    and B only to the nearest tile. A target that is not in `SHARED_MEMORY` gets plans that need little.

    Example:
        >>> H100 = Device("cuda", "sm_90", processors=132)
        >>> [plan.regime for plan in candidates(Problem(T=100, B=64, I=64, H=2048, dtype=torch.bfloat16), H100)]
        ['streaming', 'streaming', 'stepwise']
    """
    if device.target in _LIKE:
        device = replace(device, target=_LIKE[device.target])
    if resident := _resident(problem, device, backward):
        return [resident]
    found = []
    for rows, cost in ((16, 1.0), (32, 1.25)):  # about what a step costs
        plan = _persistent(problem, device, backward, rows)
        if plan and (rows == 16 or problem.B > 16):
            found.append((launches(plan, problem) * cost, plan))
    found.sort(key=lambda entry: entry[0])
    plans = [plan for _, plan in found]
    together = _persistent(problem, device, backward, 16, problem.L) if problem.stack and found else None
    # a step of two weights costs about 1.3 of one
    if together and launches(together, problem) * 1.3 < problem.L * found[0][0]:
        plans.insert(0, together)
    stepwise = _stepwise(problem, device, backward)
    # a guess: with so many launches in turn, one large GEMM a step is no slower
    return [*plans, stepwise] if found and found[0][0] <= 8 else [stepwise, *plans]


def _resident(problem: Problem, device: Device, backward: bool) -> Plan | None:
    """Return the plan whose programs hold all of W_hh each, or None where that does not fit, or spills."""
    H, itemsize, hip = problem.H, problem.dtype.itemsize, device.kind == "hip"
    BLOCK_H = max(16, 1 << (H - 1).bit_length())
    if backward:
        warps = _BACKWARD_WARPS_RDNA if _is_rdna(device) else _BACKWARD_WARPS
    else:
        warps = (_FORWARD_WARPS_RDNA if _is_rdna(device) else _FORWARD_WARPS)[min(itemsize, 4)]
    # W_hh lies in shared memory beside, on NVIDIA, the tiles that change layout: a quarter more at most
    shared = 4 * BLOCK_H * BLOCK_H * itemsize * (4 if hip else 5) // 4
    if BLOCK_H not in warps or shared > SHARED_MEMORY.get(device.target, 64 * 1024):
        return None
    num_warps = warps[BLOCK_H]
    if _is_ragged(problem):
        # too many addresses for 16 warps, and for 8 where each is of a single number
        if H > _LARGEST_RAGGED and H % 2:
            return None
        if H > _LARGEST_RAGGED or (BLOCK_H == 128 and H % 4 == 2 and device.target == "sm_80"):
            num_warps = 8
        if not hip and itemsize == 4 and (BLOCK_H == 32 if backward else not problem.tf32):
            num_warps *= 2
    # the matrix units' narrowest tile: the fewer rows a program has, the sooner a step is done
    return Plan("resident", BLOCK_H, 16 if hip else 8, BLOCK_H, num_warps)


def _stepwise(problem: Problem, device: Device, backward: bool) -> Plan:
    """Return the plan of one launch a step, which serves any size."""
    itemsize, hip, rdna = problem.dtype.itemsize, device.kind == "hip", _is_rdna(device)
    plain = not hip and itemsize == 4 and not problem.tf32  # no matrix unit multiplies it
    # wide tiles of ragged rows spill in fewer warps (on RDNA in any), and so does RDNA's float32
    crowded = problem.B > 16 and _is_ragged(problem) and not backward and not rdna
    BLOCK_B = 16 if problem.B <= 16 else 32 if hip or (crowded and plain) else 64
    num_warps = 8 if crowded or (rdna and itemsize == 4) else 4
    return Plan("stepwise", 16, BLOCK_B, 128 // itemsize, num_warps, 2 if hip else 3)


def _is_ragged(problem: Problem) -> bool:
    """Whether rows are not aligned: they are read piece by piece, each with an address in registers."""
    return problem.H * problem.dtype.itemsize % 16 > 0


def _is_rdna(device: Device) -> bool:
    return device.kind == "hip" and not device.target.startswith("gfx9")


def launches(plan: Plan, problem: Problem) -> int:
    """Return how many launches one pass takes, all its groups of programs after one another, where programs meet."""
    groups = (problem.L if plan.regime == "wavefront" else problem.D) * -(-problem.B // plan.BLOCK_B)
    return -(-groups // plan.groups) if plan.groups else 1


# largest H by target and bytes of an element of which a chip holds all of W_hh, found by compiling: for tiles of 16
# rows, of 32, and of 32 where rows of gates are not aligned
_LARGEST_PERSISTENT = {
    "sm_80": {2: (1024, 1024, 768), 4: (864, 0, 0)},
    "sm_86": {2: (512, 0, 0), 4: (512, 0, 0)},
    "sm_90": {2: (1536, 1024, 1024), 4: (1024, 1024, 1024)},
    "sm_100": {2: (1024, 1024, 1024), 4: (1024, 0, 0)},
    "sm_120": {2: (512, 0, 0), 4: (512, 0, 0)},
    "gfx942": {2: (1024, 0, 0), 4: (512, 0, 0)},
    "gfx950": {2: (1024, 0, 0), 4: (512, 0, 0)},
}
# beyond it, what stays: (chunk, chunks kept, columns read at a time) forward and backward, found likewise, by KB of
# shared memory, bytes of an element and rows of a tile
_STREAMING = {
    (227, 2, 16): ((512, 3, 128), (512, 3, 256)),
    (227, 2, 32): ((512, 2, 128), (256, 6, 128)),
    (227, 4, 16): ((256, 3, 128), (256, 2, 128)),
    (163, 2, 16): ((512, 2, 128), (512, 2, 128)),
    (163, 2, 32): ((256, 3, 128), (256, 3, 128)),
    (163, 4, 16): ((256, 2, 128), (128, 4, 128)),
    (99, 2, 16): ((256, 2, 128), (128, 4, 128)),
    (99, 4, 16): ((128, 2, 128), (128, 2, 64)),
}
_LARGEST_STREAMING = 2048
# registers of a thread of NVIDIA's in the persistent and wavefront regimes, where each program is alone on its
# processor: left to itself the compiler saves them, even by spilling, so that a second one would find room. Told so, it
# spills some streaming plans
PERSISTENT_REGISTERS = 255


def _persistent(problem: Problem, device: Device, backward: bool, BLOCK_B: int, layers: int = 1) -> Plan | None:
    """Return a plan for tiles of BLOCK_B rows whose programs meet once a step, each alone on its processor, or None.

    With several `layers` it is one for all of them at once.
    """
    itemsize, H, target = problem.dtype.itemsize, problem.H, device.target
    if itemsize == 4 and device.kind == "cuda" and not problem.tf32:
        return None  # no matrix unit of NVIDIA's multiplies float32, and W_hh spills as an operand of plain FMAs
    wide = BLOCK_B > 16
    ragged = _is_ragged(problem)
    largest = _LARGEST_PERSISTENT.get(target, {}).get(itemsize, (0, 0, 0))[wide * (1 + ragged)]
    held = 2 * H if layers > 1 else H  # columns: in a stack W_ih stands beside W_hh
    shared = SHARED_MEMORY.get(target, 0) // 1024
    BLOCK_H = 8 if itemsize == 4 and device.kind == "cuda" and (shared < 128 or held > 512) and largest >= held else 16
    groups = device.processors // -(-H // BLOCK_H) // layers * layers
    if not groups or not largest or H > _LARGEST_STREAMING or (layers > 1 and largest < held):
        return None
    if largest < H:
        # wide tiles, and TF32 on a small chip, leave no registers for such addresses
        spills = (ragged and (wide or (itemsize == 4 and shared < 128))) or (target, itemsize) == ("sm_120", 4)
        if spills or (shared, itemsize, BLOCK_B) not in _STREAMING:
            return None
        BLOCK_K, KEPT, TAIL_K = _STREAMING[shared, itemsize, BLOCK_B][backward]
        KEPT = min(KEPT, (H - 1) // BLOCK_K)
        return Plan("streaming", BLOCK_H, BLOCK_B, BLOCK_K, 8, 1, TAIL_K, KEPT, 1, 1 if backward else 8, groups)
    # forward they meet each its own h, in chunks of their own; backward both the same dgates
    columns = 2 * -(-H // BLOCK_H) * BLOCK_H if layers > 1 and backward else H
    (BLOCK_K, TAIL_K), SPLIT, ahead, num_warps = _persistent_layout(columns, wide, ragged, itemsize, target, backward)
    KEPT = -(-(columns - TAIL_K) // BLOCK_K)
    AHEAD = min(ahead, KEPT + 1)
    regime = "wavefront" if layers > 1 else "persistent"
    return Plan(regime, BLOCK_H, BLOCK_B, BLOCK_K, num_warps, 1, TAIL_K, KEPT, AHEAD, SPLIT, groups)


def _persistent_layout(
    H: int, wide: bool, ragged: bool, itemsize: int, target: str, backward: bool
) -> tuple[tuple[int, int], int, int, int]:
    """Return (`_chunks`, SPLIT, AHEAD, warps) as found by compiling."""
    if target.startswith("gfx"):  # W_hh in registers
        chunks = _chunks(H, 256 if itemsize == 2 else 128)
        return (chunks, 1, 1, 8 if itemsize == 2 else 4) if backward else (chunks, 1, 1, 4)
    if backward and target in ("sm_90", "sm_100"):
        # each chunk costs wgmma a fence: one is better, up to 1024, though it covers more than H
        if wide and ragged:
            return _chunks(H, 512 if H > 768 else 1024), 1, 1, 8
        return _chunks(H, 1024, whole=True), 1, 1, 8
    if backward:
        return _chunks(H, 128 if H <= 512 else 256), 1, 1, 8
    if wide and H > 768 and target not in ("sm_90", "sm_100"):
        return _chunks(H, 128), 1, 2, 8
    if wide and ragged:  # no registers for more than one chunk on its way, nor for two of very different lengths
        return _chunks(H, 1024, whole=itemsize == 4 and H <= 512, shortest=256 if H > 512 else 128), 8, 1, 8
    # dealt out over warps, a chunk costs nothing, and short ones cover little more than H
    return _chunks(H, 256), 8, 8, 8


def _chunks(H: int, longest: int, whole: bool = False, shortest: int = 128) -> tuple[int, int]:
    """Cover H by powers of two: (all chunks but the last, the last).

    No size pays for the next power of two, unless it is to stay `whole` up to `longest`. No chunk is under 128,
    16 along K for each of 8 warps (and wgmma takes 64 rows, which backward are units), nor under `shortest`.
    """
    full = max(shortest, 1 << (H - 1).bit_length())
    if full <= longest and whole:
        return full, full
    if full > longest:
        full = 2 * longest
    BLOCK_K = full // 2
    rest = H - (H - 1) // BLOCK_K * BLOCK_K
    TAIL_K = max(shortest, 1 << (rest - 1).bit_length())
    return (BLOCK_K, TAIL_K) if TAIL_K < BLOCK_K or full > longest else (full, full)


def every_plan(dtype: torch.dtype, target: str, tf32: bool = True) -> Iterator[tuple[int, bool, Plan]]:
    """Yield (H, backward, plan) for every plan that `candidates` can return for a dtype on a target, but for `groups`.

    H is the largest that the plan serves of each alignment of its rows, on which the compiled code depends (for
    stepwise plans, which serve any, 4096 and what lies under it).
    """
    kind = "hip" if target.startswith("gfx") else "cuda"
    device = Device(kind, target, processors=1024)
    found = {}
    for H in (*range(1, _LARGEST_STREAMING + 1), *range(4096 - 8, 4096 + 1)):
        for B, L in ((16, 1), (1024, 1), (16, 2)):
            for backward in (False, True):
                problem = Problem(1, B, H, H, L=L, dtype=dtype, tf32=tf32)
                for plan in candidates(problem, device, backward):
                    alignment = min(H & -H, 16 // dtype.itemsize)
                    found[replace(plan, groups=0), backward, alignment] = H
    yield from ((H, backward, plan) for (plan, backward, _), H in found.items())
