"""The columns: what can be compared, each behind nn.LSTM's arguments, parameters, call and results.

To add one, write an `RNNBase` with nn.LSTM's parameters (`third_party.py` has four) and enter it in PEERS.
"""

from __future__ import annotations

import functools
import importlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# column 1 is stock, looked up once, here: a later patch of torch.nn.LSTM cannot change what is compared with
from torch.nn import LSTM as STOCK_LSTM
from torch.nn import RNNBase
from torch.nn.utils.rnn import PackedSequence

import fastlstm
from benchmarks.third_party import TORCHRL, FlashRNN, Haste, InputProduct, State, TorchRL
from benchmarks.workloads import Workload
from fastlstm.dispatch import has_triton

Sequence = Tensor | PackedSequence

STOCK, OURS, EAGER = "torch.nn.LSTM", "fastlstm", "eager"
INPUT_PRODUCT = "input-product"


def cell_step(gates_x: Tensor, h: Tensor, c: Tensor, w_hh_t: Tensor) -> State:
    """One step: gates_x [B, 4H], h [B, P] and c [B, H] to h [B, H] and c."""
    i, f, g, o = torch.addmm(gates_x, h, w_hh_t).chunk(4, 1)
    c = torch.addcmul(f.sigmoid() * c, i.sigmoid(), g.tanh())
    return (o.sigmoid() * c.tanh()).to(gates_x.dtype), c


class EagerLSTM(RNNBase):
    """The loop a careful user writes in plain torch, differentiated by autograd.

    The input product of all steps is one GEMM, the recurrent one is one `addmm` a step, the cell state of 16-bit
    inputs is kept in float32, and a packed batch computes only its live rows.
    """

    step: Callable[[Tensor, Tensor, Tensor, Tensor], State] = staticmethod(cell_step)

    def __init__(self, *args, **kwargs):
        super().__init__("LSTM", *args, **kwargs)

    def forward(self, x: Sequence, hx: State | None = None) -> tuple[Sequence, State]:  # type: ignore[override]
        """Run all layers; x is [T, B, I] or packed, hx as nn.LSTM takes it."""
        packed = isinstance(x, PackedSequence)
        sizes = x.batch_sizes.tolist() if packed else [x.shape[1]] * x.shape[0]
        rows = x.data if packed else x.flatten(0, 1)
        if hx is None:
            layers = self.num_layers * (1 + self.bidirectional)
            h0 = rows.new_zeros(layers, sizes[0], self.proj_size or self.hidden_size)
            c0 = rows.new_zeros(layers, sizes[0], self.hidden_size)
        else:
            h0, c0 = _permute(hx, x.sorted_indices) if packed else hx

        h_n, c_n = [], []
        for layer in range(self.num_layers):
            outputs = []
            for suffix in ("", "_reverse")[: 1 + self.bidirectional]:
                state = h0[len(h_n)], c0[len(c_n)]
                output, h, c = self._direction(rows, sizes, state, f"_l{layer}{suffix}", reverse=bool(suffix))
                outputs.append(output)
                h_n.append(h)
                c_n.append(c)
            rows = torch.cat(outputs, 1) if self.bidirectional else outputs[0]
        state = torch.stack(h_n), torch.stack(c_n)
        if packed:
            return x._replace(data=rows), _permute(state, x.unsorted_indices)
        return rows.unflatten(0, x.shape[:2]), state

    def _direction(
        self, rows: Tensor, sizes: list[int], state: State, suffix: str, reverse: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One layer in one direction: rows [N, I] to output [N, P], h_n [B, P], c_n [B, H]."""
        w_ih, w_hh = getattr(self, f"weight_ih{suffix}"), getattr(self, f"weight_hh{suffix}")
        bias = getattr(self, f"bias_ih{suffix}") + getattr(self, f"bias_hh{suffix}")
        w_hr_t = getattr(self, f"weight_hr{suffix}").t() if self.proj_size else None
        w_hh_t = w_hh.t()
        gates_x = torch.addmm(bias, rows, w_ih.t()).split(sizes)
        h0, c0 = state
        if rows.dtype in (torch.float16, torch.bfloat16):
            c0 = c0.float()

        steps = range(len(sizes))
        outputs: list[Tensor] = [h0] * len(sizes)
        ended_h, ended_c = [], []  # final states of rows that are shorter than the batch, the shortest first
        h, c = (h0[: sizes[-1]], c0[: sizes[-1]]) if reverse else (h0, c0)
        for t in reversed(steps) if reverse else steps:
            live = sizes[t]
            if live < len(h):
                ended_h.append(h[live:])
                ended_c.append(c[live:])
                h, c = h[:live], c[:live]
            elif live > len(h):
                h, c = torch.cat((h, h0[len(h) : live])), torch.cat((c, c0[len(c) : live]))
            h, c = self.step(gates_x[t], h, c, w_hh_t)
            if w_hr_t is not None:
                h = h @ w_hr_t
            outputs[t] = h
        if ended_h:
            h, c = torch.cat((h, *reversed(ended_h))), torch.cat((c, *reversed(ended_c)))
        return torch.cat(outputs), h, c.to(rows.dtype)


def _permute(state: State, indices: Tensor | None) -> State:
    return state if indices is None else (state[0][:, indices], state[1][:, indices])


@functools.cache
def _compiled_step() -> Callable[[Tensor, Tensor, Tensor, Tensor], State]:
    return torch.compile(cell_step, dynamic=True)  # on first use: importing the compiler takes seconds


class CompiledLSTM(EagerLSTM):
    """The same loop around a step that torch.compile has fused; sizes are dynamic, so that it compiles few times."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.step = _compiled_step()


@dataclass(frozen=True)
class Peer:
    """A column.

    Attributes:
        make: takes nn.LSTM's arguments, returns a module with its parameters.
        about: what it is; where it does less than the others, what.
        missing: why it cannot run on a device, or "".
        limits: why it cannot run a workload, or "".
        complete: whether it is an LSTM; otherwise it is a part of one, and there is no result to check.
    """

    make: Callable[..., RNNBase]
    about: str
    missing: Callable[[torch.device], str] = lambda device: ""
    limits: Callable[[Workload], str] = lambda workload: ""
    complete: bool = True


def _no_gpu(device: torch.device) -> str:
    return "" if device.type == "cuda" else "needs a GPU"


def _no_triton(device: torch.device) -> str:
    return _no_gpu(device) or ("" if has_triton() else "triton is not installed")


def _no_package(name: str, device: torch.device) -> str:
    if reason := _no_gpu(device):
        return reason
    try:
        importlib.import_module(name)
    except Exception as problem:  # a package built for another torch fails in many ways
        return f"import {name} fails: {problem}"
    return ""


def _no_compiler(device: torch.device) -> str:
    if device.type != "cpu":
        return _no_triton(device)
    compilers = (os.environ.get("CXX"), "g++", "clang++", "c++", "cl")
    return "" if any(shutil.which(name) for name in compilers if name) else "torch.compile needs a C++ compiler"


def _one_layer(workload: Workload, *, dtypes: tuple[str, ...] = ("fp32", "bf16", "fp16", "fp64")) -> str:
    """The limits of `third_party.py`: one layer forward in time, dense, without projection or state."""
    obstacles = {
        "packed input": bool(workload.lengths),
        "more than one layer": workload.num_layers > 1,
        "two directions": workload.bidirectional,
        "projection": workload.proj_size > 0,
        "a carried state": workload.streaming,
        workload.dtype: workload.dtype not in dtypes,
    }
    return next((obstacle for obstacle, there in obstacles.items() if there), "")


_up_to_fp32 = functools.partial(_one_layer, dtypes=("fp32", "bf16", "fp16"))

PEERS: dict[str, Peer] = {
    STOCK: Peer(STOCK_LSTM, "stock: oneDNN or ATen's loop on a CPU, cuDNN or MIOpen on a GPU"),
    OURS: Peer(fastlstm.LSTM, 'fastlstm.LSTM(..., backend="auto")'),
    EAGER: Peer(EagerLSTM, "a loop over the steps in plain torch, one GEMM for all input products, autograd"),
    "compiled": Peer(CompiledLSTM, "the same loop, its step compiled by torch.compile", _no_compiler),
    "flashrnn": Peer(
        FlashRNN,
        "FlashRNN's fused CUDA kernel, plus the input product, which its own figures leave out",
        functools.partial(_no_package, "flashrnn"),
        _up_to_fp32,
    ),
    "torchrl": Peer(
        TorchRL,
        "TorchRL's Triton kernel; 16-bit workloads are cast to float32 around it, as it computes",
        functools.partial(_no_package, TORCHRL),
        _up_to_fp32,
    ),
    "haste": Peer(
        Haste,
        "haste's LSTM; its order of the weights is made in every call",
        functools.partial(_no_package, "haste_pytorch"),
        functools.partial(_one_layer, dtypes=("fp32",)),
    ),
    INPUT_PRODUCT: Peer(
        InputProduct,
        "only x W_ih^T + b and its gradients: take it off any column to see the recurrence alone",
        limits=_one_layer,
        complete=False,
    ),
    "fastlstm-reference": Peer(
        functools.partial(fastlstm.LSTM, backend="reference"), 'fastlstm.LSTM(..., backend="reference")'
    ),
    "fastlstm-triton": Peer(
        functools.partial(fastlstm.LSTM, backend="triton"), 'fastlstm.LSTM(..., backend="triton")', _no_triton
    ),
}
