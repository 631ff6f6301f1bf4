"""What a swap keeps: constructor, initial values, copies, and weights that are never stale however they change."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_lstm
from pairs import OPTIONS, STOCK_CELL, STOCK_LSTM, H, I, assert_same, make_input, make_pair
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import weight_norm

import fastlstm
from fastlstm import functional

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def test_constructor_is_that_of_stock():
    arguments = (I, H, 2, False, True, 0.5, True, 2, "cpu", torch.float64)
    stock = STOCK_LSTM(*arguments)
    ours = fastlstm.LSTM(*arguments)
    assert repr(ours) == repr(stock)
    assert list(ours.state_dict()) == list(stock.state_dict())
    keyword = inspect.signature(fastlstm.LSTM).parameters["backend"]
    assert keyword.kind is keyword.KEYWORD_ONLY
    assert repr(fastlstm.LSTM(3, 4, num_layers=2)) == "LSTM(3, 4, num_layers=2)"
    assert repr(fastlstm.LSTM(3, 4, backend="reference")) == "LSTM(3, 4, backend='reference')"
    assert repr(fastlstm.LSTMCell(3, 4, backend="torch")) == "LSTMCell(3, 4, backend='torch')"
    assert isinstance(ours, nn.RNNBase)
    assert not isinstance(ours, STOCK_LSTM)
    assert set(dir(stock)) <= set(dir(ours))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_initial_values_under_one_seed(options):
    def states(make):
        torch.manual_seed(0)
        lstm = make(I, H, **options)
        first = copy.deepcopy(lstm.state_dict())
        lstm.reset_parameters()
        return [*first.values(), *lstm.state_dict().values()]

    for mine, theirs in zip(states(fastlstm.LSTM), states(STOCK_LSTM), strict=True):
        assert torch.equal(mine, theirs)


def test_state_dict_both_ways():
    stock, ours = make_pair(**OPTIONS["projection"])
    other = STOCK_LSTM(I, H, **OPTIONS["projection"])
    other.load_state_dict(ours.state_dict(), strict=True)
    assert_same(ours, other)
    assert [[w.shape for w in layer] for layer in ours.all_weights] == [
        [w.shape for w in layer] for layer in stock.all_weights
    ]
    assert all(mine is own for mine, own in zip(ours._flat_weights, ours.parameters(), strict=True))


def copies_of(lstm):
    yield copy.deepcopy(lstm)
    yield pickle.loads(pickle.dumps(lstm))
    file = io.BytesIO()
    torch.save(lstm, file)
    file.seek(0)
    yield torch.load(file, weights_only=False)


def test_copies():
    _, ours = make_pair("reference", **OPTIONS["two layers, both directions"])
    for duplicate in copies_of(ours):
        assert repr(duplicate) == repr(ours)
        assert_same(duplicate, ours)
        with torch.no_grad():
            duplicate.weight_hh_l0.mul_(2)
        assert not torch.equal(duplicate(make_input("dense"))[0], ours(make_input("dense"))[0])
        assert all(mine is own for mine, own in zip(duplicate._flat_weights, duplicate.parameters(), strict=True))


def test_state_pickled_by_stock():
    # what a pickle of nn.LSTM does where that name was bound to ours
    stock, _ = make_pair()
    ours: Any = fastlstm.LSTM.__new__(fastlstm.LSTM)
    ours.__setstate__(copy.deepcopy(stock.__getstate__()))
    assert_same(ours, stock)
    assert "_flat_weights" not in vars(ours)
    ours.weight_hh_l0 = nn.Parameter(torch.zeros_like(ours.weight_hh_l0))
    assert not torch.equal(ours(make_input("dense"))[0], stock(make_input("dense"))[0])


def test_meta_device_then_to_empty():
    stock, _ = make_pair()
    ours: Any = fastlstm.LSTM(I, H, device="meta")
    x = torch.empty(5, 2, I, device="meta")
    assert ours(x)[0].device.type == "meta"
    ours.to_empty(device="cpu").load_state_dict(stock.state_dict())
    assert_same(ours, stock)


def set_parameter(lstm, values):
    lstm.weight_hh_l0 = nn.Parameter(values["weight_hh_l0"])


def swap_data(lstm, values):
    lstm.weight_hh_l0.data = values["weight_hh_l0"]


def copy_in_place(lstm, values):
    with torch.no_grad():
        lstm.weight_hh_l0.copy_(values["weight_hh_l0"])


def load(lstm, values):
    lstm.load_state_dict(values)


def load_and_assign(lstm, values):
    lstm.load_state_dict({name: value.clone() for name, value in values.items()}, assign=True)


def delete_and_set_a_tensor(lstm, values):
    del lstm.weight_hh_l0
    lstm.weight_hh_l0 = values["weight_hh_l0"]


def cast_there_and_back(lstm, values):
    lstm.double()
    set_parameter(lstm, {name: value.double() for name, value in values.items()})
    lstm.float()


def normalise(lstm, values):
    weight_norm(lstm, "weight_hh_l0")
    lstm.parametrizations.weight_hh_l0.original0.data.mul_(2)


def normalise_and_remove(lstm, values):
    normalise(lstm, values)
    parametrize.remove_parametrizations(lstm, "weight_hh_l0")


def prune_weights(lstm, values):
    load(lstm, values)
    prune.l1_unstructured(lstm, "weight_ih_l0", 0.5)


def deepcopy_after_a_call(lstm, values):
    load(copy.deepcopy(lstm), values)
    load(lstm, {name: 2 * value for name, value in values.items()})


CHANGES = (
    set_parameter,
    swap_data,
    copy_in_place,
    load,
    load_and_assign,
    delete_and_set_a_tensor,
    cast_there_and_back,
    normalise,
    normalise_and_remove,
    prune_weights,
    deepcopy_after_a_call,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_weights_are_never_stale(change):
    stock, ours = make_pair(num_layers=2)
    values = {name: torch.randn_like(value) for name, value in stock.state_dict().items()}
    before = ours(make_input("dense"))[0]
    for lstm in (stock, ours):
        change(lstm, {name: value.clone() for name, value in values.items()})
        lstm.flatten_parameters()
    assert not torch.equal(ours(make_input("dense"))[0], before)
    assert_same(ours, stock)
    assert run_lstm(ours, make_input("dense")).keys() == run_lstm(stock, make_input("dense")).keys()


def test_setting_the_flat_weights_sets_the_parameters():
    stock, ours = make_pair()
    ours._flat_weights = [nn.Parameter(2 * weight) for weight in stock.parameters()]
    for parameter, expected in zip(ours.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(parameter, 2 * expected)
    assert ours._flat_weights[0] is ours.weight_ih_l0


def test_functional_call_with_other_weights():
    stock, ours = make_pair(num_layers=2)
    x = make_input("dense")
    others = {name: torch.randn_like(p, requires_grad=True) for name, p in stock.named_parameters()}
    expected, got = (functional_call(lstm, others, (x,))[0] for lstm in (stock, ours))
    torch.testing.assert_close(got, expected)
    gradients = [torch.autograd.grad(output.sum(), list(others.values())) for output in (got, expected)]
    torch.testing.assert_close(*gradients)
    assert_same(ours, stock)


def test_data_parallel_replicas_see_their_own_weights():
    stock, ours = make_pair()
    replica: Any = ours._replicate_for_data_parallel()
    for name, parameter in ours.named_parameters():
        setattr(replica, name, 2 * parameter)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.mul_(2)
    assert_same(replica, stock)


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

    monkeypatch.setattr(functional, "flatten", flatten)
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
    swap_data(ours, {"weight_hh_l0": ours.weight_hh_l0.detach().clone()})
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


def test_a_first_call_in_inference_mode_leaves_trainable_parameters(monkeypatch):
    def flatten_parameters(network):
        for weight in network._flat_weights:
            weight.data = weight.data.clone()  # as cuDNN's buffer, allocated in the mode of the call

    monkeypatch.setattr(nn.RNNBase, "flatten_parameters", flatten_parameters)
    _, ours = make_pair()
    with torch.inference_mode():
        ours.weights_for_cudnn(ours.current_weights())
    assert not any(parameter.is_inference() for parameter in ours.parameters())


def test_torchs_own_names_may_be_rebound(monkeypatch):
    x = make_input("dense")
    stock, _ = make_pair()
    cell = STOCK_CELL(I, H)
    monkeypatch.setattr(nn, "LSTM", fastlstm.LSTM)
    monkeypatch.setattr(nn, "LSTMCell", fastlstm.LSTMCell)
    ours, our_cell = nn.LSTM(I, H), nn.LSTMCell(I, H)
    ours.load_state_dict(stock.state_dict())
    our_cell.load_state_dict(cell.state_dict())
    assert_same(ours, stock)
    torch.testing.assert_close(our_cell(x[0]), cell(x[0]))
    for duplicate in copies_of(ours):
        assert_same(duplicate, stock)
    model = nn.Sequential(stock, cell)
    assert list(fastlstm.convert(model).replaced) == ["0", "1"]
    assert_same(stock, ours)


def test_import_loads_no_triton():
    code = "import sys, torch; loaded = set(sys.modules); import fastlstm; print(*set(sys.modules) - loaded)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    new = {name.split(".")[0] for name in done.stdout.split()}
    assert "fastlstm" in new
    assert "triton" not in new
