"""The modules against torch's: outputs and every gradient, in every form of input, on every backend."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import assert_close, run_lstm
from pairs import (
    BACKENDS,
    FORMS,
    INTERPRETED,
    LENGTHS,
    OPTIONS,
    STOCK_CELL,
    STOCK_LSTM,
    H,
    I,
    assert_same,
    make_input,
    make_pair,
    make_states,
)
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fastlstm
from fastlstm import cpu_rules

# torch says once a process that its own op is slow here
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("form", FORMS)
def test_outputs_and_gradients(form, options, backend):
    stock, ours = make_pair(backend, **options, batch_first="batch_first" in form)
    x, hx = make_input(form), make_states(stock, form)
    truth = run_lstm(copy.deepcopy(stock).double(), x.double(), tuple(state.double() for state in hx))
    assert_close(run_lstm(ours, x, hx), truth, run_lstm(stock, x, hx), dtype=torch.float32)

    (output, states), (expected, expected_states) = ours(x), stock(x)
    assert type(output) is type(expected)
    if isinstance(output, PackedSequence):
        assert all(mine is theirs for mine, theirs in zip(output[1:], x[1:], strict=True))
        output, expected = output.data, expected.data
    torch.testing.assert_close((output, *states), (expected, *expected_states), check_stride=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["torch", "reference", "auto", "triton"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("form", ["dense", "batch_first", "unsorted"])
def test_on_a_gpu(form, options, backend):
    # a warning about weights that are not in one piece would be an error
    stock, ours = make_pair(backend, **options, batch_first="batch_first" in form)
    x, hx = make_input(form), make_states(stock, form)
    truth = run_lstm(copy.deepcopy(stock).double(), x.double(), tuple(state.double() for state in hx))
    stock, ours, x = stock.cuda(), copy.deepcopy(ours.cuda()), x.cuda()
    # cuDNN takes no states of these strides, and no backward pass in eval mode
    strided = tuple(state.cuda().transpose(0, 1).contiguous().transpose(0, 1) for state in hx)

    def on_cpu(results):
        return {name: result.cpu() for name, result in results.items()}

    expected = on_cpu(run_lstm(stock, x, tuple(state.cuda() for state in hx)))
    assert_close(on_cpu(run_lstm(ours.eval(), x, strided)), truth, expected, dtype=torch.float32)
    for lstm in (stock, ours):
        lstm.weight_hh_l0.data = 2 * lstm.weight_hh_l0.data
    stock.flatten_parameters()
    truth = on_cpu(run_lstm(copy.deepcopy(stock).double(), x.double()))
    assert_close(on_cpu(run_lstm(ours, x)), truth, on_cpu(run_lstm(stock, x)), dtype=torch.float32)


@pytest.mark.parametrize("backend", ["torch", "reference", "auto"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["dense", "unsorted"])
def test_dtypes(form, dtype, backend):
    stock, ours = make_pair(backend, dtype, **OPTIONS["two layers, both directions"])
    x, hx = make_input(form, dtype), make_states(stock, form, dtype)
    truth = run_lstm(copy.deepcopy(stock).double(), x.double(), tuple(state.double() for state in hx))
    results = run_lstm(ours, x, hx)
    assert_close(results, truth, run_lstm(stock, x, hx), dtype=dtype)
    assert {result.dtype for result in results.values()} == {dtype}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["dense", "batch_first", "unsorted"])
@pytest.mark.parametrize("options", [{"bidirectional": True}, {"proj_size": 2}], ids=str)
def test_dropout_draws_the_numbers_of_stock(form, options, backend):
    options |= {"num_layers": 3, "dropout": 0.4, "batch_first": form == "batch_first"}
    stock, ours = make_pair(backend, **options)
    x = make_input(form)
    torch.manual_seed(5)
    expected = run_lstm(stock, x)
    torch.manual_seed(5)
    assert_close(run_lstm(ours, x), expected, dtype=torch.float32)
    torch.manual_seed(6)
    assert not torch.equal(run_lstm(ours, x)["output"], expected["output"])
    assert_close(run_lstm(ours.eval(), x), run_lstm(stock.eval(), x), dtype=torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_dropout_of_none_and_of_everything(dropout, backend):
    stock, ours = make_pair(backend, num_layers=2, dropout=dropout)
    assert_same(ours, stock)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_layers", [1, 2])
def test_states_of_any_stride(num_layers, backend):
    stock, ours = make_pair(backend, num_layers=num_layers, bidirectional=True)
    x, rows = make_input("dense"), 2 * num_layers
    learned = torch.randn(rows, 1, H, requires_grad=True)
    results = []
    for lstm in (stock, ours):
        hx = (learned.expand(rows, len(LENGTHS), H), torch.ones(len(LENGTHS), H, rows).permute(2, 0, 1))
        output, (h_n, c_n) = lstm(x.transpose(0, 1).contiguous().transpose(0, 1), hx)
        (gradient,) = torch.autograd.grad(output.sum() + h_n.sum() + c_n.sum(), learned)
        assert h_n.is_contiguous()
        assert c_n.is_contiguous()
        results.append({"output": output, "h_n": h_n, "c_n": c_n, "dlearned": gradient})
    assert_close(results[1], results[0], dtype=torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_another_default_device(options, backend):
    stock, ours = make_pair(backend, **options)
    # enough steps for "auto" not to leave them to stock
    x, weights = pack_sequence([torch.randn(n, I) for n in (26, 25, 20)]), list(ours.parameters())
    expected = torch.autograd.grad(stock(x)[0].data.sum(), list(stock.parameters()))
    with torch.device("meta"):
        gradients = torch.autograd.grad(ours(x)[0].data.sum(), weights)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (4, 1), (5, 0)], ids=str)
def test_small_batches(shape, backend):
    stock, ours = make_pair(backend, **OPTIONS["two layers, both directions"])
    x = torch.randn(*shape, I)
    assert_close(run_lstm(ours, x), run_lstm(stock, x), dtype=torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_saved_without_a_gradient(backend):
    _, ours = make_pair(backend, num_layers=2)
    x = make_input("dense")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        with torch.no_grad():
            assert not ours(x)[0].requires_grad
        with torch.inference_mode():
            assert ours(x)[0].is_inference()
        assert not saved
        ours(x)
        assert saved
        saved.clear()
        assert not ours.requires_grad_(False)(x)[0].requires_grad
        if backend != "torch":  # stock's op computes what backward would need, and drops it
            assert not saved


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", ["weight_ih", "weight_hh", "bias", "l0", "reverse"])
def test_frozen_parameters_get_no_gradient(frozen, backend):
    stock, ours = make_pair(backend, **OPTIONS["two layers, both directions"])
    for lstm in (stock, ours):
        for name, parameter in lstm.named_parameters():
            parameter.requires_grad_(frozen not in name)
        lstm(make_input("dense"))[0].sum().backward()
    for (name, expected), parameter in zip(stock.named_parameters(), ours.parameters(), strict=True):
        assert (parameter.grad is None) == (frozen in name)
        if expected.grad is not None:
            torch.testing.assert_close(parameter.grad, expected.grad, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [(4,), (0,), ()], ids=str)
def test_cell(batch, bias, backend):
    torch.manual_seed(1)
    stock = STOCK_CELL(I, H, bias)
    ours = fastlstm.LSTMCell(I, H, bias, backend=backend)
    ours.load_state_dict(stock.state_dict())
    torch.manual_seed(1)
    assert torch.equal(fastlstm.LSTMCell(I, H, bias).weight_hh, stock.weight_hh)

    x = torch.randn(*batch, I)
    hx = (torch.randn(*batch, H), torch.randn(*batch, H))

    def run(cell, hx):
        inputs = {"x": x.clone().requires_grad_()}
        if hx is not None:
            inputs |= {name: state.clone().requires_grad_() for name, state in zip("hc", hx, strict=True)}
        h, c = cell(inputs["x"], (inputs["h"], inputs["c"]) if hx is not None else None)
        wanted = inputs | dict(cell.named_parameters())
        gradients = torch.autograd.grad((h * h).sum() + c.sum(), list(wanted.values()))
        return {"h_1": h, "c_1": c} | dict(zip(wanted, gradients, strict=True))

    for states in (hx, None):
        assert_close(run(ours, states), run(stock, states), dtype=torch.float32)


def test_environment_overrides_auto_only(monkeypatch):
    x = make_input("dense")
    for backend, chosen in {"torch": "torch", "reference": "reference", "auto": "torch"}.items():
        assert fastlstm.explain(make_pair(backend)[1], x).backend == chosen
    cell = fastlstm.LSTMCell(I, H)
    assert fastlstm.explain(cell, x[0]).backend == "torch"
    monkeypatch.setenv("FASTLSTM_BACKEND", "reference")
    assert fastlstm.explain(make_pair()[1], x).backend == "reference"
    assert fastlstm.explain(make_pair("torch")[1], x).backend == "torch"
    decision = fastlstm.explain(cell, x[0])
    assert (decision.backend, decision.reason) == ("reference", "FASTLSTM_BACKEND asks for it.")
    monkeypatch.setenv("FASTLSTM_BACKEND", "fast")
    for module, input in ((make_pair()[1], x), (cell, x[0])):
        for call in (module, torch.func.vmap(module)):
            with pytest.raises(ValueError, match="FASTLSTM_BACKEND must be one of"):
                call(input)


def test_cell_with_a_computed_weight():
    """DropConnect and the like put a tensor where the parameter was."""
    stock, ours = STOCK_CELL(I, H), fastlstm.LSTMCell(I, H)
    ours.load_state_dict(stock.state_dict())
    for cell in (stock, ours):
        weight = cell.weight_hh.detach() * 0.5
        del cell.weight_hh
        cell.weight_hh = weight
    x, hx = torch.randn(3, I), (torch.randn(3, H), torch.randn(3, H))
    torch.testing.assert_close(ours(x, hx), stock(x, hx), rtol=0, atol=0)


def test_explain_is_what_runs(monkeypatch):
    _, ours = make_pair("reference", num_layers=2)
    x = make_input("unsorted")
    decision = fastlstm.explain(ours, x)
    problem = decision.problem
    assert (problem.T, problem.B, problem.I, problem.H, problem.L, problem.runs) == (5, 4, I, H, 2, 3)
    assert problem.training
    assert "hidden_size=4" in str(decision)
    assert "\n" not in str(decision)
    with torch.no_grad():
        assert not fastlstm.explain(ours, x).problem.training
    with pytest.raises(TypeError, match="module must be a fastlstm"):
        fastlstm.explain(STOCK_LSTM(I, H), x)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("form", "backend"), [("dense", "reference"), ("dense", "auto"), ("unsorted", "auto")])
def test_autocast(form, backend):
    if form == "dense" and not cpu_rules.onednn_has(torch.bfloat16):
        pytest.skip("stock cannot run this on a CPU without bfloat16 (test_autocast.py runs ours)")
    stock, ours = make_pair(backend, num_layers=2)
    x = make_input(form)
    with torch.autocast("cpu", torch.bfloat16):
        results, expected = run_lstm(ours, x), run_lstm(stock, x)
    truth = run_lstm(copy.deepcopy(stock).double(), x.double())
    assert_close(results, truth, expected, dtype=torch.bfloat16)
    assert {name: result.dtype for name, result in results.items()} == {
        name: result.dtype for name, result in expected.items()
    }


@pytest.mark.parametrize("backend", BACKENDS)
# dynamo asks an autograd Function for an instance, which torch deprecates
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_into_one_graph(backend):
    stock, ours = make_pair(backend, num_layers=2, batch_first=True)
    compiled: Any = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = make_input("batch_first")
    results, expected = run_lstm(compiled, x), run_lstm(stock, x)
    results = {name.replace("_orig_mod.", ""): result for name, result in results.items()}
    assert_close(results, expected, dtype=torch.float32)


@pytest.mark.parametrize("choice", ["torch", "reference", pytest.param("triton", marks=INTERPRETED)])
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_auto_chooses_when_it_runs(choice, monkeypatch):
    """Tracing settles no sizes, so the choice between the kernels and plain torch is the op's own."""
    _, ours = make_pair()
    compiled: Any = torch.compile(ours, backend="aot_eager")
    monkeypatch.setenv("FASTLSTM_BACKEND", choice)
    with torch.no_grad():
        kernels = make_pair("triton")[1] if choice == "triton" else make_pair("reference")[1]
        assert torch.equal(compiled(make_input("dense"))[0], kernels(make_input("dense"))[0])
