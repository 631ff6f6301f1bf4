"""What a layer computes and keeps for its gradients: no more than is asked for, and the same twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import Layer, assert_close, make_layer_inputs, run_lstm
from pairs import I, make_pair
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import pack_sequence
from torch.utils.flop_counter import FlopCounterMode

from fastlstm import autograd
from fastlstm.ops import first_step, lstm_backward, lstm_forward, zero_states
from fastlstm.weights import by_kind, spread

SHAPE = {"I": 7, "H": 5, "lengths": (4, 3, 3)}


def backward_flops(layer: Layer, x, hx) -> int:
    """Count the floating-point operations of the GEMMs around the recurrence in backward."""
    output, (h_n, c_n) = layer(x, hx)
    loss = output.sum() + h_n.sum() + c_n.sum()
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    return counter.get_total_flops()


def test_only_needed_gradients_are_computed():
    stock, x, hx = make_layer_inputs(**SHAPE)
    assert isinstance(x, torch.Tensor)
    T, B, I = x.shape  # noqa: E741
    H = SHAPE["H"]
    dx = dw_ih = 2 * T * B * 4 * H * I
    dw_hh, dh0 = 2 * T * B * 4 * H * H, 2 * B * 4 * H * H

    def layer_with(*names):
        layer = Layer(stock)
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(name.split("_l0")[0] in names)
        return layer

    def wanting(tensor):
        return tensor.detach().clone().requires_grad_()

    assert backward_flops(layer_with("weight_ih"), x, hx) == dw_ih
    assert backward_flops(layer_with("weight_hh"), x, hx) == dw_hh
    assert backward_flops(layer_with("bias_ih"), x, hx) == 0
    assert backward_flops(layer_with(), wanting(x), hx) == dx
    assert backward_flops(layer_with(), x, (wanting(hx[0]), hx[1])) == dh0
    assert backward_flops(layer_with(), x, (hx[0], wanting(hx[1]))) == 0
    everything = layer_with("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    assert backward_flops(everything, wanting(x), tuple(map(wanting, hx))) == dx + dw_ih + dw_hh + dh0


def test_a_frozen_direction_costs_nothing():
    stock, x, hx = make_layer_inputs(**SHAPE, D=2)
    assert isinstance(x, torch.Tensor)
    T, B, I = x.shape  # noqa: E741
    layer = Layer(stock)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_("reverse" in name and "weight_ih" in name)
    assert backward_flops(layer, x, hx) == 2 * T * B * 4 * SHAPE["H"] * I


@pytest.mark.parametrize("subset", range(8))
def test_any_subset_gets_the_same_gradients(subset):
    stock, x, hx = make_layer_inputs(**SHAPE, P=2, D=2, packed=True)
    full = run_lstm(Layer(stock), x, hx)
    layer = Layer(stock)
    names = [name for name, _ in layer.named_parameters()]
    kept = {name for index, name in enumerate(names) if (index * 3 + subset) % 8 < 3}
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name in kept)
    got = run_lstm(layer, x, hx)
    assert {name for name in got if name[1:] in names} == {f"d{name}" for name in kept}
    assert_close(got, {name: full[name] for name in got}, dtype=torch.float64)


@pytest.mark.parametrize("P", [0, 2])
@pytest.mark.parametrize("part", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)], ids=str)
def test_a_loss_on_a_part_of_the_results(part, P):
    stock, x, hx = make_layer_inputs(**SHAPE, P=P)
    assert isinstance(x, torch.Tensor)
    found = []
    for module in (stock, Layer(stock)):
        inputs = [t.detach().clone().requires_grad_() for t in (x, *hx)]
        output, states = module(inputs[0], tuple(inputs[1:]))
        results = (output, *states)
        loss = torch.stack([(results[k] ** 3).sum() for k in part]).sum()
        found.append(torch.autograd.grad(loss, [*inputs, *module.parameters()]))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_nothing_is_saved_without_grad(context):
    stock, x, hx = make_layer_inputs(**SHAPE)
    layer = Layer(stock)
    with context():
        output, (h_n, c_n) = layer(x, hx)
    assert all(value.grad_fn is None for value in (output, h_n, c_n))
    # nor where grad mode is on and nothing asks
    output, _ = layer.requires_grad_(False)(x, hx)
    assert output.grad_fn is None


@pytest.mark.parametrize(
    ("dtype", "per_unit"),
    [(torch.float64, 40), (torch.float32, 20), (torch.bfloat16, 12), (torch.float16, 12)],
)
@pytest.mark.parametrize("D", [1, 2])
def test_saved_bytes_are_those_documented(dtype, per_unit, D):
    stock, x, hx = make_layer_inputs(**SHAPE, D=D)
    layer, x, hx = Layer(stock).to(dtype), x.to(dtype), tuple(state.to(dtype) for state in hx)
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output, _ = layer(x, hx)
    held_by_the_caller = {t.data_ptr() for t in (x, *hx, output, *layer.parameters())}
    N = x.shape[0] * x.shape[1]
    assert sum(n for pointer, n in saved.items() if pointer not in held_by_the_caller) == N * D * SHAPE["H"] * per_unit


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_two_runs_are_bitwise_equal(packed):
    stock, x, hx = make_layer_inputs(**SHAPE, D=2, packed=packed, dtype=torch.float32)
    first, second = (run_lstm(Layer(stock), x, hx) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_gradients_accumulate_and_retain_graph():
    stock, x, hx = make_layer_inputs(**SHAPE)
    layer = Layer(stock)
    loss = layer(x, hx)[0].square().sum()
    loss.backward(retain_graph=True)
    gradients = [parameter.grad for parameter in layer.parameters()]
    once = [gradient.clone() for gradient in gradients if gradient is not None]
    loss.backward()
    for parameter, gradient in zip(layer.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient, rtol=0, atol=0)
    # the two biases have equal gradients, in memory of their own
    assert len({gradient.data_ptr() for gradient in gradients if gradient is not None}) == 4


@pytest.mark.parametrize("form", ["dense", "packed"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_each_gradient_has_memory_of_its_own(backend, form):
    """As stock's have: who changes one in place does not change another."""
    _, lstm = make_pair(backend, bidirectional=True)
    x = pack_sequence([torch.randn(n, I) for n in (26, 25, 20)]) if form == "packed" else torch.randn(26, 3, I)
    output, _ = lstm(x)
    total = (output.data if form == "packed" else output).sum()
    gradients = torch.autograd.grad(total, list(lstm.parameters()))
    assert all(gradient.is_contiguous() for gradient in gradients)
    assert len({gradient.untyped_storage().data_ptr() for gradient in gradients}) == len(gradients)


def test_eager_calls_go_without_the_op(monkeypatch):
    """It costs the host more than the launches do; who looks on sees it."""

    def refuse(*_):
        raise AssertionError

    _, lstm = make_pair("reference")
    x = torch.randn(5, 3, I)
    with monkeypatch.context() as patched:
        for name in ("lstm_forward", "lstm_backward"):
            patched.setattr(autograd, name, refuse)
        lstm(x)[0].sum().backward()
        with torch.no_grad():
            lstm(x)
    assert "fastlstm::lstm_forward" in str(make_fx(lambda x: lstm(x)[0])(x).graph).replace(".", "::")


def op_arguments(D, P, bias, packed, save):
    torch.manual_seed(4)
    N, B, I, H = (6, 3, 2, 4) if not packed else (5, 3, 2, 4)  # noqa: E741
    batch_sizes = torch.tensor([3, 2]) if packed else None
    shapes = [(4 * H, I), (4 * H, P or H), *([(4 * H,)] * 2 if bias else []), *([(P, H)] if P else [])] * D
    x, h0, c0, *weights = (
        torch.randn(shape, requires_grad=True) for shape in [(N, I), (D, B, P or H), (D, B, H), *shapes]
    )
    forward: Any = (x, h0, c0, weights, batch_sizes, save, False, "reference", False)
    with torch.no_grad():
        output, h_n, c_n, gates, cells = lstm_forward(*forward[:5], True, False, "reference", False)
        _, w_hh, w_hr = by_kind(spread([weight.detach() for weight in weights], D))
    backward = (output, h_n, c_n, gates, cells, c0.detach(), w_hh, w_hr, batch_sizes, "reference")
    return forward, backward


@pytest.mark.parametrize("save", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(
    ("D", "P", "bias", "packed"), [(1, 0, True, False), (2, 3, True, True), (2, 0, False, False), (1, 2, False, True)]
)
def test_ops_keep_their_contracts(D, P, bias, packed, save):
    """Schema, fake implementation, autograd registration, and gradients through AOT autograd of dynamic shapes."""
    forward, backward = op_arguments(D, P, bias, packed, save)
    torch.library.opcheck(lstm_forward, forward)
    torch.library.opcheck(lstm_backward, backward)
    torch.library.opcheck(zero_states, (forward[0].detach(), D, 3, 4))
    if packed:
        torch.library.opcheck(first_step, (forward[4],))


@pytest.mark.parametrize("P", [0, 2])
def test_a_cotangent_laid_out_by_columns(P):
    """A compiled graph stops where results are laid out otherwise than the fake implementation says."""
    _, (d_output, *others) = op_arguments(2, P, True, False, True)
    torch.library.opcheck(lstm_backward, (d_output.t().contiguous().t(), *others), test_utils="test_faketensor")
