"""The functional form: sizes read from the weights, the module's results, and errors that name the tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_close
from pairs import BACKENDS, FORMS, OPTIONS, H, I, make_input, make_pair, make_states
from torch.nn.utils.rnn import PackedSequence

import fastlstm

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


@pytest.mark.parametrize("backend", ["torch", "reference", "auto"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("form", FORMS)
def test_is_the_module(form, options, backend):
    options = options | {"batch_first": "batch_first" in form, "dropout": 0.3 if "num_layers" in options else 0.0}
    stock, _ = make_pair(**options)
    x, hx = make_input(form), make_states(stock, form)
    weights = list(stock.parameters())
    flags = (options.get("bias", True), stock.num_layers, stock.dropout, True, stock.bidirectional, stock.batch_first)

    def gradients_and(output, states):
        data = output.data if isinstance(output, PackedSequence) else output
        values = {"output": data, "h_n": states[0], "c_n": states[1]}
        gradients = torch.autograd.grad(sum(value.square().sum() for value in values.values()), weights)  # pyright: ignore
        return values | {f"d{index}": gradient for index, gradient in enumerate(gradients)}

    torch.manual_seed(4)
    got = gradients_and(*fastlstm.lstm(x, hx, weights, *flags, backend=backend))
    torch.manual_seed(4)
    assert_close(got, gradients_and(*stock(x, hx)), dtype=torch.float32)


def test_defaults_are_those_of_evaluation():
    stock, _ = make_pair(num_layers=2, dropout=0.5)
    x = make_input("dense")
    output, _ = fastlstm.lstm(x, None, tuple(stock.parameters()), num_layers=2, dropout=0.5)
    torch.testing.assert_close(output, stock.eval()(x)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_is_checked_where_it_is_used(backend):
    stock, _ = make_pair()
    x, weights = make_input("dense"), list(stock.parameters())
    torch.testing.assert_close(fastlstm.lstm(x, None, weights, backend=backend)[0], stock(x)[0])
    with pytest.raises(ValueError, match="backend must be one of"):
        fastlstm.lstm(x, None, weights, backend=backend.upper())
    compiled: Any = torch.compile(fastlstm.lstm, backend="eager")
    with pytest.raises(ValueError, match="backend must be one of"):
        compiled(x, None, weights, backend=backend.upper())


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"dropout": 1.5}, ValueError, r"dropout should be a number in range \[0, 1\], got 1.5"),
        ({"num_layers": 0}, ValueError, "params must hold 4 tensors"),
        ({"num_layers": 3}, ValueError, r"params must hold 4 tensors .* num_layers=3 .* got 16"),
        ({"bidirectional": False}, ValueError, "params must hold 4 tensors"),
        ({"has_biases": False}, ValueError, "params must hold 2 tensors"),
    ],
    ids=str,
)
def test_arguments_that_disagree_with_params(change, kind, words):
    arguments = {"has_biases": True, "num_layers": 2, "bidirectional": True} | change
    stock, _ = make_pair(num_layers=2, bidirectional=True)
    with pytest.raises(kind, match=words):
        fastlstm.lstm(make_input("dense"), None, list(stock.parameters()), **arguments)


@pytest.mark.parametrize("index", range(20))
def test_params_of_wrong_shape_are_named(index):
    stock, _ = make_pair(num_layers=2, bidirectional=True, proj_size=2)
    name, weight = list(stock.named_parameters())[index]
    weights = list(stock.parameters())
    weights[index] = torch.zeros(weight.shape[0] + 4, *weight.shape[1:])
    # the first weight settles what hidden_size is, so the second one is out of step with it
    index, name = (1, "weight_hh_l0") if index == 0 else (index, name)
    words = rf"Expected params\[{index}\] \({name}\) of size \(.*\), got \[.*\]"
    with pytest.raises(RuntimeError, match=words):
        fastlstm.lstm(make_input("dense"), None, weights, num_layers=2, bidirectional=True)


def test_first_weights_must_be_matrices():
    flat = [torch.zeros(4 * H * I), torch.zeros(4 * H, H)]
    with pytest.raises(ValueError, match="must be weight_ih and weight_hh, both 2-D"):
        fastlstm.lstm(make_input("dense"), None, flat, has_biases=False)


def test_a_projection_is_narrower_than_the_hidden_state():
    params = [torch.zeros(size) for size in ((16, 3), (16, 4), (16,), (16,), (4, 4))]
    with pytest.raises(ValueError, match="proj_size has to be smaller than hidden_size"):
        fastlstm.lstm(torch.zeros(5, 2, 3), None, params)


def test_input_is_checked_against_params():
    stock, _ = make_pair()
    with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size. Expected 3, got 5"):
        fastlstm.lstm(torch.zeros(4, 2, 5), None, list(stock.parameters()))
