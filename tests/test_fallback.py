"""A grid that the driver refuses is laid out anew: nothing hangs, and a call that can run does.

The driver is a stand-in, which counts programs and speaks the driver's words; what it accepts runs interpreted, in the
stepwise kernels.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any

import pytest
import torch

from fastlstm import problem, reference
from fastlstm.plans import choose
from fastlstm.problem import Device, Problem, device_of

triton = pytest.importorskip("triton")

from fastlstm.kernels import launch, wavefront  # noqa: E402

H100 = Device("cuda", "sm_90", "NVIDIA H100 80GB HBM3", 132)
TOO_MANY = RuntimeError("Triton Error [CUDA]: too many blocks in cooperative launch")
NEVER = RuntimeError("Triton Error [CUDA]: operation not supported")
NO_ROOM = triton.OutOfResources(240 << 10, 227 << 10, "shared memory")


class Driver:
    """Refuses grids of kernels that meet, with `error`, where they have more than `room` programs; counts them all."""

    def __init__(self, monkeypatch, error: Exception, room: int = 0):
        self.error, self.room = error, room
        self.device = H100
        self.grids: list[int] = []
        for name in ("forward_persistent", "backward_persistent"):
            monkeypatch.setattr(launch, name, self)
        monkeypatch.setattr(launch, "device_of", lambda device: self.device)
        monkeypatch.setattr(launch, "limit_processors", self.limit)

    def __getitem__(self, grid):
        def launched(**arguments):
            assert arguments["launch_cooperative_grid"]
            self.grids.append(math.prod(grid))
            if self.grids[-1] > self.room:
                raise self.error

        return launched

    def limit(self, device: torch.device, most: int) -> None:
        assert most < self.device.processors
        self.device = dataclasses.replace(self.device, processors=most)


def layer(H: int = 80, B: int = 3) -> Any:
    """Return the arguments of a forward pass over 2 steps."""
    gates_x = 0.1 * torch.randn(2 * B, 4 * H)
    return gates_x, torch.randn(1, B, H), torch.randn(1, B, H), 0.1 * torch.randn(1, 4 * H, H), None, None, True


def copied(arguments: Any, device: torch.device | None = None) -> Any:
    """Return the arguments with new tensors: a pass writes into some of them."""
    return [t.to(device, copy=True) if isinstance(t, torch.Tensor) else t for t in arguments]


@pytest.fixture(autouse=True)
def _with_tf32(monkeypatch):
    monkeypatch.setattr(launch, "precision", lambda dtype, device: "tf32")


@pytest.mark.parametrize("error", [TOO_MANY, NEVER, NO_ROOM], ids=["too many", "never", "no room"])
def test_a_refused_grid_gives_way_to_stepwise(error, monkeypatch):
    driver = Driver(monkeypatch, error)
    arguments = layer()
    assert choose(Problem(2, 3, 80, 80), H100).regime == "persistent"
    expected = reference.lstm_forward(*copied(arguments))
    found = launch.lstm_forward(*arguments)
    for actual, right in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, right, atol=1e-5, rtol=1e-5)
    assert driver.grids
    assert driver.device.processors < driver.grids[-1]

    # remembered: backward, and the next call, do not ask for as many
    asked = list(driver.grids)
    output, _, _, gates, cells = found
    cotangents = (torch.randn_like(output), torch.randn(1, 3, 80), torch.randn(1, 3, 80))
    saved = (gates, cells, arguments[2], arguments[3], None, None)
    dgates, dc0, _ = launch.lstm_backward(*cotangents, *saved)
    right_dgates, right_dc0, _ = reference.lstm_backward(*cotangents, *saved)
    torch.testing.assert_close(dgates, right_dgates, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dc0, right_dc0, atol=1e-5, rtol=1e-5)
    launch.lstm_forward(*layer())
    assert driver.grids == asked


def test_backward_falls_back_by_itself(monkeypatch):
    driver = Driver(monkeypatch, TOO_MANY)
    cotangents = (torch.randn(6, 80), torch.randn(1, 3, 80), torch.randn(1, 3, 80))
    saved = (torch.rand(6, 320), torch.randn(6, 80), torch.randn(1, 3, 80), torch.randn(1, 320, 80), None, None)
    dgates, _, _ = launch.lstm_backward(*cotangents, *saved)
    assert driver.grids
    torch.testing.assert_close(dgates, reference.lstm_backward(*cotangents, *saved)[0], atol=1e-4, rtol=1e-4)


def test_a_refused_stack_runs_layer_by_layer(monkeypatch):
    driver = Driver(monkeypatch, TOO_MANY)
    T, B, H, L = 2, 3, 80, 2
    assert choose(Problem(T, B, H, H, L=L), H100).regime == "wavefront"
    gates_x, bias, w_ih, w_hh, h0, c0, d_output, dh_n, dc_n = (
        0.1 * torch.randn(shape)
        for shape in ((T * B, 4 * H), (1, 4 * H), (1, 4 * H, H), (L, 4 * H, H), *[(L, B, H)] * 2, (T * B, L * H))
        + ((L, B, H),) * 2
    )
    states = [(h0[n : n + 1], c0[n : n + 1], w_hh[n : n + 1], None, None) for n in range(L)]
    first = reference.lstm_forward(gates_x.clone(), *states[0], True)
    second = reference.lstm_forward(first[0] @ w_ih[0].T + bias, *states[1], True)
    found = wavefront.stack_forward(gates_x, bias, h0, c0, w_ih, w_hh, None, True)
    for actual, *right in zip(found, first, second, strict=True):
        torch.testing.assert_close(actual, torch.cat(right, int(right[0].dim() == 2)), atol=1e-5, rtol=1e-5)
    assert driver.grids[0] == 10

    driver.device = H100
    gates, cells = found[3:]
    dgates, dc0 = wavefront.stack_backward(d_output, dh_n, dc_n, gates, cells, c0, w_ih, w_hh, None)
    saved = [(*layer[3:], *states[n][1:]) for n, layer in enumerate((first, second))]
    right_2, dc0_2, _ = reference.lstm_backward(d_output[:, H:], dh_n[1:], dc_n[1:], *saved[1])
    right_1, dc0_1, _ = reference.lstm_backward(right_2 @ w_ih[0], dh_n[:1], dc_n[:1], *saved[0])
    torch.testing.assert_close(dgates, torch.cat((right_1, right_2), 1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dc0, torch.cat((dc0_1, dc0_2)), atol=1e-5, rtol=1e-5)


def test_a_smaller_grid_is_tried_before_stepwise(monkeypatch):
    driver = Driver(monkeypatch, TOO_MANY, room=10)
    launch.lstm_forward(*layer(H=160, B=64))
    assert driver.grids[0] > 10
    assert driver.grids[-1] <= 10
    assert 10 <= driver.device.processors < driver.grids[0]


def test_a_layout_that_was_asked_for_is_an_error(monkeypatch):
    driver = Driver(monkeypatch, TOO_MANY)
    plan = choose(Problem(2, 3, 80, 80), H100)
    with pytest.raises(RuntimeError, match=r"A grid was refused: .* too many blocks in cooperative launch"):
        launch.lstm_forward(*layer(), plan=plan)
    assert len(driver.grids) == 1
    assert driver.device == H100


def test_a_refusal_that_fewer_programs_cannot_mend_is_an_error(monkeypatch):
    """A driver that refuses less than the card is said to hold, again and again, must not be asked forever."""
    driver = Driver(monkeypatch, TOO_MANY)
    driver.device = dataclasses.replace(H100, processors=4)  # and the layout has 5 programs
    monkeypatch.setattr(launch, "choose", lambda *_: choose(Problem(2, 3, 80, 80), H100))
    with pytest.raises(RuntimeError, match="A grid was refused"):
        launch.lstm_forward(*layer())


@pytest.mark.parametrize("error", [RuntimeError("Triton Error [CUDA]: an illegal memory access"), ValueError("a bug")])
def test_other_errors_pass_through(error, monkeypatch):
    driver = Driver(monkeypatch, error)
    with pytest.raises(type(error), match=str(error).replace("[", r"\[")):
        launch.lstm_forward(*layer())
    assert len(driver.grids) == 1


def test_a_pass_that_has_begun_is_not_run_again(monkeypatch):
    """Its first grid has overwritten the gates of its rows."""
    driver = Driver(monkeypatch, TOO_MANY)
    with pytest.raises(RuntimeError, match="too many blocks"):
        launch.together(driver, (4, 2), first=2, launch_cooperative_grid=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or bool(torch.version.hip), reason="needs an NVIDIA GPU")
def test_a_real_driver_refuses_what_does_not_fit(monkeypatch):
    """The card is said to be ten times as large as it is."""
    on = torch.device("cuda", torch.cuda.current_device())
    monkeypatch.setattr(problem, "_gpus", {})
    monkeypatch.setattr(problem, "_limited", set())
    real = device_of(on)
    problem._gpus[on.index or 0] = dataclasses.replace(real, processors=10 * real.processors)
    arguments = copied(layer(H=256, B=16 * real.processors), on)
    if choose(Problem(2, 16 * real.processors, 256, 256), device_of(on)).regime == "stepwise":
        pytest.skip("no persistent layout on this card")
    expected = reference.lstm_forward(*copied(arguments))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = launch.lstm_forward(*arguments)
    torch.testing.assert_close(found[0], expected[0], atol=1e-2, rtol=1e-2)
    assert device_of(on).processors < 10 * real.processors
