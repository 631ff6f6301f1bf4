"""Double backward where stock's op has none: a stand-in for cuDNN's, which autograd sees as one node, on a CPU."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from pairs import OPTIONS, make_input, make_pair, make_states
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import PackedSequence

from fastlstm import stock

REAL = stock._lstm
ON_A_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def cudnn(data: Tensor, *arguments: Any) -> Any:
    """`torch._VF.lstm` as cuDNN runs it: one node for the whole network, whose backward cannot be differentiated."""
    packed = isinstance(arguments[0], Tensor)
    batch_sizes, states, weights, *flags = arguments if packed else (None, *arguments)

    def call(data: Tensor, *others: Tensor) -> Any:
        *weights, h0, c0 = others
        return REAL(data, *([batch_sizes] if packed else []), (h0, c0), weights, *flags)

    class CudnnRnn(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            ctx.save_for_backward(*inputs)
            return call(*inputs)

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *cotangents: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
            inputs = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
            with torch.enable_grad():
                gradients = torch.autograd.grad(call(*inputs), inputs, cotangents)
            needed = ctx.needs_input_grad
            weights = any(needed[1:-2])  # of all, or of none
            wanted = needed[0], *(weights for _ in needed[1:-2]), *needed[-2:]
            return tuple(g if want else None for g, want in zip(gradients, wanted, strict=True))

    return CudnnRnn.apply(data, *weights, *states)


@pytest.fixture(autouse=True)
def _stands_in(monkeypatch):
    monkeypatch.setattr(stock, "_lstm", cudnn)
    monkeypatch.setattr(stock, "_may_be_a_vendors", lambda data: True)


@pytest.mark.parametrize("form", ["dense", "batch_first", "unsorted"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradgradcheck(options, form):
    _, lstm = make_pair("torch", torch.float64, batch_first=form == "batch_first", **options)
    x, hx = make_input(form, torch.float64), make_states(lstm, form, torch.float64)
    names = [name for name, _ in lstm.named_parameters()]

    def run(data, h0, c0, *weights):
        given = x._replace(data=data) if isinstance(x, PackedSequence) else data
        output, states = torch.func.functional_call(lstm, dict(zip(names, weights, strict=True)), (given, (h0, c0)))
        return (output.data if isinstance(output, PackedSequence) else output), *states

    inputs = [t.detach().clone().requires_grad_() for t in (x.data, *hx, *lstm.parameters())]
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_A_GPU)])
@pytest.mark.parametrize("form", ["batch_first", "unsorted"])
def test_only_what_is_asked_for(form, device, monkeypatch):
    """Some inputs without a gradient, outputs unused, and float32 beside the reference in float64."""
    if device == "cuda":
        monkeypatch.setattr(stock, "_lstm", REAL)
    _, lstm = make_pair("torch", bidirectional=True, batch_first=form == "batch_first")
    truth = copy.deepcopy(lstm).double()
    truth.backend = "reference"
    second = []
    for module, dtype in ((lstm.to(device), torch.float32), (truth, torch.float64)):
        module.weight_hh_l0.requires_grad_(False)
        x = make_input(form, dtype).to(next(module.parameters()).device)
        data = x.data if isinstance(x, PackedSequence) else x
        data.requires_grad_()
        _, (h_n, _) = module(x)
        wanted = data, module.weight_ih_l0
        first = torch.autograd.grad(h_n.square().sum(), wanted, create_graph=True)
        second.append(torch.autograd.grad(first[0].square().sum() + first[1].square().sum(), wanted))
    for got, expected in zip(*second, strict=True):
        torch.testing.assert_close(got.double().cpu(), expected, rtol=1e-4, atol=1e-5)


def test_first_derivatives_are_stocks_own():
    """The reference steps in only where a graph of the backward pass is asked for."""
    _, lstm = make_pair("torch")
    x = make_input("dense").requires_grad_()
    (plain,) = torch.autograd.grad(lstm(x)[0].sum(), x)
    assert plain.grad_fn is None
    zeros = torch.zeros(1, x.shape[1], lstm.hidden_size)
    expected, *_ = REAL(x, (zeros, zeros), list(lstm.parameters()), True, 1, 0.0, True, False, False)
    assert torch.equal(plain, torch.autograd.grad(expected.sum(), x)[0])


def test_input_is_not_kept_alive():
    _, lstm = make_pair("torch")
    leaf = make_input("dense").requires_grad_()
    x = 2 * leaf
    seen = weakref.ref(x)
    output, _ = lstm(x)
    del x
    assert seen() is not None  # saved for backward
    output.sum().backward()
    assert seen() is None


def test_dropout_between_layers_cannot_be_drawn_again():
    _, lstm = make_pair("torch", num_layers=2, dropout=0.5)
    x = make_input("dense").requires_grad_()
    (gradient,) = torch.autograd.grad(lstm(x)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
    lstm.eval()
    (gradient,) = torch.autograd.grad(lstm(x)[0].square().sum(), x, create_graph=True)
    gradient.sum().backward()
