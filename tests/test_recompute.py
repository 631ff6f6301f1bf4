"""recompute=True: backward makes again what it would have found saved: the same bits, or next to them in 16 bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_close, make_layer_inputs, run_lstm
from pairs import INTERPRETED
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

import fastlstm
from fastlstm import autograd, ops
from fastlstm.dispatch import interpreting

BACKENDS = ["reference", pytest.param("triton", marks=INTERPRETED)]
NETWORKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bidirectional": {"bidirectional": True, "num_layers": 2},
    "projection": {"proj_size": 4, "bidirectional": True},
    "no_bias": {"bias": False},
}
I, H = 5, 18  # noqa: E741
PACKED = pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
LOW = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])


@pytest.mark.parametrize(
    ("backend", "dtype", "network"),
    [
        *(
            ("reference", dtype, network)
            for dtype in (torch.float32, torch.float64, torch.bfloat16)
            for network in NETWORKS
        ),
        *(pytest.param("triton", torch.float32, network, marks=INTERPRETED) for network in NETWORKS),
        pytest.param("triton", torch.float16, "projection", marks=INTERPRETED),
        pytest.param("triton", torch.bfloat16, "projection", marks=INTERPRETED),
    ],
    ids=str,
)
@PACKED
def test_the_same_bits(backend, dtype, network, packed):
    """Where GEMMs would make other gates, forward runs again."""
    check_bits(backend, dtype, network, packed, torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or interpreting(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("dtype", "network"), [*((torch.float32, network) for network in NETWORKS), (torch.bfloat16, "projection")], ids=str
)
@PACKED
def test_the_same_bits_on_a_gpu(dtype, network, packed):
    check_bits("triton", dtype, network, packed, torch.device("cuda"))


def check_bits(backend: str, dtype: torch.dtype, network: str, packed: bool, device: torch.device) -> None:
    options: dict[str, Any] = {**NETWORKS[network], "dtype": dtype, "device": device, "backend": backend}
    saving, ours = fastlstm.LSTM(I, H, **options), fastlstm.LSTM(I, H, **options, recompute=True)
    ours.load_state_dict(saving.state_dict())
    layers = ours.num_layers * (2 if ours.bidirectional else 1)
    inputs: Any = make_layer_inputs(I, H, ours.proj_size, layers, packed=packed, dtype=dtype)
    x, hx = inputs[1].to(device), tuple(state.to(device) for state in inputs[2])
    results, expected = run_lstm(ours, x, hx), run_lstm(saving, x, hx)
    assert [name for name in expected if not torch.equal(results[name], expected[name])] == []


@PACKED
@pytest.mark.parametrize("network", ["plain", "bidirectional", "no_bias"])
@LOW
@INTERPRETED
def test_gradients(dtype, network, packed):
    options = NETWORKS[network]
    stock = torch.nn.LSTM(I, H, **options, dtype=dtype)
    truth = torch.nn.LSTM(I, H, **options, dtype=torch.float64)
    ours = fastlstm.LSTM(I, H, **options, dtype=dtype, backend="triton", recompute=True)
    for network in (truth, ours):
        network.load_state_dict(stock.state_dict())
    _, x, _ = make_layer_inputs(I, H, packed=packed, dtype=dtype)
    assert_close(run_lstm(ours, x), run_lstm(truth, x.to(torch.float64)), run_lstm(stock, x), dtype=dtype)


def layer_arguments(packed: bool, dtype: torch.dtype) -> tuple[Any, ...]:
    stock, x, (h0, c0) = make_layer_inputs(I, H, D=2, packed=packed, dtype=dtype)
    weights = [weight.detach() for weight in stock.parameters()]
    if isinstance(x, PackedSequence):
        return x.data, h0, c0, weights, x.batch_sizes
    return x.flatten(0, 1), h0, c0, weights, None


def units_apart(a: Tensor, b: Tensor) -> int:
    """Return how many values of the dtype lie between two tensors at most."""

    def ordered(tensor: Tensor) -> Tensor:
        bits = tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32).long()
        return torch.where(bits < 0, -(bits & (0x7FFF if tensor.element_size() == 2 else 0x7FFFFFFF)), bits)

    return int((ordered(a) - ordered(b)).abs().max())


@PACKED
@LOW
@INTERPRETED
def test_gates_are_at_most_one_unit_off(dtype, packed):
    x, h0, c0, weights, batch_sizes = layer_arguments(packed, dtype)
    output, _, _, gates, _ = autograd.lstm_forward(x, h0, c0, weights, batch_sizes, True, False, "triton", False)
    assert units_apart(autograd.lstm_gates(x, h0, output, weights, batch_sizes), gates) <= 1


@PACKED
def test_rows_in_pieces_give_the_same(packed, monkeypatch):
    x, h0, c0, weights, batch_sizes = layer_arguments(packed, torch.bfloat16)
    output = autograd.lstm_forward(x, h0, c0, weights, batch_sizes, True, False, "reference", False)[0]
    whole = autograd.lstm_gates(x, h0, output, weights, batch_sizes)
    monkeypatch.setattr(ops, "_WIDE_ELEMENTS", 3 * 4 * H)
    assert units_apart(autograd.lstm_gates(x, h0, output, weights, batch_sizes), whole) <= 1


@pytest.mark.parametrize(
    ("backend", "dtype", "cells"),
    [
        ("reference", torch.float32, 0),
        ("reference", torch.bfloat16, 0),
        pytest.param("triton", torch.float32, 0, marks=INTERPRETED),
        pytest.param("triton", torch.bfloat16, 9 * 4 * H * 4, marks=INTERPRETED),
    ],
    ids=str,
)
def test_what_is_kept(backend, dtype, cells):
    """Beside the input, the states and the output nothing, or the cells where GEMMs make the gates."""
    lstm = fastlstm.LSTM(I, H, recompute=True, dtype=dtype, backend=backend)
    x, kept = torch.randn(9, 4, I, dtype=dtype), {}
    hx = torch.randn(2, 1, 4, H, dtype=dtype).unbind()

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output, _ = lstm(x, hx)
    for held in (x, *hx, output, *lstm.parameters()):
        kept.pop(held.data_ptr(), None)
    assert sum(kept.values()) == cells


@PACKED
def test_the_op_keeps_its_contract(packed):
    x, h0, c0, weights, batch_sizes = layer_arguments(packed, torch.float32)
    tensors = [tensor.requires_grad_() for tensor in (x, h0, c0)]
    leaves = [weight.requires_grad_() for weight in weights]
    torch.library.opcheck(autograd.lstm_forward, (*tensors, leaves, batch_sizes, True, True, "reference", False))
    with torch.no_grad():
        output, *_ = autograd.lstm_forward(x, h0, c0, weights, batch_sizes, False, False, "reference", False)
    arguments = (x.detach(), h0.detach(), output, [weight.detach() for weight in weights], batch_sizes)
    torch.library.opcheck(autograd.lstm_gates, arguments)


def test_double_backward():
    lstm = fastlstm.LSTM(2, 3, recompute=True, dtype=torch.float64)
    x = torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: lstm(x)[0], x)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_compiled(backend):
    torch.compiler.reset()
    lstm = fastlstm.LSTM(I, H, dtype=torch.bfloat16, backend=backend, recompute=True)
    _, x, hx = make_layer_inputs(I, H, dtype=torch.bfloat16)
    compiled: Any = torch.compile(lstm, fullgraph=True, backend="aot_eager")
    results = {name.replace("_orig_mod.", ""): value for name, value in run_lstm(compiled, x, hx).items()}
    for name, expected in run_lstm(lstm, x, hx).items():
        assert torch.equal(results[name], expected), name


def test_auto_takes_a_backend_that_can():
    lstm, x = fastlstm.LSTM(I, H, recompute=True), torch.randn(3, 2, I)
    assert fastlstm.explain(lstm, x).backend == "reference"
    with torch.no_grad():
        assert fastlstm.explain(lstm, x).backend == "torch"  # nothing is saved at all
    assert "recompute=True" in repr(lstm)


def test_functional_form_is_the_module():
    lstm, x = fastlstm.LSTM(I, H, recompute=True), torch.randn(3, 2, I)
    weights = list(lstm.parameters())
    output, _ = fastlstm.lstm(x, None, weights, recompute=True)
    torch.testing.assert_close(output, lstm(x)[0], rtol=0, atol=0)


def test_stock_cannot():
    with pytest.raises(ValueError, match="recompute=True needs backend"):
        fastlstm.LSTM(I, H, backend="torch", recompute=True)
    with pytest.raises(ValueError, match="recompute=True needs backend"):
        fastlstm.lstm(torch.randn(2, I), None, [], backend="torch", recompute=True)


def test_what_the_environment_asks_for(monkeypatch):
    lstm, x = fastlstm.LSTM(I, H, recompute=True), torch.randn(3, 2, I)
    monkeypatch.setenv("FASTLSTM_BACKEND", "reference")
    assert fastlstm.explain(lstm, x).reason == "FASTLSTM_BACKEND asks for it."
    monkeypatch.setenv("FASTLSTM_BACKEND", "torch")
    with pytest.raises(ValueError, match=r"recompute=True needs backend .* got 'torch'"):
        lstm(x)
    with torch.no_grad():
        lstm(x)
