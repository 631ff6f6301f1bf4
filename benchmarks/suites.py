"""The suites: named lists of workloads, what each is for, and which columns it shows.

`default` is what a visitor sees first; the others are asked for with `--suite`.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from benchmarks.peers import EAGER, INPUT_PRODUCT, OURS, STOCK
from benchmarks.workloads import Shape, Workload

A = Shape("a", 100, 1, 64, 64)  # one stream, the wrapper's own cost shows
B = Shape("b", 100, 16, 64, 128)  # a tagger
C = Shape("c", 128, 32, 128, 256)  # a sentence encoder
D = Shape("d", 35, 20, 650, 650)  # the medium word model of Zaremba et al. 2014
E = Shape("e", 60, 128, 40, 100)  # speech features: a large batch, nothing a power of two
F = Shape("f", 1000, 4, 32, 64)  # a long signal
G = Shape("g", 20, 1, 32, 32)  # as small as calls get

# DeepBench's LSTM list (github.com/baidu-research/DeepBench), input_size = hidden_size as there
DEEPBENCH = tuple(
    Shape(f"deepbench-{H}x{batch}", T, batch, H, H)
    for H, batch, T in (
        (256, 16, 150),
        (256, 64, 150),
        (512, 16, 25),
        (512, 64, 25),
        (1024, 16, 25),
        (1024, 128, 25),
        (1536, 8, 50),
        (1536, 32, 50),
        (2048, 16, 25),
        (2048, 128, 25),
        (4096, 128, 25),
    )
)
H512, H1024 = DEEPBENCH[3], DEEPBENCH[4]
# the shape that FlashRNN's paper (arXiv 2412.07752) times
LONG = Shape("long-768", 1024, 16, 768, 768)


def _both(*shapes: Shape, dtype: str = "fp32", **options) -> list[Workload]:
    """Each shape, forward then training."""
    return [Workload(shape, dtype, training=training, **options) for shape in shapes for training in (False, True)]


def _train(*shapes: Shape, dtype: str = "fp32", **options) -> list[Workload]:
    """Each shape, training only."""
    return [Workload(shape, dtype, training=True, **options) for shape in shapes]


def cpu_workloads() -> list[Workload]:
    """What `python -m benchmarks` runs where there is no GPU."""
    return [
        *_both(A, B, C, D, E, F, G),
        *_both(B, C, E, F, lengths="uniform"),
        *_both(B, C, dtype="bf16"),
        *_both(B, C, dtype="bf16", lengths="uniform"),
        *_train(A, B, F, dtype="fp64"),
        *_train(B, dtype="fp64", lengths="uniform"),
        *_both(B, bidirectional=True),
        *_both(B, bidirectional=True, lengths="uniform"),
        *_both(B, num_layers=2),
        *_both(B, num_layers=2, lengths="uniform"),
        *_both(B, proj_size=64),
        *_train(C, proj_size=128),
        *_train(B, proj_size=64, lengths="uniform"),
    ]


def gpu_workloads() -> list[Workload]:
    """What `python -m benchmarks` runs on a GPU."""
    return [
        *_both(A, B, C, F, dtype="bf16"),
        *_both(*DEEPBENCH, LONG, dtype="bf16"),
        *_both(B, *DEEPBENCH[:6], dtype="fp16"),
        *_both(B, C, *DEEPBENCH[:6]),
        *_both(B, C, H512, H1024, dtype="bf16", lengths="uniform"),
        *_both(B, H512, dtype="bf16", bidirectional=True),
        *_both(B, dtype="bf16", bidirectional=True, lengths="uniform"),
        *_both(B, H512, H1024, dtype="bf16", num_layers=2),
        *_both(H1024, dtype="bf16", proj_size=512),
        *_train(B, dtype="fp64"),
    ]


def quick_workloads(device_type: str) -> list[Workload]:
    """A handful that covers every kind, for --quick and for `pytest benchmarks`."""
    if device_type == "cpu":
        return [
            *_both(A, B, G),
            *_both(B, lengths="uniform"),
            *_train(F, lengths="uniform"),
            *_train(B, dtype="bf16", lengths="uniform"),
            *_train(A, dtype="fp64"),
            *_train(B, bidirectional=True, lengths="uniform"),
            *_train(B, num_layers=2, lengths="uniform"),
            *_train(B, proj_size=64),
        ]
    return [
        *_both(B, H512, H1024, dtype="bf16"),
        *_both(B, dtype="bf16", lengths="uniform"),
        *_train(H512, dtype="fp16"),
        *_train(H512),
        *_train(B, dtype="bf16", bidirectional=True),
        *_train(H512, dtype="bf16", num_layers=2),
    ]


def _own_dtypes(device_type: str) -> tuple[str, ...]:
    return ("fp32",) if device_type == "cpu" else ("bf16", "fp32")


def deepbench(device_type: str) -> list[Workload]:
    """DeepBench's list."""
    return [workload for dtype in _own_dtypes(device_type) for workload in _both(*DEEPBENCH, dtype=dtype)]


def flashrnn(device_type: str) -> list[Workload]:
    """FlashRNN's shape, and its sweep of 768 units in N heads: N heads are N sequences of 768 / N units here."""
    heads = [Shape(f"heads-{n}x{768 // n}", 1024, 16 * n, 768 // n, 768 // n) for n in (3, 6, 12, 24, 48)]
    return [workload for dtype in _own_dtypes(device_type) for workload in _both(LONG, *heads, dtype=dtype)]


def sweep(device_type: str) -> list[Workload]:
    """A log grid, in random order after every other value of each size, so that any beginning is a picture."""
    sizes = ((16, 64, 256, 1024, 4096), (1, 4, 16, 64, 128, 512), (32, 64, 128, 256, 512, 1024, 2048, 4096))
    grid = list(itertools.product(*sizes))
    random.Random(0).shuffle(grid)
    grid.sort(key=lambda point: any(values.index(size) % 2 for size, values in zip(point, sizes, strict=True)))
    shapes = [Shape(f"h{H}-b{B}-t{T}", T, B, H, H) for T, B, H in grid]
    workloads = _both(*shapes, dtype=_own_dtypes(device_type)[0])
    return [workload for workload in workloads if workload.flops <= MAX_FLOPS[device_type] / 10]  # many, so lighter


def varlen(device_type: str) -> list[Workload]:
    """Packed batches whose lengths are distributed as they are in practice."""
    shapes = B, C, Shape("speech", 400, 16, 80, 256), Shape("chat", 256, 64, 128, 128)
    return [
        workload
        for lengths in ("uniform", "short", "onelong")
        for workload in _both(*shapes, dtype=_own_dtypes(device_type)[0], lengths=lengths)
    ]


def stack(device_type: str) -> list[Workload]:
    """1, 2, 4 and 8 layers in one and in two directions."""
    return [
        workload
        for bidirectional in (False, True)
        for layers in (1, 2, 4, 8)
        for workload in _both(B, dtype=_own_dtypes(device_type)[0], num_layers=layers, bidirectional=bidirectional)
    ]


def latency(device_type: str) -> list[Workload]:
    """One stream, one step a call, the state carried along."""
    shapes = [Shape(f"stream-{H}", 20, 1, H, H) for H in (32, 64, 128, 256, 512, 1024)]
    streams = [Workload(shape, dtype, streaming=True) for dtype in _own_dtypes(device_type) for shape in shapes]
    return [*streams, *(replace(stream, num_layers=2) for stream in streams if stream.shape.H in (128, 512))]


def accuracy(device_type: str) -> list[Workload]:
    """Errors as sequences grow."""
    shapes = [Shape(f"t{T}", T, 8, 64, 128) for T in (16, 64, 256, 1024, 4096)]
    dense = [workload for dtype in ("fp32", "bf16", "fp16") for workload in _train(*shapes, dtype=dtype)]
    return [*dense, *_train(*shapes, lengths="uniform")]


@dataclass(frozen=True)
class Suite:
    """A list of workloads for each kind of device ("cpu" or "cuda").

    Attributes:
        about: what question it answers.
        make: device type -> workloads.
        peers: the columns it shows unless --peer asks for others; the unavailable ones are left out with a reason.
        measure: "speed"; "latency": every call by itself; "accuracy": only errors, nothing is timed.
        minutes: when it stops unless --minutes says otherwise; the same command goes on from there.
    """

    about: str
    make: Callable[[str], list[Workload]]
    peers: tuple[str, ...] = (STOCK, OURS, EAGER)
    measure: Literal["speed", "latency", "accuracy"] = "speed"
    minutes: float = 15.0

    def workloads(self, device_type: str) -> list[Workload]:
        """The workloads that a device of this type gets through in reasonable time."""
        return [workload for workload in self.make(device_type) if workload.flops <= MAX_FLOPS[device_type]]


def in_dtypes(workloads: list[Workload], dtypes: list[str]) -> list[Workload]:
    """Keep those of the wanted dtypes; for a dtype that none has, run in it those of the first one's dtype."""
    there, own = {workload.dtype for workload in workloads}, workloads[0].dtype
    others = [replace(w, dtype=d) for d in dtypes if d not in there for w in workloads if w.dtype == own]
    return [workload for workload in workloads if workload.dtype in dtypes] + others


# one call of more than this would take seconds on a usual device of the kind, and a row is about forty calls
MAX_FLOPS = {"cpu": 1e11, "cuda": 3e13}

_KERNELS = STOCK, OURS, "fastlstm-triton"
_ALL = *_KERNELS, EAGER, "compiled", "flashrnn", "torchrl", "haste"

SUITES = {
    "default": Suite(
        "every kind of input and network that people use",
        lambda device_type: cpu_workloads() if device_type == "cpu" else gpu_workloads(),
        minutes=float("inf"),
    ),
    "deepbench": Suite("the shapes of DeepBench", deepbench, _ALL),
    "flashrnn": Suite("the shape and the heads of FlashRNN's paper", flashrnn, (*_ALL, INPUT_PRODUCT)),
    "sweep": Suite("where is fastlstm faster, over H, B and T?", sweep, _KERNELS),
    "varlen": Suite("variable lengths: uniform, mostly short, one long", varlen),
    "stack": Suite("1 to 8 layers, one and two directions", stack),
    "latency": Suite("one step at a time, p50 and p99", latency, _ALL, "latency"),
    "accuracy": Suite(
        "error to float64 of output and every gradient as T grows",
        accuracy,
        (STOCK, OURS, "fastlstm-reference", "fastlstm-triton", EAGER),
        "accuracy",
    ),
}
