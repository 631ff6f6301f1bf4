"""A layer through oneDNN's chunks of steps, and how to have it cut."""

from __future__ import annotations

import torch
from helpers import Layer, make_layer_inputs
from torch.nn.utils.rnn import PackedSequence

from fastlstm import cpu

# _ROWS_PER_CUT, _CHUNK_BYTES: what makes the chunks what their names say
CUTS = {"one chunk": (1e9, 1 << 40), "a chunk a run": (0, 1 << 40), "within runs": (1e9, 0), "some": (9, 1 << 40)}
LENGTHS = (21, 20, 20, 13, 7, 7, 1)


class Chunked(Layer):
    """One layer through `cpu.lstm_layer`."""

    def run(self, data, hx, batch_sizes):
        rows = data.reshape(-1, data.shape[-1])
        output, h_n, c_n = cpu.lstm_layer(rows, *hx, list(self.parameters()), batch_sizes)
        return output.reshape(*data.shape[:-1], -1), (h_n, c_n)


def make_packed(lengths=LENGTHS, **sizes):
    stock, x, hx = make_layer_inputs(**sizes, lengths=lengths, packed=True, dtype=torch.float32)
    assert isinstance(x, PackedSequence)
    return stock, x, hx
