"""Which code runs a call, and why, from a problem and a device, which need not be there.

`decide` names a backend; `plans.py` lays out the Triton kernels for it. What `tuning.py` has timed comes in as an
argument; without it a rule decides, and on a GPU the rule is shy, since it must not lose to cuDNN anywhere.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from dataclasses import dataclass

import torch

from fastlstm import plans
from fastlstm.problem import Device, Problem
from fastlstm.reference import accumulation_dtype

BACKENDS = ("auto", "reference", "triton", "torch")
REGIMES = ("resident", "persistent", "streaming", "wavefront", "stepwise")
Times = tuple[tuple[str, float], ...]
# regimes beside "resident" that were seen to be faster than cuDNN, by target; elsewhere they need a trial
_ON_CHIP = {"sm_90": {"persistent", "wavefront"}}


@dataclass(frozen=True)
class Decision:
    """What `decide` found: which code runs a problem, and why. `str()` is one readable paragraph.

    Attributes:
        backend: "torch" (stock's own op), "onednn" (stock's CPU kernel, called per chunk of steps),
            "reference" (plain torch, hand-written backward) or "triton".
        regime: how the recurrence is run, e.g. "resident", "stepwise", "chunks", "step", "loop", "stock".
        reason: one sentence.
        times: (candidate, milliseconds) of all that were timed for a problem like this, fastest first; empty where none
            was. Infinite for one that failed.
        layout: name of the layout of our kernels that won; empty for the one that `plans.choose` takes.
    """

    backend: str
    regime: str
    reason: str
    problem: Problem
    device: Device
    times: Times = ()
    layout: str = ""

    @property
    def implementation(self) -> str:
        """The backend as the custom ops take it."""
        return f"{self.backend} {self.layout}".rstrip()

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


def interpreting() -> bool:
    """Whether Triton kernels run under its interpreter; triton reads the variable when it is first imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def has_triton() -> bool:
    """Whether triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def decide(problem: Problem, device: Device, backend: str = "auto", times: Times = ()) -> Decision:
    """Resolve `backend` ("auto" yields to FASTLSTM_BACKEND) for a problem on a device.

    Args:
        problem: what is to be run.
        device: where.
        backend: one of BACKENDS, or "triton" and, after a space, the name of a layout.
        times: of each candidate, as `tuning.times` has found them on a GPU; "auto" takes the fastest.

    Raises:
        ValueError: `backend`, or FASTLSTM_BACKEND, is not one of BACKENDS.
        RuntimeError: the backend asked for cannot run here, e.g. "triton" for CPU tensors outside the interpreter.

    Example:
        >>> print(decide(Problem(T=5, B=2, I=3, H=4), Device("cpu", "cpu", "CPU"), "reference"))
        reference (loop) on CPU: It was asked for by name. The problem: inference, float32, dense, T=5, B=2, \
input_size=3, hidden_size=4, num_layers=1, directions=1.
    """
    reason = "It was asked for by name."
    if backend == "auto":
        backend = override()
        reason = "FASTLSTM_BACKEND asks for it."
        if backend not in BACKENDS:
            raise ValueError(f"FASTLSTM_BACKEND must be one of {', '.join(BACKENDS)}, got {backend!r}")
    elif not is_implementation(backend):
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")

    if backend == "auto" and device.kind == "cpu":
        backend, regime, reason = _decide_cpu(problem, device.target)
        return Decision(backend, regime, reason, problem, device)
    if backend == "auto" and all(ms == math.inf for _, ms in times):
        backend, regime, reason = _decide_gpu(problem, device)
        return Decision(backend, regime, reason, problem, device, times)
    if backend == "auto":
        backend = min(times, key=lambda pair: pair[1])[0]
        listed = ", ".join(f"{name} {f'{ms:.3g} ms' if ms < math.inf else 'failed'}" for name, ms in times)
        reason = f"In trials of calls like this it was the fastest: {listed}."

    backend, _, layout = backend.partition(" ")
    regime = "stock" if backend == "torch" else "loop"
    if backend == "triton":
        if obstacle := _obstacle_to_triton(problem, device):
            raise RuntimeError(f"backend='triton' cannot run here: {obstacle}")
        regime = plans.choose(problem, device, layout=layout).regime
    return Decision(backend, regime, reason, problem, device, times, layout)


def override() -> str:
    """Return what FASTLSTM_BACKEND asks for where a call leaves it to "auto"; that where it is not set."""
    return os.environ.get("FASTLSTM_BACKEND") or "auto"


def is_implementation(text: str) -> bool:
    """Whether `text` is one of BACKENDS, or "triton" and the name of a layout, e.g. "triton persistent-16"."""
    backend, _, layout = text.partition(" ")
    return text in BACKENDS or (backend == "triton" and layout.partition("-")[0] in REGIMES)


def has_choice(problem: Problem, device: Device) -> bool:
    """Whether both stock's op and our kernels can run a problem on a GPU."""
    known = device.kind in ("cuda", "hip") and device.target in plans.SHARED_MEMORY
    return known and problem.B > 0 and not _obstacle_to_triton(problem, device)


def candidates(problem: Problem, device: Device) -> tuple[str, ...]:
    """Return what may be the fastest for a problem on a GPU: stock's op, and our kernels in each layout worth a trial.

    The layouts are those of the forward pass; the backward pass takes the most alike.
    """
    return ("torch", *(f"triton {plan.name}" for plan in plans.candidates(problem, device)))


def decide_layer(problem: Problem, device: Device) -> str:
    """Return who runs a layer in a compiled graph where "auto" was asked for, when the graph runs.

    Stock's op is no choice there, since it does not yield what is saved, so nothing needs to be timed: of the others,
    the reference makes ten launches a step where our kernels make one at most.
    """
    if override() != "auto":
        return decide(problem, device).backend
    return "triton" if has_choice(problem, device) else "reference"


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
    if device.target not in plans.SHARED_MEMORY:
        return "torch", "stock", f"Stock's own op runs, since no kernel has been compiled for {device.target}."
    passes = (False, True) if problem.training else (False,)
    found = [plans.choose(problem, device, backward) for backward in passes]
    if {plan.regime for plan in found} - {"resident"} - _ON_CHIP.get(device.target, set()):
        return "torch", "stock", "Stock's own op runs, since none of our layouts is known to be faster here."
    if any(plans.launches(plan, problem) > 1 for plan in found):
        return "torch", "stock", "Stock's own op runs, since the card holds a part of the batch at a time only."
    if problem.T <= 32 and (problem.runs or problem.P):
        return "torch", "stock", "Stock's own op runs, since to prepare packed rows or a projection costs a few steps."
    # cuDNN's persistent kernels are for dense float16 and, up to some H, float32
    large = problem.dtype == torch.float32 and problem.H >= 256
    if device.kind == "cuda" and not (problem.dtype == torch.bfloat16 or problem.runs or large):
        return "torch", "stock", "Stock's own op runs, since cuDNN may keep W_hh on the chip, too."
    return "triton", found[0].regime, "W_hh stays on the chip for the whole sequence, as in stock's it does not."


def _decide_cpu(problem: Problem, target: str) -> tuple[str, str, str]:
    """Return (backend, regime, reason) for "auto" on CPU tensors; where the bounds lie was measured."""
    p = problem
    if target == "amx" and p.dtype != torch.bfloat16:
        target = "intel"  # its tiles are for bfloat16
    if p.B == 0:
        return "torch", "stock", "The batch has no rows."
    if is_widened(p.dtype):
        return _decide_widened(p)
    if onednn_has(p.dtype):
        # stock, too, sees that a packed batch with one run is dense
        if p.runs <= 1 and not p.P:
            if p.T == 1 and p.B <= 8 and not p.training:
                return "torch", "step", "For one step oneDNN's layout of the weights costs more than torch's cell."
            odd = target == "amx" and p.I % 2 and not p.H % 2 and not p.training
            if odd and p.T >= 48 and p.B * p.H**2 * (p.I + 32) > 1 << 24:  # less is over too soon to gain
                return "onednn", "chunks", "oneDNN does an odd number of inputs without AMX; chunks make it even."
            return "torch", "stock", "Stock's own op runs a dense batch in one oneDNN call a layer."
        if target == "avx2":
            return _decide_avx2(p)
        if not (obstacle := _obstacle_to_chunks(p, target)):
            return "onednn", "chunks", "Stock would go step by step; chunks of steps run as dense oneDNN layers."
    else:
        obstacle = "oneDNN has no kernel for this dtype here"
    if _loop_pays(p, target):
        how = "its backward written by hand" if p.training else "a few ops each"
        return "reference", "loop", f"Since {obstacle}, plain torch runs the steps, {how}."
    return "torch", "stock", f"Since {obstacle}, stock's own loop over the steps is as fast as any."


def _decide_widened(p: Problem) -> tuple[str, str, str]:
    """Return (backend, regime, reason) on a CPU for a dtype in 16 bit that oneDNN does not multiply there.

    Torch does so at a tenth to a thirtieth of its rate in float32, so float32 pays for all but the smallest calls.
    """
    fewest = 8 if p.training else 16
    if fewest > p.T * p.B or p.T * _products(p) < 1 << 17:
        return "torch", "stock", "The call is over before float32 copies of the weights would pay."
    if not p.P and onednn_has(torch.float32) and _chunks_pay(p, 8 if p.training else 24):
        return "onednn", "chunks", "This processor is slow in this dtype; oneDNN's layer runs in float32, in chunks."
    return "reference", "loop", "This processor is slow in this dtype; plain torch runs the steps, in float32."


def _decide_avx2(p: Problem) -> tuple[str, str, str]:
    """Return (backend, regime, reason) for packed rows or a projection in float32 on a CPU without AVX-512.

    There oneDNN's layer, too, goes step by step, by a GEMM that is no faster than MKL's.
    """
    if _chunks_pay(p, 8 if p.P else 32 if p.training else 48):
        return "onednn", "chunks", "Stock would go step by step; chunks of steps run as dense oneDNN layers."
    pays = p.B >= 32 and _products(p) >= 1 << 18 and one_product_pays(p.T * p.B, p.B, p.I, p.H, p.P or p.H, p.dtype)
    if p.T >= 8 if p.training else pays:
        return "reference", "loop", "The steps are large, or few, so that plain torch runs them one by one."
    return "torch", "stock", "The steps are large, or few, so that stock's own loop is as fast as any."


def _chunks_pay(p: Problem, most: int) -> bool:
    """Whether chunks beat a loop over the steps, to which they are an advantage while a step is small and steps many.

    `most` is B (I + P) / T; it held over some 500 shapes, to 1 to 3 % of the best choice for each.
    """
    fewest = 16 if p.training else 48
    return fewest <= p.T and p.I <= 8 * p.H and p.B * (p.I + (p.P or p.H)) <= most * p.T


def onednn_has(dtype: torch.dtype) -> bool:
    """Whether oneDNN runs stock's dense LSTM in a dtype on this machine."""
    return _onednn_is_on() and (dtype == torch.float32 or (dtype == torch.bfloat16 and _onednn_multiplies(dtype)))


def is_widened(dtype: torch.dtype) -> bool:
    """Whether a CPU should compute a dtype in float32, since oneDNN has no product in it on this machine."""
    return dtype in (torch.float16, torch.bfloat16) and not (_onednn_is_on() and _onednn_multiplies(dtype))


def _onednn_is_on() -> bool:
    return torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled()


@functools.cache
def _onednn_multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN has a product in a dtype in 16 bit for this processor."""
    supports = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    return getattr(torch.ops.mkldnn, supports[dtype])()


def _obstacle_to_chunks(p: Problem, target: str) -> str:
    """Return why `cpu.py` would lose against a loop over the steps, or ''.

    A loop is MKL's products, stock's as ours, and on an "intel" processor they are its best. On "amx" bfloat16 is
    multiplied in tiles, which oneDNN alone does.
    """
    bf16 = p.dtype == torch.bfloat16
    weight = p.H * (p.I + p.H)
    if target == "intel" and _mkl_pays(p) and _loop_pays(p, target):
        return "MKL's products of a step are as fast as oneDNN's layer"
    # stock's steps without a graph are the cheapest, in float32 above all, and where it multiplies many inputs at once;
    # a projection adds products of its own
    if p.training:
        shortest = 12
    elif bf16:
        tiles = 15 + (p.B * p.I >> 10) + (weight >> 16) if target == "amx" else 0
        shortest = max(tiles, 24 if p.B * p.H < 128 else 16)
    else:
        shortest = max(48 if p.P else 80, p.B * p.I >> 4) if target == "intel" else 24
    if (1.5 * shortest if p.P else shortest) > p.T:
        return "a sequence is too short to pay for the call"
    if p.H > 4 * p.P > 0:
        return "the state without its projection is more than four times as wide"
    if target == "amx":  # what it computes costs little, so its copies and gradients of the weights cost the more
        widest, largest, fewest = (4, 1 << 14, 8) if p.training else (16, 1 << 14, 0)
    else:
        widest, largest, fewest = 16, 1 << 16, 5 if bf16 else 4 if p.training else 2
    if widest * p.H < p.I or (bf16 and p.I + p.H >= 1024):
        return "oneDNN is slow where the input is this wide"
    if weight > largest and fewest * (p.I + p.H) > p.T * p.B:
        return "oneDNN's copies of the weights would cost more than the steps"
    return ""


def one_product_pays(rows: int, B: int, I: int, H: int, P: int, dtype: torch.dtype) -> bool:  # noqa: E741
    """Whether `reference.lstm_infer` beats the input GEMM over all `rows` and then `lstm_forward`, on a CPU.

    All weights must stay in its cache, and rows be enough to pay for laying them out.
    """
    size = 4 * H * (I + 1 + P) * accumulation_dtype(dtype).itemsize
    widest = 2 * B * P if is_widened(dtype) else 4 * P
    return B >= 4 and widest >= I and size <= 1 << 21 and rows > I + P


def _products(p: Problem) -> int:
    """Return how many products a step has for each gate."""
    return p.B * p.H * (p.I + (p.P or p.H))


def _mkl_pays(p: Problem) -> bool:
    """Whether a step has so many products that MKL is as fast as oneDNN's layer on an "intel" processor."""
    if p.training or p.P or p.dtype == torch.bfloat16:
        return _products(p) > 1 << 17
    return _products(p) > min(p.T << 11, 1 << 19)  # a chunk's call costs less the more steps it has


def _loop_pays(p: Problem, target: str) -> bool:
    """Whether the reference's loop over the steps beats stock's, where oneDNN's layer is no choice."""
    if p.dtype == torch.float16 and p.B >= 8:  # stock's is slow with or without a graph
        return True
    if p.training:  # the loop saves stock's graph, but over few steps what a call costs outweighs that
        if target == "cpu":
            return p.T >= 16 and not (p.P and p.dtype == torch.bfloat16)
        if target == "amx" and _products(p) > 1 << 23:  # the loop's are in float32
            return (64 if p.P else 16) <= p.T
        return p.T >= 8
    if target != "intel":
        return False
    if p.dtype == torch.bfloat16:  # stock's products are slower than MKL's of float32
        return p.T >= 16
    wide = p.I / p.H  # stock multiplies all inputs at once
    double = p.dtype == torch.float64
    large = _products(p) > 1 << 19 and not double
    shortest = 24 if p.P and not double else max(32, 40 * wide) if large else 72 * max(1, wide)
    if p.dtype not in (torch.float32, torch.float64) or wide > (1 if double else 2) or shortest > p.T:
        return False
    few = not p.P and _products(p) >= p.B**2 << 13  # rows, and weights too large for what is computed with them
    if not double and (few or not _mkl_pays(p)):  # for float64 oneDNN has no layer to compare with
        return False
    return one_product_pays(p.T * p.B, p.B, p.I, p.H, p.P or p.H, p.dtype)
