"""Conversion in place: what is replaced, what every converted module keeps, and what is left alone."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from helpers import assert_close, run_lstm
from pairs import I, make_input, make_pair
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

import fastlstm


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.LSTM(3, 4, num_layers=2, bidirectional=True)
        self.blocks = nn.ModuleList([nn.ModuleDict({"cell": nn.LSTMCell(8, 5)}), nn.GRU(5, 5)])
        self.tied = self.encoder

    def forward(self, x):
        output, _ = self.tied(x)
        h, _ = self.blocks[0]["cell"](output[-1])  # pyright: ignore
        return self.blocks[1](h.unsqueeze(0))[0]


class Noisy(nn.LSTM):
    def forward(self, input, hx=None):  # pyright: ignore
        return super().forward(input + 1, hx)


def test_everything_is_replaced_and_nothing_else():
    model = Model()
    x = make_input("dense")
    expected = model(x)
    modules, parameters = list(model.modules()), list(model.parameters())
    report = fastlstm.convert(model, backend="reference")
    assert report.replaced == {
        "encoder": "fastlstm.LSTM(3, 4, num_layers=2, bidirectional=True, backend='reference')",
        "blocks.0.cell": "fastlstm.LSTMCell(8, 5, backend='reference')",
        "tied": "fastlstm.LSTM(3, 4, num_layers=2, bidirectional=True, backend='reference')",
    }
    assert not report.skipped
    assert str(report).splitlines()[:2] == [
        "fastlstm: 3 replaced, 0 skipped",
        "  encoder: fastlstm.LSTM(3, 4, num_layers=2, bidirectional=True, backend='reference')",
    ]
    assert type(model.encoder) is fastlstm.LSTM
    assert type(model.blocks[1]) is nn.GRU
    assert model.tied is model.encoder
    for mine, before in zip([*model.modules(), *model.parameters()], [*modules, *parameters], strict=True):
        assert mine is before
    torch.testing.assert_close(model(x), expected)


def test_the_model_itself_may_be_an_lstm():
    stock, _ = make_pair(num_layers=2)
    lstm = copy.deepcopy(stock)
    report = fastlstm.convert(lstm)
    assert type(lstm) is fastlstm.LSTM
    assert "(the model itself): fastlstm.LSTM(3, 4, num_layers=2)" in str(report)
    assert_close(run_lstm(lstm, make_input("unsorted")), run_lstm(stock, make_input("unsorted")), dtype=torch.float32)


def test_a_converted_module_keeps_what_was_done_to_it():
    lstm: Any = nn.LSTM(I, 4, num_layers=2, dropout=0.5).eval()
    lstm.weight_hh_l0.requires_grad_(False)
    lstm.register_buffer("scale", torch.ones(1))
    lstm.note = "mine"
    calls = []
    lstm.register_forward_pre_hook(lambda *_: calls.append("pre"))
    lstm.register_forward_hook(lambda *_: calls.append("forward"))
    lstm.register_full_backward_hook(lambda *_: calls.append("backward"))
    lstm._register_state_dict_hook(lambda *_: calls.append("state_dict"))
    lstm.register_load_state_dict_post_hook(lambda *_: calls.append("load"))
    state = {name: value.clone() for name, value in lstm.state_dict().items()}
    calls.clear()

    fastlstm.convert(lstm)
    assert not lstm.training
    assert lstm.note == "mine"
    assert not lstm.weight_hh_l0.requires_grad
    lstm(make_input("dense").requires_grad_())[0].sum().backward()
    assert lstm.weight_hh_l0.grad is None
    assert lstm.weight_hh_l1.grad is not None
    assert list(lstm.state_dict()) == list(state)
    lstm.load_state_dict(state)
    assert calls == ["pre", "forward", "backward", "state_dict", "load"]


def test_copies_of_a_converted_module():
    model = nn.Sequential(nn.LSTM(I, 4))
    fastlstm.convert(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    x = make_input("dense")
    for duplicate in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert type(duplicate[0]) is fastlstm.LSTM
        duplicate[0].weight_hh_l0 = nn.Parameter(2 * model[0].weight_hh_l0.detach())  # pyright: ignore
        assert not torch.equal(duplicate(x)[0], model(x)[0])
    assert "_flat_weights" not in vars(model[0])


def test_an_optimizer_goes_on():
    model = nn.Sequential(nn.LSTM(I, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fastlstm.convert(model)
    x = make_input("dense")
    before = model(x)[0]
    before.sum().backward()
    optimizer.step()
    assert not torch.equal(model(x)[0], before)


def test_parametrizations_stay():
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.LSTM(I, 4))
    weight_norm(model[0], "weight_hh_l0")
    stock = copy.deepcopy(model)
    report = fastlstm.convert(model)
    assert report.replaced == {"0": "fastlstm.LSTM(3, 4)"}
    x = make_input("dense")
    assert_close(run_lstm(model[0], x), run_lstm(stock[0], x), dtype=torch.float32)
    duplicate = copy.deepcopy(model)
    for lstm in (model, stock):
        lstm[0].parametrizations.weight_hh_l0.original0.data.mul_(2)
    assert_close(run_lstm(model[0], x), run_lstm(stock[0], x), dtype=torch.float32)
    assert not torch.equal(duplicate(x)[0], model(x)[0])
    parametrize.remove_parametrizations(model[0], "weight_hh_l0")
    assert type(model[0]) is fastlstm.LSTM
    torch.testing.assert_close(model(x)[0], stock(x)[0])


def test_what_is_left_alone_is_reported():
    replaced_forward: Any = nn.LSTM(I, 4)
    replaced_forward.forward = lambda x: x
    model = nn.ModuleDict({"noisy": Noisy(I, 4), "ours": fastlstm.LSTM(I, 4), "patched": replaced_forward})
    report = fastlstm.convert(model, backend="reference")
    assert not report.replaced
    assert report.skipped == {
        "noisy": "Noisy is a subclass, and may change what is computed",
        "ours": "already a fastlstm.LSTM, backend='auto'",
        "patched": "its forward was replaced on the instance",
    }
    assert type(model["noisy"]) is Noisy
    assert "  noisy: skipped, Noisy is a subclass" in str(report)
    assert fastlstm.convert(nn.Linear(2, 2)) == fastlstm.Report()


def test_unknown_backend_changes_nothing():
    model = nn.Sequential(nn.LSTM(I, 4))
    with pytest.raises(ValueError, match="backend must be one of"):
        fastlstm.convert(model, backend="cudnn")
    assert type(model[0]) is nn.LSTM
