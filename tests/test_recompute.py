"""recompute=True: backward makes the gates again, as good as those that it would have found saved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_close, make_layer_inputs, run_lstm
from pairs import INTERPRETED
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

import fastlstm
from fastlstm import autograd

BACKENDS = ["reference", pytest.param("triton", marks=INTERPRETED)]
NETWORKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bidirectional": {"bidirectional": True, "num_layers": 2},
    "projection": {"proj_size": 4, "bidirectional": True},
    "no_bias": {"bias": False},
}
I, H = 5, 18  # noqa: E741


def make_networks(backend: str, dtype: torch.dtype, **options: Any) -> tuple[torch.nn.LSTM, torch.nn.LSTM, Any]:
    """Return stock in float64, stock in `dtype` and ours, with equal weights."""
    stock = torch.nn.LSTM(I, H, **options, dtype=dtype)
    truth = torch.nn.LSTM(I, H, **options, dtype=torch.float64)
    ours = fastlstm.LSTM(I, H, **options, dtype=dtype, backend=backend, recompute=True)
    for network in (truth, ours):
        network.load_state_dict(stock.state_dict())
    return truth, stock, ours


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")  # stock's own
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend, dtype, network, packed):
    truth, stock, ours = make_networks(backend, dtype, **NETWORKS[network])
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


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@INTERPRETED
def test_gates_are_at_most_one_unit_off(dtype, packed):
    x, h0, c0, weights, batch_sizes = layer_arguments(packed, dtype)
    output, _, _, gates, _ = autograd.lstm_forward(x, h0, c0, weights, batch_sizes, True, False, "triton", False)
    assert units_apart(autograd.lstm_gates(x, h0, output, weights, batch_sizes), gates) <= 1


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_gates_are_at_most_two_units_of_1_off(backend, packed):
    """Sums in another order, and the kernels' tanh; the stored ones are themselves further from float64's."""
    x, h0, c0, weights, batch_sizes = layer_arguments(packed, torch.float32)
    output, _, _, gates, _ = autograd.lstm_forward(x, h0, c0, weights, batch_sizes, True, False, backend, False)
    again = autograd.lstm_gates(x, h0, output, weights, batch_sizes)
    assert (again - gates).abs().max() <= 2 * 2**-23


def test_float32_gates_of_a_wide_layer():
    T, B, I, H = 30, 8, 128, 256  # noqa: E741
    weights = [weight.detach() for weight in torch.nn.LSTM(I, H).parameters()]
    x, state = torch.randn(T * B, I), torch.zeros(1, B, H)
    output, _, _, gates, _ = autograd.lstm_forward(x, state, state, weights, None, True, False, "reference", False)
    truth = [weight.double() for weight in weights]
    exact = autograd.lstm_forward(x.double(), *[state.double()] * 2, truth, None, True, False, "reference", False)[3]
    assert (autograd.lstm_gates(x, state, output, weights, None) - gates).abs().max() <= 2 * 2**-23
    assert (gates - exact).abs().max() > 2 * 2**-23


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_rows_in_pieces_give_the_same(packed, monkeypatch):
    x, h0, c0, weights, batch_sizes = layer_arguments(packed, torch.float64)
    output, _, _, gates, _ = autograd.lstm_forward(x, h0, c0, weights, batch_sizes, True, False, "reference", False)
    torch.testing.assert_close(autograd.lstm_gates(x, h0, output, weights, batch_sizes), gates)
    monkeypatch.setattr(autograd, "_WIDE_ELEMENTS", 3 * 4 * H)
    torch.testing.assert_close(autograd.lstm_gates(x, h0, output, weights, batch_sizes), gates)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_only_the_cells_are_kept(dtype):
    lstm = fastlstm.LSTM(I, H, recompute=True, dtype=dtype)
    x, kept = torch.randn(9, 4, I, dtype=dtype), {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output, _ = lstm(x)
    for held in (x, output, *lstm.parameters()):
        kept.pop(held.data_ptr(), None)
    states = 4 * H * dtype.itemsize
    assert sum(kept.values()) <= 9 * 4 * H * 4 + 2 * states


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
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
