"""The columns: classes that take nn.LSTM's arguments, hold its parameters and return what it returns."""

from __future__ import annotations

import torch
from torch import Tensor

# column 1 is stock, looked up once, here: a later patch of torch.nn.LSTM cannot change what is compared with
from torch.nn import LSTM as STOCK_LSTM
from torch.nn import RNNBase
from torch.nn.utils.rnn import PackedSequence

import fastlstm

State = tuple[Tensor, Tensor]
Sequence = Tensor | PackedSequence

STOCK, OURS, EAGER = "torch.nn.LSTM", "fastlstm", "eager"


class EagerLSTM(RNNBase):
    """The loop a careful user writes in plain torch, differentiated by autograd.

    The input product of all steps is one GEMM, the recurrent one is one `addmm` a step, the cell state of 16-bit
    inputs is kept in float32, and a packed batch computes only its live rows.
    """

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
            i, f, g, o = torch.addmm(gates_x[t], h, w_hh_t).chunk(4, 1)
            c = torch.addcmul(f.sigmoid() * c, i.sigmoid(), g.tanh())
            h = (o.sigmoid() * c.tanh()).to(rows.dtype)
            if w_hr_t is not None:
                h = h @ w_hr_t
            outputs[t] = h
        if ended_h:
            h, c = torch.cat((h, *reversed(ended_h))), torch.cat((c, *reversed(ended_c)))
        return torch.cat(outputs), h, c.to(rows.dtype)


def _permute(state: State, indices: Tensor | None) -> State:
    return state if indices is None else (state[0][:, indices], state[1][:, indices])


COLUMNS: dict[str, type[RNNBase]] = {STOCK: STOCK_LSTM, OURS: fastlstm.LSTM, EAGER: EagerLSTM}
