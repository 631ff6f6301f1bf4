"""Which code runs a layer, and why.

Pure functions of a problem (sizes, dtype, flags) and a device (its limits): no tensors, no triton, no GPU needed,
so a table of GPUs can be tested anywhere. `decide` names a backend; `choose` lays out the Triton kernels for it.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch

BACKENDS = ("auto", "reference", "triton", "torch")


@dataclass(frozen=True)
class Problem:
    """An LSTM call as dispatch sees it: sizes, dtype and what is asked of it.

    Attributes:
        T: time steps (the longest row, for a packed batch).
        B: rows of the batch.
        I: input_size of the first layer.
        H: hidden_size.
        P: proj_size, 0 without projection.
        L: num_layers.
        D: directions, 1 or 2.
        dtype: dtype of the input.
        training: whether a backward pass will follow (some input requires grad and grad mode is on).
        runs: 0 for a dense batch; for a packed one the number of runs of steps with equal batch size.
        tf32: whether float32 dots on a GPU may round their operands to TF32.
    """

    T: int
    B: int
    I: int  # noqa: E741
    H: int
    P: int = 0
    L: int = 1
    D: int = 1
    dtype: torch.dtype = torch.float32
    training: bool = False
    runs: int = 0
    tf32: bool = True


@dataclass(frozen=True)
class Device:
    """A device's limits, as far as a plan depends on them.

    Attributes:
        kind: "cpu", "cuda", "hip", or torch's own name of any other device type ("mps", "meta", ...).
        target: the compile target: "cpu", "sm_90", "gfx942", ...; the kind where there is none.
        name: as the vendor names it.
        processors: multiprocessors (of a MIG or MPS share: those it was given), 0 where that does not matter.
    """

    kind: str
    target: str
    name: str = ""
    processors: int = 0


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


@dataclass(frozen=True)
class Decision:
    """What `decide` found: which code runs a problem, and why. `str()` is one readable paragraph.

    Attributes:
        backend: "torch" (stock's own op), "onednn" (stock's CPU kernel, called per chunk of steps),
            "reference" (plain torch, hand-written backward) or "triton".
        regime: how the recurrence is run, e.g. "resident", "stepwise", "chunks", "loop", "stock".
        reason: one sentence.
    """

    backend: str
    regime: str
    reason: str
    problem: Problem
    device: Device

    def __str__(self) -> str:
        p = self.problem
        batch = f"packed in {p.runs} runs" if p.runs else "dense"
        projected = f", proj_size={p.P}" if p.P else ""
        return (
            f"{self.backend} ({self.regime}) on {self.device.name or self.device.target}: {self.reason} "
            f"The problem: {'training' if p.training else 'inference'}, {str(p.dtype).removeprefix('torch.')}, "
            f"{batch}, T={p.T}, B={p.B}, input_size={p.I}, hidden_size={p.H}{projected}, "
            f"num_layers={p.L}, directions={p.D}."
        )


def device_of(device: torch.device) -> Device:
    """Return the limits of a torch device; a GPU's are asked of its driver once.

    Example:
        >>> device_of(torch.device("cpu"))
        Device(kind='cpu', target='cpu', name='CPU', processors=0)
    """
    if device.type == "cpu":
        return _CPU
    if device.type != "cuda":
        return Device(device.type, device.type)
    return _gpu(torch.cuda.current_device() if device.index is None else device.index)


_CPU = Device("cpu", "cpu", "CPU")


@functools.cache
def _gpu(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        # "gfx942:sramecc+:xnack-": the features after the colon do not change a plan
        return Device("hip", properties.gcnArchName.split(":")[0], properties.name, properties.multi_processor_count)
    target = f"sm_{properties.major}{properties.minor}"
    return Device("cuda", target, properties.name, properties.multi_processor_count)


def interpreting() -> bool:
    """Whether Triton kernels run under its interpreter; triton reads the variable when it is first imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def has_triton() -> bool:
    """Whether triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def decide(problem: Problem, device: Device, backend: str = "auto") -> Decision:
    """Resolve `backend` ("auto" yields to FASTLSTM_BACKEND) for a problem on a device.

    Raises:
        ValueError: `backend`, or FASTLSTM_BACKEND, is not one of BACKENDS.
        RuntimeError: the backend asked for cannot run here, e.g. "triton" for CPU tensors outside the interpreter.

    Example:
        >>> print(decide(Problem(T=5, B=2, I=3, H=4), device_of(torch.device("cpu")), "reference"))
        reference (loop) on CPU: It was asked for by name. The problem: inference, float32, dense, T=5, B=2, \
input_size=3, hidden_size=4, num_layers=1, directions=1.
    """
    reason = "It was asked for by name."
    if backend == "auto":
        backend = os.environ.get("FASTLSTM_BACKEND") or "auto"
        reason = "FASTLSTM_BACKEND asks for it."
        if backend not in BACKENDS:
            raise ValueError(f"FASTLSTM_BACKEND must be one of {', '.join(BACKENDS)}, got {backend!r}")
    elif backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")

    if backend == "auto":
        if device.kind == "cpu":
            backend, regime, reason = _decide_cpu(problem)
        else:
            backend, regime, reason = _decide_gpu(problem, device)
    elif backend == "triton":
        if obstacle := _obstacle_to_triton(problem, device):
            raise RuntimeError(f"backend='triton' cannot run here: {obstacle}")
        regime = choose(problem, device, backward=False).regime
    else:
        regime = "stock" if backend == "torch" else "loop"
    return Decision(backend, regime, reason, problem, device)


def _obstacle_to_triton(problem: Problem, device: Device) -> str:
    """Return why the Triton kernels cannot run a problem on a device, or ''."""
    if not has_triton():
        return "triton is not installed (pip install triton; Linux only)."
    if device.kind == "cpu" and not interpreting():
        return (
            "the tensors are on the CPU. Move them to a GPU, set TRITON_INTERPRET=1 before triton is imported to "
            "run the kernels under Triton's interpreter, or use backend='auto'."
        )
    if device.kind not in ("cpu", "cuda", "hip"):
        return f"the tensors are on a {device.kind} device; the kernels run on CUDA and ROCm GPUs."
    if problem.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        dtype = str(problem.dtype).removeprefix("torch.")
        return f"the kernels compute in float32, float16 and bfloat16, not {dtype}; use backend='auto'."
    return ""


def _decide_gpu(problem: Problem, device: Device) -> tuple[str, str, str]:
    """Return (backend, regime, reason) for "auto" on a device other than the CPU."""
    if obstacle := _obstacle_to_triton(problem, device):
        return "torch", "stock", f"Stock's own op runs, since {obstacle}"
    if device.target not in SHARED_MEMORY:
        return "torch", "stock", f"Stock's own op runs, since no kernel has been compiled for {device.target}."
    passes = (False, True) if problem.training else (False,)
    if all(choose(problem, device, backward).regime == "resident" for backward in passes):
        return "triton", "resident", "W_hh fits one program, so the recurrence stays on chip for the whole sequence."
    return "torch", "stock", "Stock's own op runs, since W_hh does not fit one program, and a launch a step loses."


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


def plans(dtype: torch.dtype, target: str, tf32: bool = True) -> Iterator[tuple[int, bool, Plan]]:
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


def _decide_cpu(problem: Problem) -> tuple[str, str, str]:
    """Return (backend, regime, reason) for "auto" on CPU tensors; where the bounds lie was measured."""
    p = problem
    if p.B == 0:
        return "torch", "stock", "The batch has no rows."
    if _onednn_has(p.dtype):
        # stock, too, sees that a packed batch with one run is dense
        if p.runs <= 1 and not p.P:
            return "torch", "stock", "Stock's own op runs a dense batch in one oneDNN call a layer."
        if not (obstacle := _obstacle_to_chunks(p)):
            return "onednn", "chunks", "Stock would go step by step; chunks of steps run as dense oneDNN layers."
    else:
        obstacle = "oneDNN has no kernel for this dtype here"
    # over few steps what a call costs outweighs stock's graph; wide bfloat16 GEMMs are all that counts, and stock's
    # are faster; stock's float16 is slow with or without a graph
    saves_graph = p.training and p.T >= 16 and not _wide_bfloat16(p)
    if saves_graph or (p.dtype == torch.float16 and p.B >= 8):
        return "reference", "loop", f"Since {obstacle}, plain torch runs the steps, its backward written by hand."
    return "torch", "stock", f"Since {obstacle}, stock's own loop over the steps is as fast as any."


def _wide_bfloat16(p: Problem) -> bool:
    return p.dtype == torch.bfloat16 and p.I + p.H >= 1024


def _onednn_has(dtype: torch.dtype) -> bool:
    """Whether oneDNN runs stock's dense LSTM in a dtype on this machine."""
    if not (torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled()):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _obstacle_to_chunks(p: Problem) -> str:
    """Return why `cpu.py` would lose against a loop over the steps, or ''."""
    if p.T < 4 or (p.T < 24 and not p.training):
        return "a sequence is too short to pay for the call"
    if p.H > 4 * p.P > 0:
        return "the state without its projection is more than four times as wide"
    if p.I > 16 * p.H or _wide_bfloat16(p):
        return "oneDNN is slow where the input is this wide"
    if p.H * (p.I + p.H) > 1 << 16 and p.T * p.B < 4 * (p.I + p.H):
        return "oneDNN's copies of the weights would take more memory than the steps"
    return ""
