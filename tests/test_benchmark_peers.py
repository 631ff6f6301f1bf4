"""The columns that fastlstm is compared with are LSTMs, and say what they cannot do."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from benchmark_helpers import make_result
from helpers import assert_close, run_lstm
from torch.nn.utils.rnn import PackedSequence

from benchmarks.measure import run_workload
from benchmarks.peers import EAGER, INPUT_PRODUCT, OURS, PEERS, STOCK, STOCK_LSTM, EagerLSTM, Peer
from benchmarks.tables import tables
from benchmarks.workloads import Shape, Workload

CPU = torch.device("cpu")
THREE = {name: PEERS[name] for name in (STOCK, OURS, EAGER)}
TINY = Shape("tiny", 5, 4, 3, 6)
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


# in bfloat16 autograd sums its weight gradients over the steps in bfloat16: the benchmark may refuse it
@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("layers", "bidirectional", "proj"), [(1, False, 0), (2, True, 0), (2, True, 4)])
def test_eager_column_is_an_lstm(dtype, packed, layers, bidirectional, proj):
    shape = Shape("odd", 9, 7, 3, 5)
    workload = Workload(shape, dtype, True, "uniform" if packed else "", layers, bidirectional, proj)
    x = workload.make_input(CPU)
    stock = STOCK_LSTM(**workload.arguments, dtype=x.data.dtype)
    eager = EagerLSTM(**workload.arguments, dtype=x.data.dtype)
    eager.load_state_dict(stock.state_dict())
    directions = layers * (1 + bidirectional)
    hx = tuple(torch.randn(directions, shape.B, n, dtype=x.data.dtype) for n in (proj or shape.H, shape.H))

    oracle = STOCK_LSTM(**workload.arguments, dtype=torch.float64)
    oracle.load_state_dict(stock.state_dict())
    wide = x._replace(data=x.data.double()) if isinstance(x, PackedSequence) else x.double()
    truth = run_lstm(oracle, wide, tuple(state.double() for state in hx))
    assert_close(run_lstm(eager, x, hx), truth, run_lstm(stock, x, hx), dtype=x.data.dtype)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's compiler warns of torch's own code
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("name", [name for name, peer in PEERS.items() if peer.complete and name != STOCK])
def test_peer_is_an_lstm(name):
    """On a GPU, of every peer that is installed there."""
    device, peer = torch.device("cuda" if torch.cuda.is_available() else "cpu"), PEERS[name]
    if reason := peer.missing(device):
        pytest.skip(reason)
    workload = Workload(Shape("odd", 3, 16, 24, 32), "fp32", training=True)
    peers = {STOCK: PEERS[STOCK], name: peer}
    row = run_workload(workload, device, budget_s=0, min_rounds=1, peers=peers)
    assert row["columns"][name]["status"].startswith(("ok", "rough")), row["columns"][name]["status"]


def test_flashrnn_layout():
    """FlashRNN's own plain-torch backend runs on a CPU: gate order, layout and gradients of the adapter."""
    pytest.importorskip("flashrnn")
    from benchmarks.third_party import FlashRNN

    def make(*args, **kwargs):
        module = FlashRNN(*args, **kwargs)
        module.backend = "vanilla"
        return module

    workload = Workload(Shape("odd", 5, 3, 4, 6), "fp32", training=True)
    row = run_workload(workload, CPU, budget_s=0, min_rounds=1, peers={STOCK: PEERS[STOCK], "flashrnn": Peer(make, "")})
    assert row["columns"]["flashrnn"]["status"] == "ok"


def test_haste_layout(monkeypatch):
    """The adapter undoes haste's documented layout: transposed, gates in the order i, g, f, o."""

    class Layer(torch.nn.Module):
        def __init__(self, input_size, hidden_size):
            super().__init__()
            self.kernel = torch.nn.Parameter(torch.zeros(input_size, 4 * hidden_size))
            self.recurrent_kernel = torch.nn.Parameter(torch.zeros(hidden_size, 4 * hidden_size))
            self.bias = torch.nn.Parameter(torch.zeros(4 * hidden_size))

        def forward(self, x):
            h = c = x.new_zeros(x.shape[1], self.recurrent_kernel.shape[0])
            output = []
            for step in x:
                i, g, f, o = (step @ self.kernel + h @ self.recurrent_kernel + self.bias).chunk(4, 1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
                output.append(h)
            return torch.stack(output), (h.unsqueeze(0), c.unsqueeze(0))

    monkeypatch.setitem(sys.modules, "haste_pytorch", types.SimpleNamespace(LSTM=Layer))
    peers = {STOCK: PEERS[STOCK], "haste": PEERS["haste"]}
    row = run_workload(Workload(TINY, training=True), CPU, budget_s=0, min_rounds=1, peers=peers)
    assert row["columns"]["haste"]["status"] == "ok"


def test_columns_say_what_they_cannot_do(monkeypatch):
    peers = {**THREE, "haste": PEERS["haste"]}
    row = run_workload(Workload(TINY, lengths="uniform"), CPU, budget_s=0, min_rounds=1, peers=peers)
    assert row["columns"]["haste"]["status"] == "not supported: packed input"
    assert row["columns"]["haste"]["ms"] is None
    assert PEERS["haste"].limits(Workload(TINY, "bf16")) == "bf16"
    assert PEERS["flashrnn"].limits(Workload(TINY, "bf16")) == ""
    assert PEERS["haste"].missing(CPU) == PEERS["fastlstm-triton"].missing(CPU) == "needs a GPU"
    monkeypatch.setitem(sys.modules, "haste_pytorch", None)
    assert "import haste_pytorch fails" in PEERS["haste"].missing(torch.device("cuda"))


def test_input_product_is_taken_off():
    peers = {**THREE, INPUT_PRODUCT: PEERS[INPUT_PRODUCT]}
    row = run_workload(Workload(TINY, training=True), CPU, budget_s=0, min_rounds=3, peers=peers)
    assert row["columns"][INPUT_PRODUCT]["errors"] == {}
    row["columns"][STOCK]["ms"] = {"median": 7.0, "p20": 7.0, "p80": 7.0}
    row["columns"][INPUT_PRODUCT]["ms"] = {"median": 2.0, "p20": 2.0, "p80": 2.0}
    speed, alone = tables({**make_result(), "rows": [row]})
    assert not any(INPUT_PRODUCT in title for title in speed.header)
    assert alone.rows[0][alone.header.index(STOCK)].text == "1000.00"  # 5 ms over 5 steps, in microseconds
