"""Trials on real tensors, the kernels interpreted or on a GPU: candidates agree, and no caller is disturbed."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import fastlstm
from fastlstm import functional, tuning
from fastlstm.problem import Device, Problem
from fastlstm.timings import timings

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("may_time")

CPU = torch.device("cpu")
H100 = Device("cuda", "sm_90", "NVIDIA H100 80GB HBM3", 132)
BOTH = ("torch", "triton")


def fail(*_):
    raise torch.OutOfMemoryError("out of memory")


@pytest.fixture
def card(monkeypatch):
    """Take the CPU for an H100 wherever a choice is made; the kernels know better."""
    for module in (functional, tuning):
        monkeypatch.setattr(module, "device_of", lambda device: H100)


def test_a_call_times_and_nothing_of_the_callers_is_disturbed(card, monkeypatch):
    trials, trial = [], functional.trial
    monkeypatch.setattr(functional, "trial", lambda *given: trials.append(given) or trial(*given))
    lstm, x = fastlstm.LSTM(5, 6, num_layers=2, bidirectional=True), torch.randn(5, 2, 5)
    stock = nn.LSTM(5, 6, num_layers=2, bidirectional=True)
    stock.load_state_dict(lstm.state_dict())
    state = torch.get_rng_state()
    output, _ = lstm(x)
    assert torch.equal(state, torch.get_rng_state())
    assert len(trials) == 2
    assert all(parameter.grad is None for parameter in lstm.parameters())
    torch.testing.assert_close(output, stock(x)[0])

    decision = fastlstm.explain(lstm, x)
    assert {name for name, _ in decision.times} == {"torch", "triton resident-8"}
    assert all(0 < ms < math.inf for _, ms in decision.times)
    text = str(decision)
    assert "In trials of calls like this it was the fastest: torch " in text
    assert ", triton resident-8 " in text
    lstm(torch.randn(30, 2, 5))
    assert len(trials) == 2


def test_trials_know_none_of_the_callers_modes(card):
    class Watch(TorchDispatchMode):
        ops = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Watch.ops += 1
            return func(*args, **(kwargs or {}))

    lstm, x = fastlstm.LSTM(3, 4), torch.randn(5, 2, 3)
    with Watch(), torch.autograd.graph.saved_tensors_hooks(fail, fail), torch.autocast("cpu", torch.bfloat16):
        fastlstm.explain(lstm, x)
    (times,) = timings().entries.values()
    assert all(ms < math.inf for _, ms in times)
    assert Watch.ops < 10  # those of the call itself


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
@pytest.mark.parametrize("given", [{}, {"bidirectional": True, "num_layers": 2}, {"proj_size": 3}], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_trials_of_both_candidates_agree(given, packed):
    p = Problem(5, 3, 4, 6, dtype=torch.float32, training=True, runs=2 * packed)
    p = dataclasses.replace(
        p, P=given.get("proj_size", 0), L=given.get("num_layers", 1), D=1 + given.get("bidirectional", False)
    )
    results = {backend: functional.trial(p, CPU, backend)() for backend in BOTH}
    lstm = nn.LSTM(4, 6, **given)
    assert len(results["torch"]) == 4 + len(list(lstm.parameters()))
    for parameter, gradient in zip(lstm.parameters(), results["torch"][4:], strict=True):
        assert parameter.shape == gradient.shape
    for actual, expected in zip(results["triton"], results["torch"], strict=True):
        assert not actual.requires_grad
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    inference = functional.trial(dataclasses.replace(p, training=False), CPU, "torch")()
    assert [result.shape for result in inference] == [result.shape for result in results["torch"][:3]]


def test_both_passes_take_the_layout_that_won(monkeypatch):
    from fastlstm.kernels import launch

    asked, choose = [], launch.choose
    monkeypatch.setattr(launch, "choose", lambda *given: asked.append(given[2:]) or choose(*given))
    functional.trial(Problem(2, 1, 3, 4, training=True), CPU, "triton stepwise-16")()
    assert asked == [(False, "stepwise-16"), (True, "stepwise-16")]


def test_calls_that_are_traced_or_transformed_never_time(card, monkeypatch):
    monkeypatch.setattr(tuning, "times", fail)
    lstm, x = fastlstm.LSTM(3, 4), torch.randn(5, 2, 3)
    torch.compile(lstm, backend="eager", fullgraph=True)(x)
    torch.func.vmap(lstm)(x.unsqueeze(0))
    for backend in ("torch", "reference", "triton"):
        fastlstm.LSTM(3, 4, backend=backend)(x)
    monkeypatch.setenv("FASTLSTM_BACKEND", "reference")
    lstm(x)
    monkeypatch.setenv("FASTLSTM_BACKEND", "auto")
    with pytest.raises(torch.OutOfMemoryError):
        lstm(x)


@pytest.mark.parametrize("given", [{}, {"dropout": 0.5}, {"bidirectional": True, "proj_size": 2}], ids=str)
def test_what_is_timed_is_the_call(given, card, monkeypatch):
    asked = []
    monkeypatch.setattr(tuning, "times", lambda problem, *_: asked.append(problem) or ())
    decision = fastlstm.explain(fastlstm.LSTM(3, 4, num_layers=2, **given), torch.randn(5, 2, 3))
    assert asked == [decision.problem]
    assert decision.problem.apart == ("dropout" in given)
    with torch.autocast("cpu", torch.bfloat16):
        decision = fastlstm.explain(fastlstm.LSTM(3, 4, num_layers=2, **given), pack_sequence([torch.randn(5, 3)] * 2))
    assert asked[1:] == [decision.problem]
    assert (decision.problem.dtype, decision.problem.runs) == (torch.bfloat16, 1)


def test_packed_calls_time(card):
    lstm = fastlstm.LSTM(3, 4)
    with torch.no_grad():
        decision = fastlstm.explain(lstm, pack_sequence([torch.randn(n, 3) for n in (5, 4, 2)]))
    assert decision.times
    assert not decision.problem.training


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestOnAGpu:
    @pytest.mark.parametrize("packed", [False, True])
    def test_a_call_takes_the_fastest(self, packed):
        lstm = fastlstm.LSTM(64, 256, device="cuda", dtype=torch.float16)
        x = torch.randn(50, 8, 64, device="cuda", dtype=torch.float16)
        if packed:
            x = pack_sequence([x[:n, 0] for n in (50, 40, 40, 10)])
        state = torch.cuda.get_rng_state()
        with torch.cuda.stream(torch.cuda.Stream()), torch.no_grad():
            lstm(x)
        assert torch.equal(state, torch.cuda.get_rng_state())
        with torch.no_grad():
            decision = fastlstm.explain(lstm, x)
        assert {name for name, ms in decision.times if ms < math.inf} >= {"torch", "triton persistent-16"}
        assert decision.implementation == decision.times[0][0]
        assert timings().path.exists()

    def test_a_captured_call_is_not_timed(self):
        lstm = fastlstm.LSTM(64, 64, device="cuda", dtype=torch.float16)
        x = torch.randn(50, 8, 64, device="cuda", dtype=torch.float16)
        with torch.no_grad():
            expected, _ = fastlstm.LSTM.forward(lstm, x)  # times, compiles
            timings().clear()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output, _ = lstm(x)
            graph.replay()
        assert not timings().entries
        torch.testing.assert_close(output, expected, atol=1e-2, rtol=1e-2)
