"""Weights in any shape of ownership: however they are changed, computed, tied or moved, the next call sees it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import assert_close, run_lstm
from pairs import INTERPRETED, STOCK_LSTM, H, I, assert_same, make_input, make_pair
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector, parametrize, prune, vector_to_parameters
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fastlstm

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

# every route: in training a packed batch goes to oneDNN in chunks
ROUTES = (
    ("auto", "dense"),
    ("auto", "unsorted"),
    ("reference", "unsorted"),
    ("torch", "dense"),
    pytest.param("triton", "dense", marks=INTERPRETED),
)


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


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def parametrize_all(lstm, values):
    for name in values:
        parametrize.register_parametrization(lstm, name, Doubled())


def normalise_spectrum(lstm, values):
    lstm.eval()  # in training each look at the weight is an iteration, and stock looks several times a call
    torch.manual_seed(0)
    spectral_norm(lstm, "weight_hh_l0")
    lstm.parametrizations.weight_hh_l0.original.data.copy_(values["weight_hh_l0"])


def normalise_by_hook(lstm, values):
    nn.utils.weight_norm(lstm, "weight_hh_l0")
    with torch.no_grad():
        lstm.weight_hh_l0_g.mul_(2)


def normalise_spectrum_by_hook(lstm, values):
    load(lstm.eval(), values)
    torch.manual_seed(0)
    nn.utils.spectral_norm(lstm, "weight_hh_l0")


def tie_layers(lstm, values):
    set_parameter(lstm, values)
    lstm.weight_hh_l1 = lstm.weight_hh_l0
    lstm.bias_hh_l0 = lstm.bias_ih_l0


def write_a_vector(lstm, values):
    vector_to_parameters(torch.cat([value.flatten() for value in values.values()]), lstm.parameters())


def views_of_one_vector(lstm, values):
    vector = parameters_to_vector(values.values())
    vector_to_parameters(vector, lstm.parameters())
    vector.mul_(2)


def step_two_optimizers(lstm, values):
    for optimizer in (torch.optim.SGD(lstm.parameters(), lr=0.1), torch.optim.SGD(lstm.parameters(), lr=0.2)):
        for parameter, value in zip(lstm.parameters(), values.values(), strict=True):
            parameter.grad = value.clone()
        optimizer.step()


def swap_tensors(lstm, values):
    if type(lstm) is STOCK_LSTM:  # which keeps weak references, and is refused
        set_parameter(lstm, values)
    else:
        torch.utils.swap_tensors(lstm.weight_hh_l0, nn.Parameter(values["weight_hh_l0"]))


def replace_on_conversion(lstm, values):
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        load(lstm.double().float(), values)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def to_meta_and_back(lstm, values):
    load(lstm.to("meta").to_empty(device="cpu"), values)


def share_memory(lstm, values):
    lstm.share_memory()
    copy_in_place(lstm, values)


def write_under_inference_mode(lstm, values):
    with torch.inference_mode():
        lstm.weight_hh_l0.copy_(values["weight_hh_l0"])


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
    parametrize_all,
    normalise_spectrum,
    normalise_by_hook,
    normalise_spectrum_by_hook,
    tie_layers,
    write_a_vector,
    views_of_one_vector,
    step_two_optimizers,
    swap_tensors,
    replace_on_conversion,
    to_meta_and_back,
    share_memory,
    write_under_inference_mode,
)


def rows_of(result: Any) -> Tensor:
    output, _ = result
    return output if isinstance(output, Tensor) else output.data


def sum_of(*results: Any) -> Tensor:
    return torch.stack([rows_of(result).square().sum() for result in results]).sum()


@pytest.mark.parametrize(("backend", "form"), ROUTES)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.(weight|spectral)_norm` is deprecated:FutureWarning")
def test_weights_are_never_stale(change, backend, form):
    stock, ours = make_pair(backend, num_layers=2)
    values = {name: 0.3 * torch.randn_like(value) for name, value in stock.state_dict().items()}
    x = make_input(form)
    before = run_lstm(ours, x)["output"]
    for lstm in (stock, ours):
        change(lstm, {name: value.clone() for name, value in values.items()})
        lstm.flatten_parameters()
    expected, results = run_lstm(stock, x), run_lstm(ours, x)
    assert not torch.equal(results["output"], before)
    assert_close(results, expected, dtype=torch.float32)


@pytest.mark.parametrize(("backend", "form"), ROUTES)
def test_a_computed_weight_is_computed_once_a_call(backend, form):
    class Counting(Doubled):
        calls = 0

        def forward(self, weight: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(weight)

    _, ours = make_pair(backend, num_layers=2)
    counting = Counting()
    parametrize.register_parametrization(ours, "weight_hh_l0", counting)
    counting.calls = 0
    run_lstm(ours, make_input(form))
    assert counting.calls == 1


@pytest.mark.parametrize(("backend", "form"), ROUTES)
def test_ties_between_modules(backend, form):
    (stock, ours), (other_stock, other) = make_pair(backend), make_pair(backend)
    x = make_input(form)
    for one, two in ((stock, other_stock), (ours, other)):
        two.weight_hh_l0 = one.weight_hh_l0
        with torch.no_grad():
            one.weight_hh_l0.mul_(2)
        sum_of(one(x), two(x)).backward()
    torch.testing.assert_close(ours.weight_hh_l0.grad, stock.weight_hh_l0.grad, rtol=1e-5, atol=1e-5)
    assert_close(run_lstm(other, x), run_lstm(other_stock, x), dtype=torch.float32)


@pytest.mark.parametrize(("backend", "form"), ROUTES)
def test_averages_of_the_weights(backend, form):
    stock, ours = make_pair(backend)
    x = make_input(form)
    averaged = []
    for lstm in (stock, ours):
        model = AveragedModel(lstm, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        model.update_parameters(lstm)
        before = rows_of(model(x))
        with torch.no_grad():
            lstm.weight_hh_l0.mul_(3)
        model.update_parameters(lstm)
        assert not torch.equal(rows_of(model(x)), before)
        averaged.append(model.module)
    assert_close(run_lstm(averaged[1], x), run_lstm(averaged[0], x), dtype=torch.float32)
    assert_close(run_lstm(ours, x), run_lstm(stock, x), dtype=torch.float32)


@pytest.mark.parametrize(("backend", "form"), ROUTES)
def test_dropconnect(backend, form):
    """A fresh mask on the recurrent weights at each call, and the gradient through it."""
    stock, ours = make_pair(backend, num_layers=2)
    x = make_input(form)
    outputs = []
    for lstm in (stock, ours):
        torch.manual_seed(4)
        for _ in range(2):
            lstm.zero_grad()
            masked = {name: nn.functional.dropout(p, 0.5) for name, p in lstm.named_parameters() if "weight_hh" in name}
            result = functional_call(lstm, masked, (x,))
            sum_of(result).backward()
            outputs.append({"loss": sum_of(result)} | {name: p.grad for name, p in lstm.named_parameters()})
    assert not torch.equal(outputs[2]["loss"], outputs[3]["loss"])
    for expected, got in zip(outputs[:2], outputs[2:], strict=True):
        assert_close(got, expected, dtype=torch.float32)
    assert_same(ours, stock)


@pytest.mark.filterwarnings("ignore:.*quantiz.*")
def test_dynamic_quantization_after_revert():
    """Torch's tool knows torch's classes by name: it leaves ours in float, and quantizes them once reverted."""
    stock, ours = make_pair()
    quantize: Any = torch.ao.quantization.quantize_dynamic
    expected = quantize(nn.Sequential(stock))
    model = nn.Sequential(ours)
    assert type(quantize(model)[0]) is fastlstm.LSTM
    fastlstm.revert(model)
    quantized = quantize(model)
    assert type(quantized[0]) is type(expected[0])
    assert "quantized" in type(quantized[0]).__module__
    x = make_input("dense")
    assert torch.equal(quantized(x)[0], expected(x)[0])


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


def test_meta_device_then_to_empty():
    stock, _ = make_pair()
    ours: Any = fastlstm.LSTM(I, H, device="meta")
    x = torch.empty(5, 2, I, device="meta")
    assert ours(x)[0].device.type == "meta"
    ours.to_empty(device="cpu").load_state_dict(stock.state_dict())
    assert_same(ours, stock)
