"""Packed batches and projections through oneDNN: right to stock's own error, and well routed."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from chunked import CUTS, LENGTHS, Chunked, make_packed
from helpers import assert_close, make_layer_inputs, run_lstm
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fastlstm
from fastlstm import cpu, cpu_rules, functional
from fastlstm.problem import Device

pytestmark = pytest.mark.skipif(not cpu_rules.onednn_has(torch.float32), reason="needs oneDNN")
NEEDS_BFLOAT16 = pytest.mark.skipif(not cpu_rules.onednn_has(torch.bfloat16), reason="needs a CPU with bfloat16")
# widened where this machine's oneDNN has no layer in them, as it never has in float16
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def in_float64(x, hx):
    data = x._replace(data=x.data.double()) if isinstance(x, PackedSequence) else x.double()
    return data, tuple(state.double() for state in hx)


def assert_true(ours: nn.Module, stock: nn.LSTM, x, hx, dtype) -> None:
    """Assert that `ours` is as near to stock in float64 as stock in `dtype` is, or nearly."""
    truth = run_lstm(copy.deepcopy(stock).double(), *in_float64(x, hx))
    assert_close(run_lstm(ours, x, hx), truth, run_lstm(stock, x, hx), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("name", CUTS)
def test_agrees_with_float64(name, D, dtype, cut):
    cut(name)
    for bias in (True, False):
        stock, x, hx = make_layer_inputs(I=5, H=19, D=D, bias=bias, lengths=LENGTHS, packed=True, dtype=dtype)
        assert_true(Chunked(stock), stock, x, hx, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [(6, 6, 6), (1,), (1, 1, 1), (9,), tuple(range(40, 0, -1))], ids=len)
def test_agrees_for_any_lengths(lengths, dtype):
    stock, x, hx = make_layer_inputs(I=3, H=8, D=2, lengths=lengths, packed=True, dtype=dtype)
    assert_true(Chunked(stock), stock, x, hx, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "dense"])
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_projection_leaves_the_recurrence(packed, D, dtype):
    stock, x, hx = make_layer_inputs(I=5, H=12, P=5, D=D, lengths=LENGTHS, packed=packed, dtype=dtype)
    assert_true(Chunked(stock), stock, x, hx, dtype)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_projection_from_zero_states_has_no_columns_for_them(monkeypatch):
    stock, x, hx = make_packed(I=5, H=12, P=5, D=2)
    zeros = torch.zeros_like(hx[0]), torch.zeros_like(hx[1])
    widths = []
    infer = cpu._infer
    monkeypatch.setattr(cpu, "_infer", lambda x, *given: (widths.append(x.shape[1]), infer(x, *given))[1])
    with torch.no_grad():
        for states in (zeros, hx):
            (got, got_states), (expected, expected_states) = Chunked(stock)(x, states), stock(x, states)
            torch.testing.assert_close((got.data, *got_states), (expected.data, *expected_states))
    assert widths == [5, 5 + 2 * 5]


class Widths(TorchDispatchMode):
    """Notes how many inputs oneDNN's layers are given."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "mkldnn_rnn_layer" in func.name():
            self.seen.add(args[0].shape[-1])
        return func(*args, **(kwargs or {}))


@NEEDS_BFLOAT16
@pytest.mark.parametrize("I", [4, 5])
def test_onednn_is_given_pairs_of_bfloat16(I, cut):  # noqa: E741
    cut("a chunk a run")
    stock, x, hx = make_layer_inputs(I=I, H=8, lengths=LENGTHS, packed=True, dtype=torch.bfloat16)
    with Widths() as widths:
        run_lstm(Chunked(stock), x, hx)
        with torch.no_grad():
            Chunked(stock)(x, hx)
    assert widths.seen == {6}


@NEEDS_BFLOAT16
@pytest.mark.parametrize(
    "options", [{}, {"batch_first": True, "bias": False}, {"num_layers": 2, "bidirectional": True}], ids=str
)
def test_an_odd_number_of_inputs_on_amx(options, monkeypatch):
    monkeypatch.setattr(functional, "device_of", lambda _: Device("cpu", "amx", "CPU"))
    torch.manual_seed(5)
    stock = nn.LSTM(65, 48, **options, dtype=torch.bfloat16)
    ours = fastlstm.LSTM(65, 48, **options, dtype=torch.bfloat16)
    ours.load_state_dict(stock.state_dict())
    x = torch.randn((80, 72, 65) if stock.batch_first else (72, 80, 65), dtype=torch.bfloat16)

    def results(network: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
        output, (h_n, c_n) = network(x)
        return {"output": output, "h_n": h_n, "c_n": c_n}

    with torch.no_grad():
        assert fastlstm.explain(ours, x).regime == "chunks"
        truth = results(copy.deepcopy(stock).double(), x.double())
        got = results(ours, x)
        assert_close(got, truth, results(stock, x), dtype=torch.bfloat16)
    assert got["output"]._is_view() == stock.batch_first  # as stock's


def test_the_cell_state_is_not_rounded_between_chunks(cut):
    # c grows by about 1e-3 a step, less than half a unit in its last place in bfloat16 once it has passed 1
    H, T = 4, 400
    weights = [torch.zeros(4 * H, 1), torch.zeros(4 * H, H), torch.tensor([-7.0, 20, 20, 20]).repeat_interleave(H)]
    w_ih, w_hh, b_ih = (weight.bfloat16() for weight in weights)
    x = torch.zeros(T + 1, 1, dtype=torch.bfloat16)
    states = torch.zeros(1, 2, H, dtype=torch.bfloat16), torch.ones(1, 2, H, dtype=torch.bfloat16)
    batch_sizes = torch.ones(T, dtype=torch.int64)
    batch_sizes[0] = 2
    for name in ("one chunk", "within runs"):
        cut(name)
        _, _, c_n = cpu.lstm_layer(x, *states, [w_ih, w_hh, b_ih, torch.zeros_like(b_ih)], batch_sizes)
        torch.testing.assert_close(c_n[0, 0], torch.full((H,), 1.36), rtol=0.01, atol=0, check_dtype=False)


def test_rows_do_not_leak(cut):
    cut("one chunk")
    stock, x, hx = make_packed(I=5, H=7, D=2)
    layer = Chunked(stock)
    clean = layer(x, hx)[0].data.detach()
    row = torch.cat([torch.arange(n) for n in x.batch_sizes.tolist()])
    for bad in (float("nan"), float("inf"), 1e6):
        data = x.data.clone()
        data[row == 3, 0] = bad
        output, (h_n, c_n) = layer(x._replace(data=data), hx)
        assert torch.equal(output.data[row != 3], clean[row != 3])
        expected, (h_expected, c_expected) = stock(x._replace(data=data), hx)
        for got, want in ((output.data, expected.data), (h_n, h_expected), (c_n, c_expected)):
            torch.testing.assert_close(got, want, equal_nan=True)


def test_dead_rows_keep_their_state_against_any_bias(cut):
    cut("one chunk")
    stock, x, hx = make_packed(I=5, H=7, D=2)
    with torch.no_grad():
        dict(stock.named_parameters())["bias_ih_l0"].fill_(1e6)
        torch.testing.assert_close(Chunked(stock)(x, hx)[1], stock(x, hx)[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("enforce_sorted", [True, False], ids=["sorted", "unsorted"])
def test_a_network_agrees_with_stock(enforce_sorted, training, dtype, monkeypatch):
    torch.manual_seed(0)
    stock = nn.LSTM(6, 9, num_layers=2, bidirectional=True, dropout=0.4, dtype=dtype).train(training)
    ours = fastlstm.LSTM(6, 9, num_layers=2, bidirectional=True, dropout=0.4, dtype=dtype).train(training)
    ours.load_state_dict(stock.state_dict())
    lengths = LENGTHS if enforce_sorted else LENGTHS[::-1]
    x = pack_sequence([torch.randn(n, 6, dtype=dtype) for n in lengths], enforce_sorted=enforce_sorted)
    hx = tuple(torch.randn(4, len(lengths), 9, dtype=dtype) for _ in range(2))
    decide = functional._decision
    monkeypatch.setattr(
        functional, "_decision", lambda *given: replace(decide(*given), backend="onednn", regime="chunks")
    )

    def run(lstm, *inputs):
        torch.manual_seed(3)  # equal seeds drop equal elements, whatever the dtype
        return run_lstm(lstm, *inputs)

    truth = run(copy.deepcopy(stock).double(), *in_float64(x, hx))
    assert_close(run(ours, x, hx), truth, run(stock, x, hx), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "dense"])
def test_an_output_changed_in_place_is_missed(packed, dtype):
    stock, x, hx = make_layer_inputs(I=3, H=4, D=1, lengths=LENGTHS, packed=packed, dtype=dtype)
    batch_sizes = x.batch_sizes if isinstance(x, PackedSequence) else None
    output, *_ = cpu.lstm_layer(x.data.requires_grad_(), *hx, list(Chunked(stock).parameters()), batch_sizes)
    assert output.shape[:-1] == x.data.shape[:-1]
    assert not output._is_view()
    loss = output.float().square().sum()
    output.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_gradients_through_a_projection_are_contiguous():
    stock, x, hx = make_packed(I=5, H=12, P=5, D=2)
    weights = list(Chunked(stock).parameters())
    output, *_ = cpu.lstm_layer(x.data.requires_grad_(), *hx, weights, x.batch_sizes)
    leaves = [x.data, *weights]
    assert all(gradient.is_contiguous() for gradient in torch.autograd.grad(output.sum(), leaves))


def test_a_decision_knows_whether_onednn_is_on(monkeypatch):
    lstm = fastlstm.LSTM(16, 16)
    x = pack_sequence([torch.randn(n, 16) for n in (100, 90)])
    for enabled in (True, False, True):
        monkeypatch.setattr(torch._C, "_get_mkldnn_enabled", lambda enabled=enabled: enabled)
        assert (fastlstm.explain(lstm, x).backend == "onednn") == enabled


@pytest.mark.parametrize("mode", [FakeTensorMode, FlopCounterMode])
def test_who_looks_on_sees_no_chunks(mode):
    with mode(**({"display": False} if mode is FlopCounterMode else {})):
        lstm = fastlstm.LSTM(64, 64, dtype=torch.float16)
        x = torch.randn(400, 8, 64, dtype=torch.float16)
        assert fastlstm.explain(lstm, x).backend != "onednn"
        assert lstm(x)[0].shape == (400, 8, 64)


@pytest.mark.parametrize("wanted", [("x",), ("h0",), ("c0",), ("weight_hh_l0",), ("bias_ih_l0_reverse", "c0")], ids=str)
def test_only_what_requires_grad_gets_one(wanted):
    stock, x, hx = make_packed(I=3, H=4, D=2)
    gradients = []
    for layer in (stock, Chunked(stock)):
        leaves = {"x": x.data.clone(), "h0": hx[0].clone(), "c0": hx[1].clone(), **dict(layer.named_parameters())}
        for name, leaf in leaves.items():
            leaf.requires_grad_(name in wanted)
        output, (h_n, c_n) = layer(x._replace(data=leaves["x"]), (leaves["h0"], leaves["c0"]))
        (output.data.sum() + (h_n * c_n).sum()).backward()
        gradients.append({name: leaf.grad for name, leaf in leaves.items()})
    expected, got = gradients
    for name, gradient in got.items():
        assert (gradient is not None) == (name in wanted)
        if gradient is not None:
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", ["output", "h_n", "c_n"])
def test_one_result_alone(part):
    stock, x, hx = make_packed(I=3, H=4, D=2)
    gradients = []
    for layer in (stock, Chunked(stock)):
        output, (h_n, c_n) = layer(x, hx)
        {"output": output.data, "h_n": h_n, "c_n": c_n}[part].square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in layer.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


def test_the_graph_can_be_walked_twice_and_differentiated():
    stock, x, hx = make_packed(I=3, H=4, D=2, lengths=(7, 5, 2))
    seconds = []
    for layer in (stock, Chunked(stock)):
        data = x.data.clone().requires_grad_()
        output, (_, c_n) = layer(x._replace(data=data), hx)
        loss = output.data.square().sum() + c_n.pow(3).sum()
        once, twice = (torch.autograd.grad(loss, data, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(once, twice)
        (first,) = torch.autograd.grad(loss, data, create_graph=True)
        torch.testing.assert_close(first, once, rtol=1e-4, atol=1e-5)
        seconds.append(torch.autograd.grad(first.square().sum(), [data, *layer.parameters()]))
    torch.testing.assert_close(seconds[1], seconds[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("name", CUTS)
def test_without_a_backward_pass(name, D, dtype, cut):
    """However the input is gathered: here all at once, or, as it is wide, a few chunks at a time."""
    cut(name)
    for I, bias in ((5, True), (90, False)):  # noqa: E741
        stock, x, hx = make_layer_inputs(I=I, H=6, D=D, bias=bias, lengths=LENGTHS, packed=True, dtype=dtype)
        truth = run_lstm(copy.deepcopy(stock).double(), *in_float64(x, hx))
        with torch.no_grad():
            (output, (h_n, c_n)), (expected, states) = Chunked(stock)(x, hx), stock(x, hx)
        results = {"output": output.data, "h_n": h_n, "c_n": c_n}
        stocks = dict(zip(results, (expected.data, *states), strict=True))
        assert_close(results, {part: truth[part] for part in results}, stocks, dtype=dtype)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_equals_training_and_has_no_graph(mode):
    stock, x, hx = make_packed(I=3, H=4, D=2)
    layer = Chunked(stock)
    output, states = layer(x, hx)
    assert output.data.requires_grad
    with mode():
        bare_output, bare_states = layer(x, hx)
    assert not bare_output.data.requires_grad
    torch.testing.assert_close((bare_output.data, *bare_states), (output.data, *states))


@pytest.mark.parametrize(("name", "times"), [("one chunk", 0), ("a chunk a run", 2)])
def test_weights_are_laid_out_once_a_direction_for_many_chunks(name, times, cut, monkeypatch):
    cut(name)
    stock, x, hx = make_packed(I=3, H=19, D=2)
    calls = []
    lay_out = cpu._laid_out
    monkeypatch.setattr(cpu, "_laid_out", lambda *weights: (calls.append(weights), lay_out(*weights))[1])
    layer = Chunked(stock)
    layer(x, hx)
    assert not calls  # training takes them as they are
    with torch.no_grad():
        layer(x, hx)
    assert len(calls) == times


def test_several_gradients_at_once(cut):
    cut("some")
    stock, x, hx = make_packed(I=3, H=4, D=2)
    layer = Chunked(stock)
    inputs = [x.data.requires_grad_(), *layer.parameters()]
    output = layer(x, hx)[0].data
    cotangents = torch.randn(3, *output.shape)
    several = torch.autograd.grad(output, inputs, cotangents, is_grads_batched=True, retain_graph=True)
    for n, cotangent in enumerate(cotangents):
        one = torch.autograd.grad(output, inputs, cotangent, retain_graph=True)
        torch.testing.assert_close([gradients[n] for gradients in several], list(one))


def test_any_stride(cut):
    cut("a chunk a run")
    stock, x, hx = make_packed(I=3, H=19, D=2)
    layer = Chunked(stock)
    expected = run_lstm(layer, x, hx)
    for parameter in layer.parameters():
        parameter.data = parameter.data.t().contiguous().t()
    h0, c0 = (state.mT.contiguous().mT for state in hx)
    x = x._replace(data=x.data.mT.contiguous().mT)
    torch.testing.assert_close(run_lstm(layer, x, (h0, c0)), expected)
    with torch.no_grad():
        torch.testing.assert_close(layer(x, (h0, c0))[0].data, expected["output"])
