"""The named workloads: what is timed, without a word on how.

A workload's name reads `shape/input/dtype/mode`, e.g. `b/packed-bidirectional/fp32/train`; `--filter` and
`pytest -k` select by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}


@dataclass(frozen=True)
class Shape:
    """Time steps, batch, input_size and hidden_size, under a short name."""

    name: str
    T: int
    B: int
    I: int  # noqa: E741
    H: int

    def __str__(self) -> str:
        return f"T={self.T} B={self.B} I={self.I} H={self.H}"


@dataclass(frozen=True)
class Workload:
    """One row of the table.

    Attributes:
        shape: the sizes.
        dtype: a key of DTYPES.
        training: forward and backward; otherwise forward under no_grad.
        packed: a PackedSequence with lengths uniform in [T/4, T], not sorted; otherwise a dense [T, B, I] tensor.
        num_layers: as in nn.LSTM, without dropout.
        bidirectional: as in nn.LSTM.
        proj_size: as in nn.LSTM.
    """

    shape: Shape
    dtype: str = "fp32"
    training: bool = False
    packed: bool = False
    num_layers: int = 1
    bidirectional: bool = False
    proj_size: int = 0

    @cached_property
    def kind(self) -> str:
        """The input and the network, e.g. "packed-bidirectional"."""
        network = [f"{self.num_layers}layer"] * (self.num_layers > 1)
        network += ["bidirectional"] * self.bidirectional + [f"proj{self.proj_size}"] * (self.proj_size > 0)
        return "-".join(["packed" if self.packed else "dense", *network])

    @cached_property
    def group(self) -> str:
        """The name without the mode."""
        return f"{self.shape.name}/{self.kind}/{self.dtype}"

    @cached_property
    def name(self) -> str:
        """The full name."""
        return f"{self.group}/{'train' if self.training else 'forward'}"

    @property
    def arguments(self) -> dict[str, Any]:
        """What nn.LSTM is built with."""
        return {
            "input_size": self.shape.I,
            "hidden_size": self.shape.H,
            "num_layers": self.num_layers,
            "bidirectional": self.bidirectional,
            "proj_size": self.proj_size,
        }

    def make_input(self, device: torch.device, seed: int = 0) -> Tensor | PackedSequence:
        """Draw the input, the same for the same seed on every device."""
        generator = torch.Generator().manual_seed(seed)
        T, B = self.shape.T, self.shape.B
        x = torch.randn(T, B, self.shape.I, generator=generator, dtype=torch.float64)
        x = x.to(device, DTYPES[self.dtype])
        if not self.packed:
            return x
        lengths = torch.randint(max(1, T // 4), T + 1, (B,), generator=generator)
        lengths[0] = T
        return pack_padded_sequence(x, lengths, enforce_sorted=False)


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
        *_both(B, C, E, F, packed=True),
        *_both(B, C, dtype="bf16"),
        *_both(B, C, dtype="bf16", packed=True),
        *_train(A, B, F, dtype="fp64"),
        *_train(B, dtype="fp64", packed=True),
        *_both(B, bidirectional=True),
        *_both(B, bidirectional=True, packed=True),
        *_both(B, num_layers=2),
        *_both(B, num_layers=2, packed=True),
        *_both(B, proj_size=64),
        *_train(C, proj_size=128),
        *_train(B, proj_size=64, packed=True),
    ]


def gpu_workloads() -> list[Workload]:
    """What `python -m benchmarks` runs on a GPU."""
    return [
        *_both(A, B, C, F, dtype="bf16"),
        *_both(*DEEPBENCH, LONG, dtype="bf16"),
        *_both(B, *DEEPBENCH[:6], dtype="fp16"),
        *_both(B, C, *DEEPBENCH[:6]),
        *_both(B, C, H512, H1024, dtype="bf16", packed=True),
        *_both(B, H512, dtype="bf16", bidirectional=True),
        *_both(B, dtype="bf16", bidirectional=True, packed=True),
        *_both(B, H512, H1024, dtype="bf16", num_layers=2),
        *_both(H1024, dtype="bf16", proj_size=512),
        *_train(B, dtype="fp64"),
    ]


def quick_workloads(device_type: str) -> list[Workload]:
    """A handful that covers every kind, for --quick and for `pytest benchmarks`."""
    if device_type == "cpu":
        return [
            *_both(A, B, G),
            *_both(B, packed=True),
            *_train(F, packed=True),
            *_train(B, dtype="bf16", packed=True),
            *_train(A, dtype="fp64"),
            *_train(B, bidirectional=True, packed=True),
            *_train(B, num_layers=2, packed=True),
            *_train(B, proj_size=64),
        ]
    return [
        *_both(B, H512, H1024, dtype="bf16"),
        *_both(B, dtype="bf16", packed=True),
        *_train(H512, dtype="fp16"),
        *_train(H512),
        *_train(B, dtype="bf16", bidirectional=True),
        *_train(H512, dtype="bf16", num_layers=2),
    ]


def default_workloads(device_type: str) -> list[Workload]:
    """The full list for a kind of device."""
    return cpu_workloads() if device_type == "cpu" else gpu_workloads()
