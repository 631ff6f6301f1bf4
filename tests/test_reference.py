"""The oracle itself: float64 against nn.LSTM, gradcheck, and its hand-written backward against autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import LENGTHS, TOLERANCES, Layer, assert_close, make_layer_inputs, relative_error, run_lstm
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import PackedSequence

import fastlstm
from fastlstm import cpu_rules, reference
from fastlstm.autograd import lstm_forward, lstm_layer


# stock warns that oneDNN has no projection; ours must not
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("P", [0, 3])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize(("I", "H", "lengths"), [(4, 5, LENGTHS), (1, 4, (1,)), (7, 33, (1, 1, 1)), (3, 8, (9,))])
def test_float64_equals_stock(I, H, lengths, bias, P, D, packed):  # noqa: E741
    stock, x, hx = make_layer_inputs(I, H, P, D, bias, lengths, packed)
    assert_close(run_lstm(Layer(stock), x, hx), run_lstm(stock, x, hx), dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize(("D", "P"), [(1, 0), (2, 5)])
def test_other_dtypes_are_as_good_as_stock(dtype, packed, D, P):
    stock, x, hx = make_layer_inputs(12, 20, P, D, lengths=(15, 9, 9, 3), packed=packed)
    truth = run_lstm(stock, x, hx)
    hx = tuple(state.to(dtype) for state in hx)
    x = x._replace(data=x.data.to(dtype)) if isinstance(x, PackedSequence) else x.to(dtype)
    assert_close(run_lstm(Layer(stock).to(dtype), x, hx), truth, run_lstm(stock.to(dtype), x, hx), dtype=dtype)


def flat_inputs(D, P, bias, packed, lengths=(3, 2, 2), I=3, H=2):  # noqa: E741
    stock, x, hx = make_layer_inputs(I, H, P, D, bias, lengths, packed)
    rows = (x.data if isinstance(x, PackedSequence) else x).reshape(-1, I)
    batch_sizes = x.batch_sizes if isinstance(x, PackedSequence) else None
    tensors = [rows, *hx, *stock.parameters()]

    def layer(x, h0, c0, *weights):
        return lstm_layer(x, h0, c0, list(weights), batch_sizes, "reference")

    return layer, [tensor.detach().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize(("D", "P", "bias"), [(1, 0, True), (2, 0, True), (1, 1, False), (2, 1, True)])
def test_gradcheck(D, P, bias, packed):
    layer, inputs = flat_inputs(D, P, bias, packed)
    assert torch.autograd.gradcheck(layer, inputs, fast_mode=False)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize(("D", "P", "bias"), [(1, 0, True), (2, 1, False)])
def test_gradgradcheck(D, P, bias, packed):
    layer, inputs = flat_inputs(D, P, bias, packed, lengths=(2, 1), I=1)
    assert torch.autograd.gradgradcheck(layer, inputs, fast_mode=False)


def test_double_backward_counts_each_path_once():
    """h0 computed from x: the path through h0 belongs to the caller's graph, not to this layer's."""
    layer, (x, _, c0, *weights) = flat_inputs(1, 0, True, False)

    def loss(x):
        return layer(x, x[:3, :2].unsqueeze(0), c0, *weights)[0].square().sum()

    assert torch.autograd.gradgradcheck(loss, [x])


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize(("D", "P"), [(1, 0), (2, 0), (2, 3)])
def test_backward_equals_autograd_of_the_differentiable_form(D, P, packed):
    torch.manual_seed(2)
    B, H = 3, 5
    batch_sizes = torch.tensor([3, 3, 2, 1]) if packed else None
    N = 9 if packed else 12
    gates_x = torch.randn(N, D * 4 * H, dtype=torch.float64, requires_grad=True)
    h0 = torch.randn(D, B, P or H, dtype=torch.float64)
    c0 = torch.randn(D, B, H, dtype=torch.float64, requires_grad=True)
    w_hh = torch.randn(D, 4 * H, P or H, dtype=torch.float64)
    w_hr = torch.randn(D, P, H, dtype=torch.float64) if P else None

    expected = reference.lstm_differentiable(gates_x, h0, c0, w_hh, w_hr, batch_sizes)
    *results, gates, cells = reference.lstm_forward(
        gates_x.detach().clone(), h0, c0.detach(), w_hh, w_hr, batch_sizes, True
    )
    names = ("output", "h_n", "c_n")
    assert_close(dict(zip(names, results, strict=True)), dict(zip(names, expected, strict=True)), dtype=torch.float64)

    d_output, dh_n, dc_n = cotangents = tuple(torch.randn_like(value) for value in expected)
    d_gates_x, dc0 = torch.autograd.grad(expected, (gates_x, c0), cotangents)
    got = reference.lstm_backward(d_output, dh_n, dc_n, gates, cells, c0.detach(), w_hh, w_hr, batch_sizes)[:2]
    assert_close({"dgates": got[0], "dc0": got[1]}, {"dgates": d_gates_x, "dc0": dc0}, dtype=torch.float64)


def test_saved_tensors_are_the_activated_gates_and_cells():
    H = 2
    gates_x = torch.tensor([[0.1, -0.2, 0.3, 0.4, -0.5, 0.6, 0.7, -0.8]], dtype=torch.float64)
    h0, c0 = torch.zeros(1, 1, H, dtype=torch.float64), torch.tensor([[[0.5, -1.5]]], dtype=torch.float64)
    w_hh = torch.zeros(1, 4 * H, H, dtype=torch.float64)
    output, _, c_n, gates, cells = reference.lstm_forward(gates_x.clone(), h0, c0, w_hh, None, None, True)
    i, f, o = gates_x[:, :2].sigmoid(), gates_x[:, 2:4].sigmoid(), gates_x[:, 6:].sigmoid()
    g = gates_x[:, 4:6].tanh()
    torch.testing.assert_close(gates, torch.cat((i, f, g, o), 1), rtol=0, atol=1e-15)
    torch.testing.assert_close(cells, f * c0[0] + i * g, rtol=0, atol=1e-15)
    torch.testing.assert_close(output, o * cells.tanh(), rtol=0, atol=1e-15)
    assert torch.equal(c_n[0], cells)


@pytest.mark.parametrize("sizes", [None, [3, 2, 1]], ids=["dense", "packed"])
@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_without_save_the_results_are_the_same_and_nothing_is_kept(dtype, sizes):
    torch.manual_seed(3)
    args = (torch.randn(6, 40), torch.randn(2, 3, 5), torch.randn(2, 3, 5), torch.randn(2, 20, 5))
    gates_x, h0, c0, w_hh = (tensor.to(dtype) for tensor in args)
    batch_sizes = None if sizes is None else torch.tensor(sizes)
    saving = reference.lstm_forward(gates_x.clone(), h0, c0, w_hh, None, batch_sizes, True)
    saving_nothing = reference.lstm_forward(gates_x.clone(), h0, c0, w_hh, None, batch_sizes, False)
    for kept, result in zip(saving[:3], saving_nothing[:3], strict=True):
        assert torch.equal(kept, result)
    assert [t.numel() for t in saving_nothing[3:]] == [0, 0]
    assert saving[3].dtype == dtype
    assert saving[4].dtype == reference.accumulation_dtype(dtype)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("one_product", [False, True])
@pytest.mark.parametrize(
    ("I", "P", "D", "bias"), [(5, 0, 1, True), (3, 0, 2, False), (9, 5, 2, True), (70, 0, 1, True)], ids=str
)
def test_inference(I, P, D, bias, one_product, packed, dtype, monkeypatch):  # noqa: E741
    """Right by one product a step, and by the input GEMM."""
    monkeypatch.setattr(cpu_rules, "one_product_pays", lambda *_: one_product)
    stock, x, hx = make_layer_inputs(I, 13, P, D, bias, lengths=(9, 7, 7, 4, 1), packed=packed)
    calls = []
    infer = reference.lstm_infer
    monkeypatch.setattr(reference, "lstm_infer", lambda *given: (calls.append(given), infer(*given))[1])

    def results(network, dtype):
        states = tuple(state.transpose(1, 2).contiguous().transpose(1, 2).to(dtype) for state in hx)
        given = x._replace(data=x.data.to(dtype)) if isinstance(x, PackedSequence) else x.to(dtype)
        output, (h_n, c_n) = network.to(dtype)(given, states)
        rows = output.data if isinstance(output, PackedSequence) else output
        return {"output": rows, "h_n": h_n, "c_n": c_n}

    with torch.no_grad():
        truth = results(stock, torch.float64)
        got = results(Layer(stock), dtype)
        assert_close(got, truth, results(stock, dtype), dtype=dtype)
    assert len(calls) == one_product
    assert all(tensor.is_contiguous() for tensor in got.values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sizes", [None, [5, 5, 4, 4]], ids=["dense", "packed"])
def test_the_op_keeps_its_contract_in_inference(sizes, dtype, monkeypatch):
    monkeypatch.setattr(cpu_rules, "one_product_pays", lambda *_: True)
    batch_sizes = None if sizes is None else torch.tensor(sizes)
    x = torch.randn(20 if sizes is None else 18, 3, dtype=dtype)
    states = torch.randn(2, 1, 5, 6, dtype=dtype)
    weights = [torch.randn(shape, dtype=dtype) for shape in ((24, 3), (24, 6), (24,), (24,))]
    torch.library.opcheck(lstm_forward, (x, *states, weights, batch_sizes, False, False, "reference", False))


def test_who_looks_on_sees_one_op():
    lstm = fastlstm.LSTM(3, 6, backend="reference")
    with torch.no_grad():
        graph = make_fx(lambda x: lstm(x)[0])(torch.randn(4, 5, 3)).graph
    assert [str(node.target) for node in graph.nodes].count("fastlstm.lstm_forward.default") == 1


@pytest.mark.parametrize("sizes", [None, [4, 4, 2, 2, 2, 1], [1] * 6], ids=["dense", "packed", "one_row"])
@pytest.mark.parametrize("P", [0, 3])
@pytest.mark.parametrize("steps_at_once", [1, 2, 3])
def test_blocks_of_steps_change_nothing(steps_at_once, P, sizes, monkeypatch):
    """Rows that end, and begin, inside a block and between two; both directions."""
    torch.manual_seed(5)
    H = 5
    N, B = (24, 4) if sizes is None else (sum(sizes), sizes[0])
    shapes = [(N, 8 * H), (2, B, P or H), (2, B, H), (2, 4 * H, P or H)]
    gates_x, h0, c0, w_hh = (torch.randn(shape, dtype=torch.bfloat16) for shape in shapes)
    w_hr = torch.randn(2, P, H, dtype=torch.bfloat16) if P else None
    batch_sizes = None if sizes is None else torch.tensor(sizes)
    cut = [list(reference._blocks([B] * 6 if sizes is None else sizes, 1))]

    def run():
        results = reference.lstm_forward(gates_x.clone(), h0, c0, w_hh, w_hr, batch_sizes, True)
        return [*results, *reference.lstm_backward(*results, c0, w_hh, w_hr, batch_sizes)]

    whole = run()
    blocks = reference._blocks
    monkeypatch.setattr(reference, "_BLOCK_BYTES", steps_at_once * B)
    monkeypatch.setattr(reference, "_blocks", lambda sizes, row_bytes: cut.append(blocks(sizes, 1)) or cut[-1])
    assert all(map(torch.equal, run(), whole))
    assert min(map(len, cut[1:])) > len(cut[0]) == 1


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_complex_numbers(backend):
    options: dict[str, Any] = {"bidirectional": True, "dtype": torch.complex128}
    ours, stock = fastlstm.LSTM(2, 3, **options, backend=backend), torch.nn.LSTM(2, 3, **options)
    stock.load_state_dict(ours.state_dict())
    x = torch.randn(12, 2, 2, dtype=torch.complex128)
    torch.testing.assert_close(run_lstm(ours, x), run_lstm(stock, x), atol=1e-12, rtol=1e-12)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, for its jvp
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_no_rows_in_plain_ops(backend):
    ours, stock = fastlstm.LSTM(2, 3, bidirectional=True, backend=backend), torch.nn.LSTM(2, 3, bidirectional=True)
    x = torch.empty(5, 0, 2)
    for lstm in (ours, stock):
        assert torch.func.grad(lambda x, lstm=lstm: lstm(x)[0].sum())(x).shape == x.shape
        results, tangents = torch.func.jvp(lstm, (x,), (x,))[:2]
        assert results[0].shape == tangents[0].shape == (5, 0, 6)
        given = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(lstm(given)[0].sum(), given, create_graph=True)
        assert dx.shape == x.shape


@pytest.mark.parametrize("magnitude", [100.0, float("inf")])
def test_saturated_gates_are_finite(magnitude):
    gates_x = torch.tensor([[magnitude, -magnitude, magnitude, magnitude], [-magnitude] * 4])
    zeros, w_hh = torch.zeros(1, 1, 1), torch.ones(1, 4, 1)
    output, h_n, c_n, gates, cells = reference.lstm_forward(gates_x, zeros, zeros, w_hh, None, None, True)
    dgates, dc0 = reference.lstm_backward(
        torch.ones(2, 1), torch.ones(1, 1, 1), torch.ones(1, 1, 1), gates, cells, zeros, w_hh, None, None
    )[:2]
    for value in (output, h_n, c_n, gates, cells, dgates, dc0):
        assert value.isfinite().all()
    assert gates[0].tolist() == pytest.approx([1, 0, 1, 1], abs=1e-30)


def test_uninitialised_memory_is_nan():
    assert torch.empty(3).isnan().all()
    assert torch.ones(3).new_empty(3).isnan().all()


def test_assert_close_notices():
    """The suite's own judge: a wrong value, a NaN, a missing name and a wrong shape are all seen."""
    truth = {"output": torch.ones(3, dtype=torch.float64)}
    assert_close({"output": torch.ones(3)}, truth, dtype=torch.float32)
    for wrong in (torch.tensor([1, 1, 1 + 1e-4]), torch.tensor([1, 1, float("nan")]), torch.ones(4)):
        with pytest.raises(AssertionError, match="output"):
            assert_close({"output": wrong}, truth, dtype=torch.float32)
    with pytest.raises(AssertionError, match="names differ"):
        assert_close({}, truth, dtype=torch.float32)
    assert relative_error(torch.tensor([33.0]), torch.tensor([30.0])) == pytest.approx(0.1)
