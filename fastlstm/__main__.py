"""The doctor: `python -m fastlstm` prints what is installed, what it runs on, and what backend="auto" would choose.

`python -m fastlstm tune` times the candidates for typical calls, or for those it is given, ahead of their first use.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

import fastlstm
from fastlstm import functional, tuning
from fastlstm.dispatch import decide, has_triton, interpreting
from fastlstm.plans import SHARED_MEMORY
from fastlstm.problem import Device, Problem, allows_tf32, cpu_capability, device_of
from fastlstm.timings import timings

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
VARIABLES = (
    "FASTLSTM_BACKEND",
    "FASTLSTM_AUTOTUNE",
    "FASTLSTM_AUTOTUNE_MS",
    "FASTLSTM_CACHE_DIR",
    "TRITON_INTERPRET",
    "TRITON_CACHE_DIR",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE",
)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SHAPES = (  # T, B, I, H, L, D
    (100, 16, 64, 128, 1, 1),
    (128, 32, 256, 256, 1, 1),
    (100, 16, 512, 512, 1, 1),
    (35, 20, 650, 650, 2, 1),
    (100, 16, 256, 256, 1, 2),
    (50, 32, 1024, 1024, 1, 1),
)


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
        yield f"  {name:<34} {os.environ.get(name, '(not set)')}"

    yield ""
    yield "caches"
    yield f"  fastlstm's timings: {timings().path}, {len(timings().entries)} entries"
    yield f"  timing of new kinds of calls, on a GPU: {_tuning()}"
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
        problem = dataclasses.replace(problem, training=training)
        decision = decide(problem, device, times=tuning.known(problem, device))
    except (RuntimeError, ValueError) as error:  # what FASTLSTM_BACKEND asks for is wrong or cannot be had
        return f"{type(error).__name__}: {error}"
    return f"{decision.backend} ({decision.regime}): {decision.reason}"


def _tuning() -> str:
    try:
        why = "torch or cuDNN is in deterministic mode" if tuning.reproducible() else tuning.obstacle()
    except ValueError as error:
        why = str(error)
    return f"off, since {why}" if why else "on"


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
        return f"{cpu_capability()}, {onednn}, {torch.get_num_threads()} of {os.cpu_count()} threads"
    properties = torch.cuda.get_device_properties(device)
    target = device_of(device).target
    shared = SHARED_MEMORY.get(target)
    return (
        f"{properties.name}, {target}, {properties.multi_processor_count} processors, "
        f"{properties.total_memory / 2**30:.0f} GiB, "
        + (f"{shared // 1024} KiB of shared memory a program, " if shared else "no kernels compiled for it, ")
        + f"TF32 in cuDNN {'on' if torch.backends.cudnn.allow_tf32 else 'off'}"
    )


def tune(shapes: Sequence[tuple[int, ...]], dtypes: Sequence[str], modes: Sequence[bool]) -> Iterator[str]:
    """Time the candidates for each shape, dtype and mode on the current GPU, and yield what will be chosen.

    Args:
        shapes: (T, B, I, H, L, D) of each.
        dtypes: keys of DTYPES.
        modes: whether it trains.
    """
    on = torch.device("cuda", torch.cuda.current_device())
    for T, B, I, H, L, D in shapes:  # noqa: E741
        for dtype in dtypes:
            for training in modes:
                problem = Problem(T, B, I, H, 0, L, D, DTYPES[dtype], training, tf32=allows_tf32())
                times = tuning.times(problem, device_of(on), on, functional.trial, asked=True)
                yield str(decide(problem, device_of(on), times=times))


def _shape(text: str) -> tuple[int, ...]:
    """Read "T,B,I,H[,L[,D]]"."""
    sizes = [int(size) if size.isdecimal() else 0 for size in text.replace(" ", "").split(",")]
    if not 4 <= len(sizes) <= 6 or min(sizes) < 1 or sizes[5:] > [2]:
        raise argparse.ArgumentTypeError(f"takes T,B,I,H[,L[,D]], sizes from 1 up and D at most 2, got {text!r}")
    return (*sizes, 1, 1)[:6]


def main(arguments: Sequence[str] | None = None) -> str | None:
    """Run the command line; return what went wrong, if something did."""
    parser = argparse.ArgumentParser("python -m fastlstm", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="[tune]")
    tuner = commands.add_parser("tune", help="time the candidates ahead of their first use")
    tuner.add_argument(
        "--shapes", nargs="+", type=_shape, default=SHAPES, metavar="T,B,I,H[,L[,D]]", help="by default, typical ones"
    )
    tuner.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16", "float32"])
    mode = tuner.add_mutually_exclusive_group()
    mode.add_argument("--training", dest="modes", action="store_const", const=[True], default=[False, True])
    mode.add_argument("--inference", dest="modes", action="store_const", const=[False])
    tuner.add_argument("--clear", action="store_true", help="forget all timings instead")
    given = parser.parse_args(arguments)
    if given.command is None:
        print("\n".join(report()))
        return None
    if given.clear:
        timings().clear()
        print(f"forgotten: {timings().path}")
        return None
    if not torch.cuda.is_available():
        return "There is no GPU here, so there is nothing to time: on a CPU, choices are made by rule."
    for line in tune(given.shapes, given.dtype, given.modes):
        print(line)
    return None


if __name__ == "__main__":
    sys.exit(main())
