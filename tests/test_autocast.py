"""Mixed precision: the dtypes of stock, one cast of a weight a region, and backward in the precision of forward."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from helpers import assert_close, run_lstm
from pairs import BACKENDS, INTERPRETED, STOCK_LSTM, I, make_input, make_pair, make_states
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastlstm
from fastlstm import cpu_rules

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
LOW = (torch.bfloat16, torch.float16)
OWN = ("reference", pytest.param("triton", marks=INTERPRETED))


class Casts(TorchDispatchMode):
    """Counts the copies that are made of some tensors in another dtype."""

    def __init__(self, tensors):
        super().__init__()
        self.counts = {tensor.data_ptr(): 0 for tensor in tensors}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.counts:
            self.counts[args[0].data_ptr()] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("low", LOW, ids=str)
@pytest.mark.parametrize(
    "options", [{"num_layers": 2, "bidirectional": True}, {"proj_size": 2}], ids=["", "projection"]
)
@pytest.mark.parametrize("form", ["dense", "unsorted"])
def test_results_have_the_dtypes_of_stock(form, options, low, backend):
    stock, ours = make_pair(backend, **options)
    for x_dtype in (torch.float32, low):
        for state_dtype in (None, torch.float32, low):
            x = make_input(form, x_dtype)
            hx = None if state_dtype is None else make_states(stock, form, state_dtype)
            wide = copy.deepcopy(stock).double()
            truth = run_lstm(wide, x.double(), None if hx is None else tuple(state.double() for state in hx))
            with torch.autocast("cpu", low):
                results = run_lstm(ours, x, hx)
                if form == "dense" and not stock.proj_size and x_dtype != low and not cpu_rules.onednn_has(low):
                    with pytest.raises(RuntimeError, match="could not create a primitive descriptor"):
                        stock(x, hx)
                    assert results["output"].dtype == low
                    continue
                expected = run_lstm(stock, x, hx)
            assert {name: value.dtype for name, value in results.items()} == {
                name: value.dtype for name, value in expected.items()
            }, (x_dtype, state_dtype)
            assert_close(results, truth, expected, dtype=low)


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("low", LOW, ids=str)
def test_results_without_a_graph_have_the_dtypes_of_stock(low, backend):
    stock, ours = make_pair(backend, torch.float16)  # a processor may have oneDNN's layer in it for inference only
    x = make_input("dense", torch.float16)
    with torch.autocast("cpu", low), torch.no_grad():
        (output, states), (expected, expected_states) = ours(x), stock(x)
    assert [t.dtype for t in (output, *states)] == [t.dtype for t in (expected, *expected_states)]


@pytest.mark.parametrize("backend", ["auto", *OWN])
@pytest.mark.parametrize("low", LOW, ids=str)
def test_a_cells_results_have_the_dtypes_of_stock(low, backend):
    stock = nn.LSTMCell(3, 4)
    ours = fastlstm.LSTMCell(3, 4, backend=backend)
    ours.load_state_dict(stock.state_dict())
    for x_dtype, state_dtype in itertools.product((torch.float32, low), (None, torch.float32, low)):
        x = torch.randn(2, 3, dtype=x_dtype)
        hx: Any = None if state_dtype is None else torch.randn(2, 2, 4, dtype=state_dtype).unbind()
        with torch.autocast("cpu", low):
            for result, expected in zip(ours(x, hx), stock(x, hx), strict=True):
                assert result.dtype == expected.dtype, (x_dtype, state_dtype)
                torch.testing.assert_close(result, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("backend", OWN)
def test_a_cells_state_is_not_rounded_every_step(backend):
    cell, x = fastlstm.LSTMCell(1, 1, backend=backend), torch.zeros(1, 1)
    for parameter in cell.parameters():
        torch.nn.init.zeros_(parameter)
    torch.nn.init.constant_(cell.bias_ih[1:2], 20.0)  # f is 1
    torch.nn.init.constant_(cell.bias_ih[2:3], 1e-3)  # g is 1e-3, less than half a unit of 1 in bfloat16
    h, c = torch.zeros(1, 1), torch.ones(1, 1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for _ in range(100):
            h, c = cell(x, (h, c))
    assert c.item() == pytest.approx(1.05, abs=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("form", "cache", "casts"), [("dense", True, 1), ("unsorted", True, 1), ("dense", False, 3)])
def test_a_weight_is_cast_once_a_region(form, cache, casts, backend):
    if backend == "torch" and form == "dense" and not cpu_rules.onednn_has(torch.bfloat16):
        pytest.skip("stock's op cannot run this on a CPU without bfloat16")
    _, ours = make_pair(backend, num_layers=2)
    weights = [weight for weight in ours.parameters() if weight.dim() == 2]
    for _ in range(2):  # and again in the next
        with Casts(weights) as mode, torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
            for _ in range(3):
                ours(make_input(form))
        assert set(mode.counts.values()) == {casts}


def test_casting_asks_for_nothing_that_hooks_have_moved():
    """In a checkpoint, what was saved is made by running the region again."""
    _, ours = make_pair("reference")
    unpacked: list[torch.Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda t: unpacked.append(t) or t)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        ours(make_input("dense"))
    assert not unpacked


@pytest.mark.parametrize("backend", ["auto", *OWN])
def test_a_weight_changed_between_regions_is_cast_anew(backend):
    _, ours = make_pair(backend)
    x = make_input("unsorted")

    def output():
        with torch.autocast("cpu", torch.bfloat16):
            return ours(x)[0].data

    before = output()
    ours.weight_hh_l0.data.mul_(2)  # which no version counter sees
    assert not torch.equal(output(), before)


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recompute"])
@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("form", ["dense", "unsorted"])
def test_backward_inside_a_region(form, backend, recompute):
    """Backward computes in the precision of forward, whatever the region it is called in."""
    _, ours = make_pair(backend, bidirectional=True)
    ours.recompute = recompute
    # enough steps for "auto" not to leave a packed batch to stock, whose backward heeds the region
    packed = pack_sequence([torch.randn(n, I) for n in (9, 20)], enforce_sorted=False)
    x = make_input(form) if form == "dense" else packed

    def gradients(*regions: bool):
        forward, backward = (torch.autocast("cpu", torch.bfloat16, enabled=region) for region in regions)
        with forward:
            output, _ = ours(x)
        loss = (output.data if form == "unsorted" else output).float().square().sum()
        with backward:
            # the second time what was dropped is made again
            torch.autograd.grad(loss, list(ours.parameters()), retain_graph=True)
            return torch.autograd.grad(loss, list(ours.parameters()))

    for forward in (False, True):
        for inside, outside in zip(gradients(forward, True), gradients(forward, False), strict=True):
            assert inside.dtype == torch.float32
            assert torch.equal(inside, outside)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_checkpoint_inside_a_region(backend):
    _, ours = make_pair(backend)
    x = make_input("dense")
    with torch.autocast("cpu", torch.bfloat16):
        plain = ours(x)[0].float().sum()
        again: Any = checkpoint(lambda x: ours(x)[0].float().sum(), x, use_reentrant=False)
    weights = list(ours.parameters())
    assert all(map(torch.equal, torch.autograd.grad(plain, weights), torch.autograd.grad(again, weights)))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("low", LOW, ids=str)
@pytest.mark.parametrize(
    ("packed", "lengths"), [(False, ()), *itertools.product((True, False), ((30,) * 4, (3,) * 4, (1,)))], ids=str
)
def test_rows_of_one_length_inside_a_region(packed, lengths, low, backend):
    """Stock has oneDNN run them, where it can, even if they are packed."""
    stock, ours = make_pair(backend)
    x: Any = pack_sequence([torch.randn(n, I) for n in lengths]) if packed else torch.randn(9, len(lengths), I)
    with torch.autocast("cpu", low), torch.no_grad():
        output, states = ours(x)
        results = [output.data if packed else output, *states]
        if lengths and not cpu_rules.onednn_has(low, graph=False):
            with pytest.raises(RuntimeError, match="could not create a primitive descriptor"):
                stock(x)
            assert {result.dtype for result in results} == {low}
            return
        output, states = stock(x)
    expected = [output.data if packed else output, *states]
    assert [result.dtype for result in results] == [result.dtype for result in expected]


# numpy, which Triton's interpreter computes with, warns of the overflow
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_scaled_training_of_float32_weights(backend):
    """GradScaler finds an overflow, skips that step, and the weights stay float32."""
    ours = fastlstm.LSTM(I, 4, backend=backend)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    x = make_input("dense")
    before = copy.deepcopy(ours.state_dict())
    for factor in (float("inf"), 1.0):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = ours(x)[0].float().square().mean() * factor
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        changed = [not torch.equal(weight, before[name]) for name, weight in ours.named_parameters()]
        assert all(changed) if factor == 1 else not any(changed)
    assert scaler.get_scale() == 2.0**9
    assert {weight.dtype for weight in ours.parameters()} == {torch.float32}


def test_float64_is_left_alone():
    stock = STOCK_LSTM(I, 4, dtype=torch.float64)
    ours = fastlstm.LSTM(I, 4, dtype=torch.float64, backend="reference")
    ours.load_state_dict(stock.state_dict())
    x = make_input("dense", torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x)[0].dtype == torch.float64
        torch.testing.assert_close(ours(x)[0], run_lstm(ours, x)["output"])


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_device_that_knows_no_regions(backend):
    x = torch.randn(5, 2, 3, device="meta", requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        for lstm in (STOCK_LSTM(3, 4, device="meta"), fastlstm.LSTM(3, 4, device="meta", backend=backend)):
            output, _ = lstm(x)
            assert output.dtype == torch.float32
            output.sum().backward()
        assert fastlstm.LSTMCell(3, 4, device="meta", backend=backend)(x[0])[0].dtype == torch.float32
