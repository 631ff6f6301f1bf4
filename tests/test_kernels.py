"""The Triton kernels against the float64 reference: under the interpreter on a CPU, natively where there is a GPU."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

pytest.importorskip("triton")

from helpers import assert_close, run_lstm
from recurrence import FORWARD, H100, Run

import fastlstm
from fastlstm.dispatch import interpreting
from fastlstm.kernels import launch
from fastlstm.plans import Plan, choose
from fastlstm.problem import Device, Problem, device_of

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.skipif(not interpreting(), reason="TRITON_INTERPRET is not set")),
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available() or interpreting(), reason="needs a GPU"),
            ],
        ),
    ]
)
def device(request) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(params=["resident", "stepwise"])
def regime(request) -> str:
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("H", "B", "T"), [(1, 1, 1), (5, 3, 7), (20, 17, 2), (33, 3, 2)])
def test_dense(H, B, T, dtype, regime, device):
    Run(H, [T] * B, dtype).check(regime, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("H", "lengths"),
    [(5, (7, 5, 5, 2, 1)), (20, (3,) * 7 + (2,) * 4 + (1,) * 6), (33, (2, 1))],
    ids=["runs", "tiles", "units"],
)
def test_packed(H, lengths, dtype, regime, device):
    Run(H, lengths, dtype, packed=True).check(regime, device)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("P", [1, 3])
@pytest.mark.parametrize("D", [1, 2])
def test_projection(D, P, packed, regime, device):
    results = Run(6, (4, 2, 2), torch.float32, D, P, packed).check(regime, device)
    assert all(tensor.is_contiguous() for tensor in results.values())


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_without_save_the_results_are_the_same_bits(packed, regime, device):
    run = Run(5, (3, 2, 1), torch.float16, packed=packed)
    saved = run.by_kernels(regime, device)
    inputs, _ = run.to(device)
    results = launch.lstm_forward(*inputs, run.batch_sizes, False, run.plan(regime, False))  # pyright: ignore
    for name, tensor in zip(FORWARD[:3], results, strict=False):
        assert torch.equal(tensor.cpu(), saved[name]), name
    assert [tensor.numel() for tensor in results[3:]] == [0, 0]


def test_two_runs_are_bitwise_equal(regime, device):
    run = Run(20, (5, 4, 4, 1), torch.bfloat16, packed=True)
    first, second = run.by_kernels(regime, device), run.by_kernels(regime, device)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


# the interpreter computes with numpy, which warns of an overflow in exp, and of inf - inf, which is not selected
@pytest.mark.filterwarnings("ignore:overflow encountered in exp", "ignore:invalid value encountered")
@pytest.mark.parametrize("value", [100.0, float("inf")])
def test_saturated_gates(value, regime, device):
    run = Run(5, (3, 3, 3), torch.float32)
    signs = torch.randint(0, 3, run.gates_x.shape, generator=torch.Generator().manual_seed(0))
    run.gates_x[signs == 0] = value
    run.gates_x[signs == 1] = -value
    results = run.check(regime, device)
    assert all(tensor.isfinite().all() for tensor in results.values())


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 0.2])
def test_small_numbers_keep_their_digits(scale, regime, device):
    Run(5, (4, 4, 4), torch.float32).check_digits(scale, regime, device)


def test_rows_are_independent(regime, device):
    run = Run(5, (4, 3, 3, 2), torch.float32, packed=True)
    clean = run.by_kernels(regime, device)
    run.c0[:, 1] = float("nan")
    poisoned = run.by_kernels(regime, device)
    assert poisoned["c_n"][:, 1].isnan().all()
    others = [0, 2, 3]
    for name in ("h_n", "c_n", "dc0"):
        assert torch.equal(poisoned[name][:, others], clean[name][:, others]), name


def test_any_stride(regime, device):
    run = Run(5, (2, 2, 2), torch.float32)
    expected = run.by_kernels(regime, device)
    run.h0, run.c0 = (state.transpose(0, 1).contiguous().transpose(0, 1) for state in (run.h0, run.c0))
    run.w_hh = run.w_hh.mT.contiguous().mT
    run.cotangents[0] = run.cotangents[0].t().contiguous().t()
    copies, _ = run.to(device)
    assert not any(tensor.is_contiguous() for tensor in copies[1:4] if tensor is not None)
    for name, tensor in run.by_kernels(regime, device).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("T", [0, 3])
def test_nothing_to_do(T, regime, device):
    """No rows, or no steps: nothing is launched, and the states pass through."""
    B = 0 if T else 2
    h0, c0, w_hh = (torch.randn(shape, device=device) for shape in ((1, B, 4), (1, B, 4), (1, 16, 4)))
    empty = torch.empty(0, 16, device=device)
    output, h_n, c_n, gates, cells = launch.lstm_forward(empty, h0, c0, w_hh, None, None, True)
    assert output.shape == (0, 4)
    assert torch.equal(h_n, h0)
    assert torch.equal(c_n, c0)
    dgates, dc0, _ = launch.lstm_backward(output, h0, c0, gates, cells, c0, w_hh, None, None)
    assert dgates.shape == (0, 16)
    assert torch.equal(dc0, c0)


class Shifted(Tensor):
    """A tensor of rows whose pointer lies `ROWS` rows before its data."""

    ROWS = 2**31 + 5

    def data_ptr(self) -> int:
        return super().data_ptr() - self.ROWS * self.stride(0) * self.element_size()


class ShiftedLaunch:
    """A kernel launched with every row number `Shifted.ROWS` higher, and every pointer to rows as much lower.

    A row number that passes through 32 bits on its way into an address then points nowhere near a tensor.
    """

    ROW_POINTERS = ("gates_x_ptr", "output_ptr", "gates_ptr", "cells_ptr", "d_output_ptr", "dgates_ptr")

    def __init__(self, kernel):
        self.kernel = kernel
        self.launches = 0

    def __getitem__(self, grid):
        def run(**arguments):
            self.launches += 1
            shifted = {name: arguments[name].as_subclass(Shifted) for name in self.ROW_POINTERS if name in arguments}
            offsets = arguments["offsets_ptr"] + Shifted.ROWS
            self.kernel[grid](**{**arguments, **shifted, "offsets_ptr": offsets})

        return run


# one program has all units, so that it waits for no other, and the interpreter can run it
ALONE = Plan("persistent", BLOCK_H=16, BLOCK_B=16, BLOCK_K=16, num_warps=1, TAIL_K=16, AHEAD=1)


@pytest.mark.skipif(not interpreting(), reason="CUDA refuses pointers to memory that it does not know")
@pytest.mark.parametrize(
    ("regime", "expected"),
    # stepwise a launch a step; otherwise one for all steps, and of one direction where two do not fit at once
    [("resident", 1), ("stepwise", 3), ("persistent", 1), (dataclasses.replace(ALONE, groups=1), 2)],
    ids=["resident", "stepwise", "persistent", "slices"],
)
def test_row_numbers_beyond_32_bits(regime, expected, monkeypatch):
    plan = ALONE if regime == "persistent" else regime
    kernel = plan.kernel if isinstance(plan, Plan) else plan
    launches = []
    for name in (f"forward_{kernel}", f"backward_{kernel}"):
        launches.append(ShiftedLaunch(getattr(launch, name)))
        monkeypatch.setattr(launch, name, launches[-1])
    Run(5, (3, 2, 2), torch.float32, D=2, packed=True).check(plan, torch.device("cpu"))
    assert [kernel.launches for kernel in launches] == [expected] * 2


@pytest.mark.parametrize("setting", ["tf32", "ieee"])
def test_precision_follows_torch(setting, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", setting == "tf32")
    assert launch.precision(torch.float32, H100) == setting
    assert launch.precision(torch.float16, H100) == "ieee"
    assert launch.precision(torch.float32, Device("hip", "gfx942")) == "ieee"


def test_programs_alone_on_a_processor_take_all_its_registers():
    """As compiled for the budgets; AMD's compiler knows no such option, and others would only lose by it."""
    MI300X = Device("hip", "gfx942", processors=304)
    for device, H, expected in ((H100, 512, 255), (H100, 64, None), (H100, 2048, None), (MI300X, 512, None)):
        for L in (1, 2):  # with two layers, at H=512 a plan for both at once
            plan = choose(Problem(1, 16, H, H, L=L, dtype=torch.float16), device)
            assert launch._layout(plan, False, device).get("maxnreg") == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or interpreting(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize(("H", "B"), [(160, 1), (256, 16), (300, 40), (512, 33), (650, 16), (1024, 16), (1500, 5)])
def test_what_dispatch_chooses(H, B, packed, dtype, monkeypatch):
    """Large sizes natively: the persistent kernels where they fit, with TF32 off and so others for float32."""
    lengths = [max(1, 40 - n) for n in range(B)]
    device = device_of(torch.device("cuda"))
    run = Run(H, lengths, dtype, packed=packed)
    problem = Problem(40, B, H, H, D=2, dtype=dtype, tf32=False)
    plans = [choose(problem, device, backward) for backward in (False, True)]
    monkeypatch.setattr(run, "plan", lambda regime, backward: plans[backward])
    run.check("chosen", torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or interpreting(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize(("H", "L", "B"), [(160, 3, 1), (256, 2, 40), (300, 2, 16), (512, 2, 20), (512, 3, 16)])
def test_a_stack_as_dispatch_runs_it(H, L, B, packed, dtype):
    """Natively, all layers at once where they fit the card."""
    lengths = [max(1, 40 - n) for n in range(B)]
    network = fastlstm.LSTM(64, H, num_layers=L, backend="triton", device="cuda", dtype=dtype)
    xs = [torch.randn(n if packed else 40, 64).to("cuda", dtype) for n in lengths]
    x = pack_sequence(xs) if packed else torch.stack(xs, 1)
    hx = tuple(torch.randn(L, B, H).to("cuda", dtype) for _ in range(2))
    truth = nn.LSTM(64, H, num_layers=L, device="cuda", dtype=torch.float64)
    truth.load_state_dict(network.state_dict())
    results = run_lstm(network, x, hx)
    expected = run_lstm(truth, x.to(torch.float64), tuple(state.double() for state in hx))
    network.backend = "reference"
    assert_close(results, expected, run_lstm(network, x, hx), dtype=dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or interpreting(), reason="needs a GPU")
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize(("H", "B"), [(64, 16), (256, 32), (512, 16), (1500, 16)])
def test_tf32_is_as_near_as_cudnns(H, B, packed, monkeypatch):
    """Over a long sequence what rounds all one way adds up, in the gradient of a bias most of all."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    stock = nn.LSTM(64, H, device="cuda")
    network = fastlstm.LSTM(64, H, backend="triton", device="cuda")
    network.load_state_dict(stock.state_dict())
    xs = [torch.randn(128 - n * packed, 64) for n in range(B)]
    x: Any = pack_sequence(xs) if packed else torch.stack(xs, 1)
    x = x.to("cuda")
    truth = run_lstm(copy.deepcopy(stock).double(), x.to(torch.float64))
    assert_close(run_lstm(network, x), truth, run_lstm(stock, x), dtype=torch.float32)
