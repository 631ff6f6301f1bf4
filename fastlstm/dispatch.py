"""Which code runs a call, and why, from a problem and a device, which need not be there.

`decide` names a backend; `plans.py` lays out the Triton kernels for it. What `tuning.py` has timed comes in as an
argument; without it a rule decides, and on a GPU the rule is shy, since it must not lose to cuDNN anywhere. On a CPU
nothing is timed: `cpu_rules.py` decides.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from dataclasses import dataclass

import torch

from fastlstm import cpu_rules, plans
from fastlstm.problem import Device, Problem

BACKENDS = ("auto", "reference", "triton", "torch")
KERNEL_REGIMES = ("resident", "persistent", "streaming", "wavefront", "stepwise")
Times = tuple[tuple[str, float], ...]
# regimes beside "resident" that were seen to be faster than cuDNN, by target; elsewhere they need a trial
_ON_CHIP = {"sm_90": {"persistent", "wavefront"}}


@dataclass(frozen=True)
class Decision:
    """What `decide` found: which code runs a problem, and why. `str()` is one readable paragraph.

    Attributes:
        backend: "torch" (stock's own op), "onednn" (stock's CPU kernel, called per chunk of steps),
            "reference" (plain torch, hand-written backward) or "triton"; under torch.compile also "auto", for what is
            decided when the compiled code runs.
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
    asked, reason = "backend", "It was asked for by name."
    if backend == "auto":
        backend = override()
        asked, reason = "FASTLSTM_BACKEND", "FASTLSTM_BACKEND asks for it."
    elif not is_implementation(backend):
        check_backend(backend)

    if backend == "auto" and device.kind == "cpu":
        backend, regime, reason = cpu_rules.choose(problem, device)
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
        check_triton(problem.dtype, problem.H, device.kind, asked)
        regime = plans.choose(problem, device, layout=layout).regime
    return Decision(backend, regime, reason, problem, device, times, layout)


def override() -> str:
    """Return what FASTLSTM_BACKEND asks for where a call leaves it to "auto"; that where it is not set.

    Raises:
        ValueError: it is not one of BACKENDS.
    """
    backend = os.environ.get("FASTLSTM_BACKEND") or "auto"
    if backend not in BACKENDS:
        raise ValueError(f"FASTLSTM_BACKEND must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend


def check_backend(backend: str) -> None:
    """Raise ValueError for an unknown backend."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")


def check_triton(dtype: torch.dtype, H: int, kind: str, asked: str = "backend") -> None:
    """Raise RuntimeError where the Triton kernels, for which `asked` asks, cannot run on a device of that kind."""
    if obstacle := _obstacle_to_triton(dtype, H, kind):
        raise RuntimeError(f"{asked}='triton' cannot run here: {obstacle}")


def is_implementation(text: str) -> bool:
    """Whether `text` is one of BACKENDS, or "triton" and the name of a layout, e.g. "triton persistent-16"."""
    backend, _, layout = text.partition(" ")
    return text in BACKENDS or (backend == "triton" and layout.partition("-")[0] in KERNEL_REGIMES)


def has_choice(problem: Problem, device: Device) -> bool:
    """Whether both stock's op and our kernels can run a problem on a GPU."""
    known = device.kind in ("cuda", "hip") and device.target in plans.SHARED_MEMORY
    return known and problem.B > 0 and not _obstacle_to_triton(problem.dtype, problem.H, device.kind)


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


def _obstacle_to_triton(dtype: torch.dtype, H: int, kind: str) -> str:
    """Return why the Triton kernels cannot run on a kind of device, or ''."""
    if not has_triton():
        return "triton is not installed (pip install triton; Linux only)."
    if kind == "cpu" and not interpreting():
        return (
            "the tensors are on the CPU. Move them to a GPU, set TRITON_INTERPRET=1 before triton is imported to "
            "run the kernels under Triton's interpreter, or use backend='auto'."
        )
    if kind not in ("cpu", "cuda", "hip"):
        return f"the tensors are on a {kind} device; the kernels run on CUDA and ROCm GPUs."
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        return f"the kernels compute in float32, float16 and bfloat16, not {name}; use backend='auto'."
    if 4 * H**2 >= 1 << 31:
        return f"hidden_size={H} is too large: the kernels count the elements of weight_hh in 32 bits."
    return ""


def _decide_gpu(problem: Problem, device: Device) -> tuple[str, str, str]:
    """Return (backend, regime, reason) for "auto" on a device other than the CPU."""
    if obstacle := _obstacle_to_triton(problem.dtype, problem.H, device.kind):
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
