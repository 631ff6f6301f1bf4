"""A workload: what is timed, without a word on how.

A workload's name reads `shape/input/dtype/mode`, e.g. `b/packed-bidirectional/fp32/train`; `--filter` and
`pytest -k` select by it. The lists of workloads are in `suites.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


@dataclass(frozen=True)
class Shape:
    """Time steps, batch, input_size and hidden_size, under a short name."""

    name: str
    T: int
    B: int
    I: int  # noqa: E741
    H: int


@dataclass(frozen=True)
class Workload:
    """One row of the table.

    Attributes:
        shape: the sizes.
        dtype: a key of DTYPES.
        training: forward and backward; otherwise forward under no_grad.
        lengths: "" for a dense [T, B, I] tensor; otherwise a PackedSequence, not sorted, whose lengths are "uniform" in
            [T/4, T], "short" (skewed: half of them under T/8, mean T/4) or "onelong" (one of T, all others T/16).
        num_layers: as in nn.LSTM, without dropout.
        bidirectional: as in nn.LSTM.
        proj_size: as in nn.LSTM.
        streaming: one step a call, the state carried from call to call; the check runs all T.
    """

    shape: Shape
    dtype: str = "fp32"
    training: bool = False
    lengths: str = ""
    num_layers: int = 1
    bidirectional: bool = False
    proj_size: int = 0
    streaming: bool = False

    @cached_property
    def kind(self) -> str:
        """The input and the network, e.g. "packed-bidirectional"."""
        network = [f"{self.num_layers}layer"] * (self.num_layers > 1)
        network += ["bidirectional"] * self.bidirectional + [f"proj{self.proj_size}"] * (self.proj_size > 0)
        kinds = {"": "dense", "uniform": "packed"}
        source = "stream" if self.streaming else kinds.get(self.lengths, f"packed-{self.lengths}")
        return "-".join([source, *network])

    @cached_property
    def name(self) -> str:
        """The full name."""
        return f"{self.shape.name}/{self.kind}/{self.dtype}/{'train' if self.training else 'forward'}"

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

    @property
    def flops(self) -> float:
        """Floating-point operations of one call, of its matrix products alone; packed rows count as drawn."""
        s, directions = self.shape, 1 + self.bidirectional
        P = self.proj_size or s.H
        inputs = s.I + (self.num_layers - 1) * directions * P
        weights = directions * (4 * s.H * (inputs + self.num_layers * P) + self.num_layers * self.proj_size * s.H)
        return 2.0 * weights * self.tokens * (3 if self.training else 1)

    @property
    def tokens(self) -> int:
        """Rows over all steps: T * B, or the sum of the lengths; B for one call of a stream."""
        if self.streaming:
            return self.shape.B
        if not self.lengths:
            return self.shape.T * self.shape.B
        return int(self.draw_lengths().sum())

    def draw_lengths(self) -> Tensor:
        """Draw the lengths of a packed batch, [B], always the same; the longest is T."""
        generator = torch.Generator().manual_seed(1)
        T, B = self.shape.T, self.shape.B
        if self.lengths == "uniform":
            lengths = torch.randint(max(1, T // 4), T + 1, (B,), generator=generator)
        elif self.lengths == "short":
            lengths = (T * torch.rand(B, generator=generator) ** 3).long().clamp(min=1)
        else:
            lengths = torch.full((B,), max(1, T // 16))
        lengths[0] = T
        return lengths

    def make_input(self, device: torch.device) -> Tensor | PackedSequence:
        """Draw the input, the same on every device."""
        generator = torch.Generator().manual_seed(0)
        T, B = self.shape.T, self.shape.B
        x = torch.randn(T, B, self.shape.I, generator=generator, dtype=torch.float64)
        x = x.to(device, DTYPES[self.dtype])
        if not self.lengths:
            return x
        return pack_padded_sequence(x, self.draw_lengths(), enforce_sorted=False)
