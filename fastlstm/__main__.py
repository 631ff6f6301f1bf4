"""The doctor: `python -m fastlstm` prints what is installed, what it runs on, and what backend="auto" would choose."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import torch

import fastlstm
from fastlstm.dispatch import decide, has_triton, interpreting
from fastlstm.plans import SHARED_MEMORY
from fastlstm.problem import Device, Problem, device_of

# a name for people, then what dispatch sees
TYPICAL = (
    ("one stream", Problem(T=100, B=1, I=64, H=64)),
    ("tagger", Problem(T=100, B=16, I=64, H=128)),
    ("tagger, packed lengths", Problem(T=100, B=16, I=64, H=128, runs=15)),
    ("tagger, bidirectional", Problem(T=100, B=16, I=64, H=128, D=2, dtype=torch.bfloat16)),
    ("tagger, projection", Problem(T=100, B=16, I=64, H=128, P=64)),
    ("tagger, float64", Problem(T=100, B=16, I=64, H=128, dtype=torch.float64)),
    ("word model, two layers", Problem(T=35, B=20, I=650, H=650, L=2, dtype=torch.bfloat16)),
    ("large", Problem(T=50, B=32, I=1536, H=1536, dtype=torch.float16)),
)
VARIABLES = ("FASTLSTM_BACKEND", "TRITON_INTERPRET", "TRITON_CACHE_DIR", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


def report() -> Iterator[str]:
    """Yield the report's lines."""
    yield f"fastlstm   {fastlstm.__version__}"
    yield f"python     {platform.python_version()}"
    yield f"torch      {torch.__version__}{_build()}"
    yield f"triton     {_triton()}"
    yield f"system     {platform.platform()}"

    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    yield ""
    yield "devices"
    for device in devices:
        yield f"  {device!s:<8} {_limits(device)}"
    if len(devices) == 1:
        yield "  cuda     none found"

    yield ""
    yield "environment"
    for name in VARIABLES:
        yield f"  {name:<20} {os.environ.get(name, '(not set)')}"

    yield ""
    yield "caches"
    yield "  fastlstm keeps none: choices are made by rule"
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    yield f"  triton's compiled kernels: {folder}{'' if folder.is_dir() else ' (not there yet)'}"

    # two equal cards choose alike
    for found in dict.fromkeys(device_of(device) for device in devices):
        yield ""
        yield f'what backend="auto" chooses on {found.name or found.target}'
        yield from choices(found)


def choices(device: Device) -> Iterator[str]:
    """Yield what dispatch decides for each typical problem on a device, in inference and in training, and why."""
    for name, problem in TYPICAL:
        yield f"  {name}: {_sizes(problem)}"
        made = {training: _choice(problem, training, device) for training in (False, True)}
        if made[False] == made[True]:
            yield f"    inference, training  {made[True]}"
        else:
            yield f"    inference  {made[False]}"
            yield f"    training   {made[True]}"


def _choice(problem: Problem, training: bool, device: Device) -> str:
    try:
        decision = decide(dataclasses.replace(problem, training=training), device)
    except (RuntimeError, ValueError) as error:  # what FASTLSTM_BACKEND asks for is wrong or cannot be had
        return f"{type(error).__name__}: {error}"
    return f"{decision.backend} ({decision.regime}): {decision.reason}"


def _sizes(problem: Problem) -> str:
    dtype = str(problem.dtype).removeprefix("torch.")
    sizes = f"{dtype}, T={problem.T} B={problem.B} I={problem.I} H={problem.H}"
    return sizes + (f" P={problem.P}" if problem.P else "")


def _build() -> str:
    """What torch was built with, as far as it matters here."""
    cuda, hip = torch.version.cuda, torch.version.hip
    parts = [f"CUDA {cuda}"] * bool(cuda) + [f"ROCm {hip}"] * bool(hip)
    if torch.cuda.is_available() and torch.backends.cudnn.is_available():
        parts.append(f"cuDNN {torch.backends.cudnn.version()}")
    return f" ({', '.join(parts)})" if parts else ""


def _triton() -> str:
    if not has_triton():
        return "not installed; stock's op and plain torch serve every call"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # ROCm's and nightly builds go by other names
        version = "installed"
    return version + (", interpreter on (TRITON_INTERPRET)" if interpreting() else ", interpreter off")


def _limits(device: torch.device) -> str:
    """One line on what a device has."""
    if device.type == "cpu":
        onednn = "oneDNN" if torch.backends.mkldnn.is_available() else "no oneDNN"
        capability = torch.backends.cpu.get_cpu_capability()
        return f"{capability}, {onednn}, {torch.get_num_threads()} of {os.cpu_count()} threads"
    properties = torch.cuda.get_device_properties(device)
    target = device_of(device).target
    shared = SHARED_MEMORY.get(target)
    return (
        f"{properties.name}, {target}, {properties.multi_processor_count} processors, "
        f"{properties.total_memory / 2**30:.0f} GiB, "
        + (f"{shared // 1024} KiB of shared memory a program, " if shared else "no kernels compiled for it, ")
        + f"TF32 in cuDNN {'on' if torch.backends.cudnn.allow_tf32 else 'off'}"
    )


if __name__ == "__main__":
    print("\n".join(report()))
