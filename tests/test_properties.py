"""Hypothesis draws shapes and options: ours is stock's LSTM, outputs and every gradient."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import assert_close, run_lstm
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import INTERPRETED
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import fastlstm

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])


@st.composite
def networks(draw, max_layers: int = 3) -> dict[str, Any]:
    """Draw the arguments of an LSTM."""
    hidden_size = draw(st.integers(1, 9))
    return {
        "input_size": draw(st.integers(1, 6)),
        "hidden_size": hidden_size,
        "num_layers": draw(st.integers(1, max_layers)),
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "bidirectional": draw(st.booleans()),
        "proj_size": draw(st.sampled_from([0, 0, hidden_size // 2])),
    }


@st.composite
def batches(draw):
    """Draw how an input is given, and the length of each row."""
    form = draw(st.sampled_from(["dense", "unbatched", "packed"]))
    if form == "packed":
        return form, draw(st.lists(st.integers(1, 7), min_size=1, max_size=5))
    return form, [draw(st.integers(1, 7))] * (1 if form == "unbatched" else draw(st.integers(1, 5)))


def check(backend, network, batch, dtype, with_states, training, seed):
    form, lengths = batch
    torch.manual_seed(seed)
    dropout: dict[str, Any] = {"dropout": 0.3} if network["num_layers"] > 1 and dtype != torch.bfloat16 else {}
    stock = nn.LSTM(**network, **dropout, dtype=dtype).train(training)
    ours = fastlstm.LSTM(**network, **dropout, dtype=dtype, backend=backend).train(training)
    ours.load_state_dict(stock.state_dict())
    T, B, I = max(lengths), len(lengths), network["input_size"]  # noqa: E741
    rows = network["num_layers"] * (1 + network["bidirectional"])
    widths = (network["proj_size"] or network["hidden_size"], network["hidden_size"])
    if form == "packed":
        x = pack_sequence([torch.randn(n, I, dtype=dtype) for n in lengths], enforce_sorted=False)
        shapes = [(rows, B, width) for width in widths]
    elif form == "unbatched":
        x = torch.randn(T, I, dtype=dtype)
        shapes = [(rows, width) for width in widths]
    else:
        x = torch.randn(*((B, T) if network["batch_first"] else (T, B)), I, dtype=dtype)
        shapes = [(rows, B, width) for width in widths]
    hx = tuple(torch.randn(shape, dtype=dtype) for shape in shapes) if with_states else None

    def run(lstm, x, hx):
        torch.manual_seed(seed)
        return run_lstm(lstm, x, hx)

    expected = run(stock, x, hx)
    if dropout and training:  # another dtype draws other numbers, so the truth is stock's result
        assert_close(run(ours, x, hx), expected, dtype=dtype)
    else:
        wide = None if hx is None else tuple(state.double() for state in hx)
        truth = run(copy.deepcopy(stock).double(), x.double(), wide)
        assert_close(run(ours, x, hx), truth, expected, dtype=dtype)


@pytest.mark.parametrize("backend", ["auto", "reference", "torch"])
@INTERPRETED
@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(networks(), batches(), DTYPES, st.booleans(), st.booleans(), st.integers(0, 2**16))
def test_module_is_stock(backend, network, batch, dtype, with_states, training, seed):
    check(backend, network, batch, dtype, with_states, training, seed)


@INTERPRETED
@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(networks(max_layers=2), batches(), st.booleans(), st.booleans(), st.integers(0, 2**16))
def test_interpreted_kernels_are_stock(network, batch, with_states, training, seed):
    check("triton", network, batch, torch.float32, with_states, training, seed)
