"""Conversion in place: what is replaced, what every converted module keeps, and what is left alone."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any, cast

import pytest
import torch
from helpers import assert_close, run_lstm
from pairs import BACKENDS, I, make_input, make_pair
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import PackedSequence

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
        noisy = input._replace(data=input.data + 1) if isinstance(input, PackedSequence) else input + 1
        return super().forward(noisy, hx)


class NoisyCell(nn.LSTMCell):
    def forward(self, input, hx=None):
        return super().forward(input + 1, hx)


class Strict(nn.LSTM):
    def check_forward_args(self, input, hidden, batch_sizes):
        raise RuntimeError("not today")


class Wrapper(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(I, 4)


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


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_subclass_keeps_its_methods_and_gets_our_recurrence(backend, monkeypatch):
    torch.manual_seed(0)
    stock = Noisy(I, 4, num_layers=2)
    ours = copy.deepcopy(stock)
    report = fastlstm.convert(ours, backend=backend)
    assert isinstance(ours, Noisy)
    assert list(report.replaced) == [""]
    assert "Noisy(3, 4, num_layers=2" in str(report)
    assert "its super() is fastlstm's" in str(report)
    x = make_input("unsorted")
    truth = run_lstm(copy.deepcopy(stock).double(), x.double())
    assert_close(run_lstm(ours, x), truth, run_lstm(stock, x), dtype=torch.float32)
    assert fastlstm.explain(cast(Any, ours), x.data).backend == ("torch" if backend == "auto" else backend)
    assert "already on fastlstm" in fastlstm.convert(ours).skipped[""]
    run: Any = ours
    for duplicate in (copy.deepcopy(run), pickle.loads(pickle.dumps(run))):
        assert type(duplicate) is type(ours)
        with torch.no_grad():
            cast(Any, duplicate).weight_hh_l0.mul_(2)
        assert not torch.equal(cast(Any, duplicate)(x)[0].data, run(x)[0].data)
    # nothing of stock's own runs
    monkeypatch.setattr(nn.LSTM, "forward", None)
    run(x)


def test_a_subclass_of_the_cell():
    torch.manual_seed(0)
    model = nn.Sequential(NoisyCell(I, 4))
    x = torch.randn(2, I)
    expected = model(x)
    assert list(fastlstm.convert(model, backend="reference").replaced) == ["0"]
    assert isinstance(model[0], fastlstm.LSTMCell)
    torch.testing.assert_close(model(x), expected)


def test_what_is_left_alone_is_reported():
    replaced_forward: Any = nn.LSTM(I, 4)
    replaced_forward.forward = lambda x: x
    attribute: Any = nn.LSTM(I, 4)
    attribute.backend = "mine"
    recompute: Any = nn.LSTM(I, 4)
    cell: Any = nn.LSTMCell(I, 4)
    recompute.recompute = cell.recompute = 5
    model = nn.ModuleDict(
        {
            "strict": Strict(I, 4),
            "ours": fastlstm.LSTM(I, 4),
            "patched": replaced_forward,
            "taken": attribute,
            "taken too": recompute,
            "free": cell,
            "other": Wrapper(),
        }
    )
    report = fastlstm.convert(model, backend="reference")
    assert list(report.replaced) == ["free", "other.rnn"]
    assert report.skipped == {
        "strict": "Strict overrides check_forward_args, which fastlstm does not call",
        "ours": "already a fastlstm.LSTM(3, 4)",
        "patched": "its forward was replaced on the instance",
        "taken": "LSTM has an attribute backend, which fastlstm would add",
        "taken too": "LSTM has an attribute recompute, which fastlstm would add",
    }
    assert type(model["strict"]) is Strict
    assert "  strict: skipped, Strict overrides" in str(report)
    assert fastlstm.convert(nn.Linear(2, 2)) == fastlstm.Report()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.(ao.)?quantiz.*")
def test_what_other_tools_made_of_an_lstm_is_reported():
    model = nn.Sequential(nn.LSTM(I, 4))
    assert fastlstm.convert(torch.jit.script(model)).skipped == {
        "0": "it is compiled by TorchScript: convert before that"
    }
    quantized = torch.ao.quantization.quantize_dynamic(model)
    assert fastlstm.convert(quantized).skipped == {"0": "it is quantized: its weights are packed for other kernels"}


def test_revert_undoes_convert():
    torch.manual_seed(0)
    model: Any = nn.ModuleDict({"plain": nn.LSTM(I, 4), "noisy": Noisy(I, 4), "cell": nn.LSTMCell(I, 4)})
    model["normed"] = nn.LSTM(I, 4)
    model["alias"] = model["plain"]
    weight_norm(model["normed"], "weight_hh_l0")
    classes, keys = [type(m) for m in model.modules()], [set(vars(m)) for m in model.modules()]
    parameters = list(model.parameters())
    x = make_input("unsorted")
    expected = {name: model[name](x)[0].data for name in ("plain", "noisy", "normed", "alias")}
    converted = fastlstm.convert(model, backend="reference")
    assert not converted.skipped
    report = fastlstm.revert(model)
    assert report.replaced == {
        "plain": "torch.nn.LSTM(3, 4)",
        "noisy": "Noisy(3, 4)",
        "cell": "torch.nn.LSTMCell(3, 4)",
        "normed": "torch.nn.LSTM(3, 4)",
        "alias": "torch.nn.LSTM(3, 4)",
    }
    assert [set(vars(m)) for m in model.modules()] == keys
    assert fastlstm.revert(ours := nn.Sequential(fastlstm.LSTM(I, 4))).replaced
    assert vars(ours[0]).keys() == vars(nn.LSTM(I, 4)).keys()
    assert [type(m).__name__ for m in model.modules()] == [c.__name__ for c in classes]
    assert type(model["plain"]) is nn.LSTM
    assert all(mine is before for mine, before in zip(model.parameters(), parameters, strict=True))
    with torch.no_grad():
        for name, output in expected.items():
            torch.testing.assert_close(model[name](x)[0].data, output)
        model["plain"].weight_hh_l0.mul_(2)
        assert not torch.equal(model["plain"](x)[0].data, expected["plain"])
    assert fastlstm.revert(model) == fastlstm.Report()


def test_revert_keeps_what_torch_has_no_class_for():
    class Own(fastlstm.LSTM):
        pass

    model = nn.Sequential(Own(I, 4))
    assert list(fastlstm.revert(model).skipped) == ["0"]
    assert type(model[0]) is Own


def test_unknown_backend_changes_nothing():
    model = nn.Sequential(nn.LSTM(I, 4))
    with pytest.raises(ValueError, match="backend must be one of"):
        fastlstm.convert(model, backend="cudnn")
    assert type(model[0]) is nn.LSTM
