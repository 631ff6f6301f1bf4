"""A single step on a CPU without gradients, which is one of torch's cells a layer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import assert_close
from torch.nn.utils.rnn import pack_sequence

import fastlstm
from fastlstm import cpu_rules

pytestmark = pytest.mark.skipif(not cpu_rules.onednn_has(torch.float32), reason="needs oneDNN")
NEEDS_BFLOAT16 = pytest.mark.skipif(not cpu_rules.onednn_has(torch.bfloat16), reason="needs a CPU with bfloat16")


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=NEEDS_BFLOAT16)], ids=str)
@pytest.mark.parametrize("form", ["dense", "batch_first", "unbatched", "packed"])
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"num_layers": 2, "bidirectional": True}, {"num_layers": 3, "dropout": 0.5}],
    ids=["plain", "no bias", "both directions", "dropout"],
)
def test_one_step_without_grad_is_a_cell(options, form, dtype):
    torch.manual_seed(3)
    stock = torch.nn.LSTM(5, 6, **options, batch_first=form == "batch_first", dtype=dtype)
    ours = fastlstm.LSTM(5, 6, **options, batch_first=form == "batch_first", dtype=dtype)
    ours.load_state_dict(stock.state_dict())
    truth = copy.deepcopy(stock).double()
    x: Any = torch.randn(
        {"dense": (1, 4, 5), "batch_first": (4, 1, 5), "unbatched": (1, 5)}.get(form, (4, 5)), dtype=dtype
    )
    if form == "packed":
        x = pack_sequence([row.unsqueeze(0) for row in x])
    rows = stock.num_layers * (2 if stock.bidirectional else 1)
    batch = () if form == "unbatched" else (4,)
    hx: Any = tuple(torch.randn(2, rows, *batch, 6, dtype=dtype))

    def results(network: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(4)  # dropout draws the same
        output, (h_n, c_n) = network(
            x.to(network.weight_hh_l0.dtype), tuple(state.to(network.weight_hh_l0.dtype) for state in hx)
        )
        return {"output": output.data if form == "packed" else output, "h_n": h_n, "c_n": c_n}

    with torch.no_grad():
        decision = fastlstm.explain(ours, x, hx)
        assert (decision.backend, decision.regime) == ("torch", "step")
        assert_close(results(ours), results(truth), results(stock), dtype=dtype)
    assert fastlstm.explain(ours, x, hx).regime == "stock"


def test_one_step_carried_on_is_the_whole_sequence():
    lstm, x = fastlstm.LSTM(5, 6, num_layers=2), torch.randn(7, 2, 5)
    states, outputs = None, []
    with torch.no_grad():
        for x_t in x.split(1):
            output, states = lstm(x_t, states)
            outputs.append(output)
        torch.testing.assert_close(torch.cat(outputs), lstm(x)[0])
