"""A stock LSTM beside ours with the same weights, and the forms of input that both take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import fastlstm
from fastlstm.dispatch import has_triton, interpreting

# bound here: some tests rebind the names in torch.nn
STOCK_LSTM, STOCK_CELL = nn.LSTM, nn.LSTMCell
# what triton's kernels compute with CPU tensors
INTERPRETED = pytest.mark.skipif(not (interpreting() and has_triton()), reason="needs triton and TRITON_INTERPRET=1")
BACKENDS = ("torch", "reference", "auto", pytest.param("triton", marks=INTERPRETED))
I, H = 3, 4  # noqa: E741
LENGTHS = (3, 5, 1, 5)
OPTIONS = {
    "plain": {},
    "two layers, both directions": {"num_layers": 2, "bidirectional": True},
    "no bias": {"bias": False, "num_layers": 2},
    "projection": {"proj_size": 2, "num_layers": 2, "bidirectional": True},
}
FORMS = ("dense", "batch_first", "unbatched", "unbatched, batch_first", "sorted", "unsorted")


def make_input(form: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return a tensor, or for the forms sorted and unsorted a PackedSequence."""
    generator = torch.Generator().manual_seed(2)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    T, B = max(LENGTHS), len(LENGTHS)
    if form.startswith("unbatched"):
        return draw(T, I)
    if form in ("sorted", "unsorted"):
        lengths = sorted(LENGTHS, reverse=True) if form == "sorted" else LENGTHS
        return pack_sequence([draw(n, I) for n in lengths], enforce_sorted=form == "sorted")
    return draw(B, T, I) if form == "batch_first" else draw(T, B, I)


def make_states(lstm: nn.RNNBase, form: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return (h_0, c_0) for an input of that form."""
    generator = torch.Generator().manual_seed(3)
    rows = lstm.num_layers * (2 if lstm.bidirectional else 1)
    batch = () if form.startswith("unbatched") else (len(LENGTHS),)
    widths = (lstm.proj_size or lstm.hidden_size, lstm.hidden_size)
    return tuple(torch.randn(rows, *batch, width, generator=generator).to(dtype) for width in widths)


def make_pair(backend: str = "auto", dtype: torch.dtype = torch.float32, **options) -> tuple[Any, Any]:
    """Return a stock LSTM and ours, with the same weights."""
    torch.manual_seed(1)
    stock = STOCK_LSTM(I, H, dtype=dtype, **options)
    ours = fastlstm.LSTM(I, H, dtype=dtype, backend=backend, **options)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def assert_same(ours: nn.Module, stock: nn.Module, x: Any = None) -> None:
    """Assert that two LSTMs of one dtype compute the same."""
    x = make_input("dense") if x is None else x
    with torch.no_grad():
        (output, states), (expected, expected_states) = ours(x), stock(x)
    torch.testing.assert_close((output, *states), (expected, *expected_states))
