"""All layers of a stack in one launch: right, race-free, and each fault is seen; without room, layer after layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import assert_close, run_lstm
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils.rnn import pack_sequence

pytest.importorskip("triton")

import triton
import triton.language as tl
from barriers import MUTANTS, WAITS_FOR_TOO_MANY, replaced
from recurrence import FORWARD, H100
from scheduler import HangError, scheduled
from shadow_memory import RaceError

import fastlstm
from fastlstm import autograd, functional, reference
from fastlstm.dispatch import interpreting
from fastlstm.kernels import backward_persistent, forward_persistent, launch, wavefront
from fastlstm.kernels.barrier import wait_unless
from fastlstm.plans import Plan

pytestmark = pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1")

# small enough for the interpreter
PLAN = Plan("wavefront", BLOCK_H=8, BLOCK_B=4, BLOCK_K=16, num_warps=1, TAIL_K=16, AHEAD=1)
LENGTHS = (5, 4, 4, 2, 1, 1)  # rows of one tile and of two, in falling length
ALL = (*FORWARD, "dgates", "dc0")


class Stack:
    """The recurrences of L layers with random inputs, to run one after the other in plain torch or all at once."""

    def __init__(self, H: int, lengths: Sequence[int], dtype: torch.dtype = torch.float32, L: int = 2, packed=False):
        T, B = max(lengths), len(lengths)
        self.batch_sizes = torch.tensor([sum(n > t for n in lengths) for t in range(T)]) if packed else None
        self.L, self.H, self.dtype = L, H, dtype
        N = sum(lengths) if packed else T * B
        generator = torch.Generator().manual_seed(H + B + L)
        shapes = ((N, 4 * H), (L - 1, 4 * H), (L, B, H), (L, B, H), (L - 1, 4 * H, H), (L, 4 * H, H))
        cotangents = ((N, H), (L, B, H), (L, B, H))
        drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes + cotangents]
        for weight in drawn[4:6]:
            weight /= H**0.5
        self.inputs, self.cotangents = ([tensor.to(dtype) for tensor in part] for part in (drawn[:6], drawn[6:]))

    def by_reference(self, dtype: torch.dtype) -> dict[str, Tensor]:
        gates_x, bias, h0, c0, w_ih, w_hh = (tensor.to(dtype, copy=True) for tensor in self.inputs)
        dy, dh_n, dc_n = (tensor.to(dtype) for tensor in self.cotangents)
        layers = [slice(n, n + 1) for n in range(self.L)]
        forward: list[Any] = []
        for n, layer in enumerate(layers):
            x = linear(forward[-1][0], w_ih[n - 1], bias[n - 1]) if n else gates_x
            forward.append(reference.lstm_forward(x, h0[layer], c0[layer], w_hh[layer], None, self.batch_sizes, True))
        backward: list[Any] = []
        for n, layer in reversed(list(enumerate(layers))):
            saved: Any = (*forward[n][3:], c0[layer], w_hh[layer], None, self.batch_sizes)
            backward.insert(0, reference.lstm_backward(dy, dh_n[layer], dc_n[layer], *saved)[:2])
            dy = backward[0][0] @ w_ih[n - 1]
        results = (*zip(*forward, strict=True), *zip(*backward, strict=True))
        return {name: torch.cat(r, 1 if r[0].dim() == 2 else 0) for name, r in zip(ALL, results, strict=True)}

    def by_kernels(self, seed: int = 0, save: bool = True, **changes: Any) -> dict[str, Tensor]:
        """All layers at once, in an order drawn from `seed`."""
        plan = dataclasses.replace(PLAN, **changes)
        columns = (self.H, 2 * -(-self.H // plan.BLOCK_H) * plan.BLOCK_H)
        plans = [dataclasses.replace(plan, KEPT=(k - 1) // plan.BLOCK_K) for k in columns]
        with scheduled(seed=seed):
            forward = wavefront.stack_forward(*self.inputs, self.batch_sizes, save, plan=plans[0])
            if not save:
                return dict(zip(FORWARD[:3], forward, strict=False))
            output, _, _, gates, cells = forward
            dy, *states = self.cotangents
            d_output = torch.full_like(output, float("nan"))
            d_output[:, -self.H :] = dy
            given = d_output.clone()
            saved = (gates, cells, self.inputs[3], *self.inputs[4:])
            backward = wavefront.stack_backward(d_output, *states, *saved, self.batch_sizes, plan=plans[1])
        torch.testing.assert_close(d_output, given, rtol=0, atol=0, equal_nan=True)  # it is the caller's
        return dict(zip(ALL, (*forward, *backward), strict=True))

    def check(self, seed: int = 0, **changes: Any) -> None:
        truth, stock = self.by_reference(torch.float64), self.by_reference(self.dtype)
        assert_close(self.by_kernels(seed, **changes), truth, stock, dtype=self.dtype)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize(("H", "B", "L"), [(9, 2, 2), (16, 6, 2), (24, 3, 3)], ids=lambda value: str(value))
def test_against_float64(H, B, L, packed):
    """Two or three programs a layer, one tile of rows or two."""
    for seed in range(2):
        Stack(H, LENGTHS[:B], L=L, packed=packed).check(seed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits(dtype):
    Stack(16, LENGTHS[:3], dtype, packed=True).check()


@pytest.mark.parametrize("T", [1, 2])
def test_fewer_steps_than_a_layer_runs_ahead(T):
    Stack(16, (T, T), L=3).check()


@pytest.mark.parametrize("layout", [{"AHEAD": 2}, {"SPLIT": 2}, {"BLOCK_H": 16, "BLOCK_B": 2}, {"groups": 2}], ids=str)
def test_other_layouts(layout):
    """Among them one tile of rows, with both layers, a launch."""
    Stack(24, LENGTHS[:5], packed=True).check(**layout)


def test_result_depends_neither_on_interleaving_nor_on_save():
    stack = Stack(24, LENGTHS[:3], torch.float16, packed=True)
    first, other = stack.by_kernels(seed=1), stack.by_kernels(seed=2)
    for name, tensor in first.items():
        assert torch.equal(tensor, other[name]), name
    for name, tensor in stack.by_kernels(seed=3, save=False).items():
        assert torch.equal(tensor, first[name]), name


@triton.jit
def _never(counter_ptr, target, seen):
    return target


@triton.jit
def _relaxed(counter_ptr, target, seen):
    while seen < target:
        seen = tl.atomic_add(counter_ptr, 0, sem="relaxed", scope="gpu")
    tl.debug_barrier()
    return seen


@triton.jit
def _alone(counter_ptr, target, seen):
    while seen < target:
        seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    return seen


@triton.jit
def _one_less(counter_ptr, target, seen):
    return wait_unless(counter_ptr, target - 1, seen)


@triton.jit
def _before_the_last_arrival(counter_ptr, target, seen):
    return wait_unless(counter_ptr, target - 2, seen)  # two programs a layer


@triton.jit
def _too_many(counter_ptr, target, seen):
    return wait_unless(counter_ptr, target + (target > 0), seen)


# what the programs of another layer publish
BETWEEN_LAYERS = {
    "no wait for the other layer": {"wait_unless": _never},
    "no acquire from the other layer": {"wait_unless": _relaxed},
    "no block barrier after the other layer": {"wait_unless": _alone},
    "waits for N-1 of the other layer": {"wait_unless": _one_less},
    "reads what the next arrival publishes": {"wait_unless": _before_the_last_arrival},
}
KERNELS = pytest.mark.parametrize("module", [forward_persistent, backward_persistent], ids=["forward", "backward"])


def faulty(module: ModuleType, functions: dict[str, Any], packed: bool = False) -> None:
    """Two programs in each of two layers, in four interleavings: by chance every program may be in time."""
    stack = Stack(16, (6, 5, 4), packed=packed)
    with replaced(module, functions):
        for seed in range(4):
            stack.by_kernels(seed)


@pytest.mark.parametrize("mutant", [name for name in MUTANTS if name != "single buffer"])
@KERNELS
def test_every_fault_within_a_layer_is_a_race(module, mutant):
    with pytest.raises(RaceError, match=r"(exchange|partials|counters|d_output)_ptr\["):
        faulty(module, MUTANTS[mutant])


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("mutant", BETWEEN_LAYERS)
@KERNELS
def test_every_fault_between_layers_is_a_race(module, mutant, packed):
    with pytest.raises(RaceError, match=r"(exchange|d_output)_ptr\["):
        faulty(module, BETWEEN_LAYERS[mutant], packed)


def test_single_buffer_of_parts_is_a_race():
    with pytest.raises(RaceError, match=r"partials_ptr\["):
        faulty(backward_persistent, MUTANTS["single buffer"])


@pytest.mark.parametrize("functions", [WAITS_FOR_TOO_MANY, {"wait_unless": _too_many}], ids=["own", "other"])
@KERNELS
def test_waiting_for_too_many_hangs(module, functions):
    with pytest.raises(HangError, match="counters_ptr"):
        faulty(module, functions)


def lstm(T: int = 4, packed: bool = False, dtype: torch.dtype = torch.float16, **options: Any) -> tuple[Any, Any, Any]:
    """An LSTM whose layers an H100 holds all at once, if the options let it; an input and states."""
    network = fastlstm.LSTM(5, 130, **{"num_layers": 2, "backend": "triton", **options}, dtype=dtype)
    lengths = (T, T - 1, 1)
    x: Any = (
        pack_sequence([torch.randn(n, 5, dtype=dtype) for n in lengths]) if packed else torch.randn(T, 3, 5).to(dtype)
    )
    return network, x, tuple(torch.randn(2, 3, 130).to(dtype) for _ in range(2))


@pytest.fixture
def grids(monkeypatch) -> list[tuple[int, int]]:
    """An H100 to every eye but torch's; the grids of the launches of a stack."""
    found, launched = [], launch.together

    def together(kernel, grid, **arguments):
        found.append(grid)
        launched(kernel, grid, **arguments)

    for module in (functional, launch):
        monkeypatch.setattr(module, "device_of", lambda device: H100)
    monkeypatch.setattr(launch, "together", together)
    return found


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_module(packed, grids):
    """Output, states and every gradient, in one launch each way, with the layout that an H100 gets."""
    network, x, hx = lstm(packed=packed)
    assert fastlstm.explain(network, x, hx).regime == "wavefront"
    with scheduled():
        results = run_lstm(network, x, hx)
    assert grids == [(9, 2), (9, 2)]
    assert results["output"].is_contiguous()
    truth = nn.LSTM(5, 130, num_layers=2, dtype=torch.float64)
    truth.load_state_dict(network.state_dict())
    wide = x._replace(data=x.data.double()) if packed else x.double()
    network.backend = "reference"
    expected = run_lstm(truth, wide, tuple(state.double() for state in hx))
    assert_close(results, expected, run_lstm(network, x, hx), dtype=torch.float16)


def test_inference_and_autocast(grids):
    network, x, hx = lstm(bias=False, dtype=torch.float32)
    with torch.no_grad(), scheduled(), torch.autocast("cpu", torch.float16):
        assert fastlstm.explain(network, x, hx).regime == "wavefront"
        output, (h_n, c_n) = network(x, hx)
    assert grids == [(9, 2)]
    network.backend = "reference"
    with torch.no_grad():
        expected, (right_h, right_c) = network(x, hx)
    for actual, right in zip((output, h_n, c_n), (expected, right_h, right_c), strict=True):
        torch.testing.assert_close(actual.float(), right, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize(
    ("options", "together"),
    [
        ({"dropout": 0.5}, False),
        ({"proj_size": 20}, False),
        ({"bidirectional": True}, False),
        ({"recompute": True}, False),
        ({"num_layers": 1}, False),
        ({"num_layers": 20}, False),
        ({"num_layers": 14}, True),
    ],
    ids=str,
)
def test_when_layers_run_together(options, together, grids):
    network, x, _ = lstm(**options)
    assert (fastlstm.explain(network, x).regime == "wavefront") == together
    with torch.no_grad():
        evaluated = fastlstm.explain(network.eval(), x).regime
    assert (evaluated == "wavefront") == (together or "dropout" in options or "recompute" in options)


def test_derivatives_of_gradients_and_transforms():
    """Where there is no GPU a stack runs layer by layer, and what is around it is the same."""
    stock = nn.LSTM(3, 4, num_layers=3, dtype=torch.float32)
    weights = [parameter.detach().requires_grad_() for parameter in stock.parameters()]
    x, h0, c0 = torch.randn(10, 3).requires_grad_(), torch.randn(3, 2, 4), torch.randn(3, 2, 4).requires_grad_()
    leaves = [x, c0, *weights]

    def stacked(x):
        output, h_n, c_n = autograd.lstm_layer(x, h0, c0, weights, None, "triton", stack=True)
        return output.sin().sum() + h_n.sum() + c_n.cos().sum()

    def in_turn(x):
        states = []
        for n in range(3):
            part = slice(n, n + 1)
            x, *last = autograd.lstm_layer(x, h0[part], c0[part], weights[4 * n : 4 * n + 4], None, "reference")
            states.append(last)
        h_n, c_n = (torch.cat(parts) for parts in zip(*states, strict=True))
        return x.sin().sum() + h_n.sum() + c_n.cos().sum()

    for run in (lambda f: f(x).unsqueeze(0), lambda f: torch.autograd.grad(f(x), leaves)):
        for actual, right in zip(run(stacked), run(in_turn), strict=True):
            torch.testing.assert_close(actual, right, atol=1e-5, rtol=1e-5)
    second = []
    for f in (stacked, in_turn):
        gradients = torch.autograd.grad(f(x), leaves, create_graph=True)
        second.append(torch.autograd.grad(torch.stack([g.square().sum() for g in gradients]).sum(), leaves))
    for actual, right in zip(*second, strict=True):
        torch.testing.assert_close(actual, right, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.func.grad(stacked)(x), torch.func.grad(in_turn)(x), atol=1e-5, rtol=1e-5)


def test_the_op_of_a_stack_is_well_formed():
    flat = [parameter.detach() for parameter in nn.LSTM(3, 4, num_layers=2).parameters()]
    forward = (torch.randn(6, 3), torch.randn(2, 2, 4), torch.randn(2, 2, 4), flat, None, True, False, "triton", True)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(autograd.lstm_forward, forward, test_utils=tests)
    output, h_n, c_n, gates, cells = autograd.lstm_forward(*forward)
    saved = (gates, cells, forward[2], [flat[1], flat[5]], [], None, "triton", flat[4].unsqueeze(0))
    torch.library.opcheck(autograd.lstm_backward, (output, h_n, c_n, *saved), test_utils=tests)
