"""The one buffer that cuDNN reads: parameters move into it once, and what must not move is copied."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from pairs import assert_same, make_input, make_pair
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from fastlstm import stock as stock_ops


@pytest.fixture
def flattened(monkeypatch):
    """Stand in for cuDNN: move weights into one buffer as it would, and record how many were moved."""
    calls = []

    def flatten(network, weights):
        calls.append(len(weights))
        with torch.no_grad():
            buffer = torch.cat([weight.flatten() for weight in weights])
            for weight, part in zip(weights, buffer.split([w.numel() for w in weights]), strict=True):
                weight.set_(part.view_as(weight))  # pyright: ignore

    monkeypatch.setattr(stock_ops, "flatten", flatten)
    return calls


def storages(weights):
    return {weight.untyped_storage().data_ptr() for weight in weights}


def test_cudnn_gets_one_buffer_and_parameters_move_once(flattened):
    stock, ours = make_pair()
    for _ in range(2):
        weights = ours.weights_for_cudnn(ours.current_weights())
        assert all(weight is own for weight, own in zip(weights, ours.parameters(), strict=True))
        assert len(storages(weights)) == 1
    assert len(flattened) == 1
    assert_same(ours, stock)
    # a weight is replaced: all move again; a copy has buffers of its own
    ours.weight_hh_l0.data = ours.weight_hh_l0.detach().clone()
    weights = ours.weights_for_cudnn(ours.current_weights())
    assert all(weight is own for weight, own in zip(weights, ours.parameters(), strict=True))
    assert len(storages(weights)) == 1
    duplicate = copy.deepcopy(ours)
    assert duplicate._flat_pointers is duplicate._flat_storage is None
    assert storages(duplicate.weights_for_cudnn(duplicate.current_weights())).isdisjoint(storages(ours.parameters()))
    assert len(flattened) == 3
    assert_same(duplicate, stock)


def test_cudnn_gets_copies_of_weights_that_must_not_move(flattened):
    _, ours = make_pair()
    # as FSDP lays them out: views of a buffer that it owns
    buffer = torch.cat([p.detach().flatten() for p in ours.parameters()] + [torch.zeros(1)])
    parts = buffer[:-1].split([p.numel() for p in ours.parameters()])
    for parameter, part in zip(ours.parameters(), parts, strict=True):
        parameter.data = part.view_as(parameter)
    for _ in range(2):
        weights = ours.weights_for_cudnn(ours.current_weights())
        assert len(storages(weights)) == 1
        assert storages(weights).isdisjoint({buffer.data_ptr()})
        assert storages(ours.parameters()) == {buffer.data_ptr()}
    assert len(flattened) == 2
    weights = ours.weights_for_cudnn(ours.current_weights())
    torch.stack([(weight * weight).sum() for weight in weights]).sum().backward()
    for parameter in ours.parameters():
        torch.testing.assert_close(parameter.grad, 2 * parameter.detach())

    tied = make_pair(num_layers=2)[1]
    tied.weight_hh_l1 = tied.weight_hh_l0
    flat = tied.weights_for_cudnn(tied.current_weights())
    assert not any(mine is own for mine, own in zip(flat, tied.current_weights(), strict=True))

    computed = make_pair()[1]
    weight_norm(computed, "weight_hh_l0")
    weights = computed.current_weights()
    flat = computed.weights_for_cudnn(weights)
    assert not any(mine is theirs for mine, theirs in zip(flat, weights, strict=True))
    flat[1].sum().backward()
    assert computed.parametrizations.weight_hh_l0.original0.grad is not None


def test_bfloat16_moves_too(monkeypatch):
    """`nn.RNNBase` would leave it where it is."""

    def flatten_parameters(network):
        assert {weight.dtype for weight in network._flat_weights} == {torch.float16}
        for weight in network._flat_weights:
            weight.set_(weight.clone())

    stock, ours = make_pair(dtype=torch.bfloat16)
    monkeypatch.setattr(nn.RNNBase, "flatten_parameters", flatten_parameters)
    before = [parameter.data_ptr() for parameter in ours.parameters()]
    ours.weights_for_cudnn(ours.current_weights())
    assert not set(before) & {parameter.data_ptr() for parameter in ours.parameters()}
    assert_same(ours, stock, make_input("dense", torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("projected", [False, True])
def test_on_a_gpu_weights_lie_in_one_buffer(dtype, projected):
    """A warning that they do not would be an error."""
    stock, ours = make_pair("torch", dtype, num_layers=2, bidirectional=True, proj_size=2 * projected)
    stock, ours = stock.cuda(), ours.cuda()
    x = torch.randn(3, 2, stock.input_size, device="cuda", dtype=dtype)
    ours(x)
    assert len(storages(ours.parameters())) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # stock's own, in bfloat16
        expected = stock(x)[0]
    torch.testing.assert_close(ours(x)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("copied", [False, True])
def test_a_first_call_in_inference_mode_leaves_trainable_parameters(copied, dtype, monkeypatch):
    @torch.no_grad()
    def flatten_parameters(network):
        for weight in network._flat_weights:
            weight.set_(weight.clone())  # as cuDNN's buffer, allocated in the mode of the call

    _, ours = make_pair(dtype=dtype)
    monkeypatch.setattr(nn.RNNBase, "flatten_parameters", flatten_parameters)
    weights = ours.current_weights()
    with torch.inference_mode():
        stock_ops.flat_copies(ours, weights) if copied else ours.weights_for_cudnn(weights)
    assert not any(parameter.is_inference() for parameter in ours.parameters())
