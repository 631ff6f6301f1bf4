"""What a swap of one name keeps: constructor, initial values, state_dict, copies and pickles."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import OPTIONS, STOCK_CELL, STOCK_LSTM, H, I, assert_same, make_input, make_pair
from torch import nn

import fastlstm

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


class Derived(STOCK_LSTM):
    """A user's class, made before the names were rebound."""


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
    derived = Derived(I, H)
    derived.load_state_dict(stock.state_dict())
    model = nn.Sequential(stock, cell, derived)
    assert list(fastlstm.convert(model).replaced) == ["0", "1", "2"]
    assert_same(stock, ours)
    assert_same(derived, ours)
