"""Plans and decisions for a table of devices, none of which is needed."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from devices import GPUS

from fastlstm import dispatch, plans
from fastlstm import problem as limits
from fastlstm.dispatch import BACKENDS, Decision, candidates, decide, decide_layer, has_choice
from fastlstm.plans import choose
from fastlstm.problem import Device, Problem, device_of, limit_processors

CPU = device_of(torch.device("cpu"))


def problem(**given) -> Problem:
    return Problem(**{"T": 100, "B": 16, "I": 64, "H": 64, **given})


@pytest.fixture(autouse=True)
def _triton_installed_and_compiling(monkeypatch):
    """The answers of a Linux machine with triton, wherever the tests run."""
    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_an_unknown_gpu_gets_a_frugal_plan_but_stock_by_default():
    old = Device("cuda", "sm_75", "Tesla T4")
    assert choose(problem(H=128, dtype=torch.float16), old).regime == "stepwise"
    assert choose(problem(H=64, dtype=torch.float16), old).regime == "resident"
    # 64 KiB of W_hh, and a quarter of that for tiles that change layout
    assert [choose(problem(H=H, dtype=torch.float32), old).regime for H in (32, 64)] == ["resident", "stepwise"]
    decision = decide(problem(), old)
    assert (decision.backend, decision.regime) == ("torch", "stock")
    assert "sm_75" in decision.reason


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("training", [False, True])
def test_auto_on_a_gpu(gpu, training):
    small = decide(problem(H=32, dtype=torch.bfloat16, training=training), GPUS[gpu])
    assert (small.backend, small.regime) == ("triton", "resident")
    for B, expected in ((16, "persistent" if gpu in ("H100", "H200") else "stock"), (256, "stock")):
        large = decide(problem(B=B, H=1024, dtype=torch.bfloat16, training=training), GPUS[gpu])
        assert large.regime == expected
    for dtype in (torch.float16, torch.float32):  # cuDNN's persistent kernel; MIOpen has none
        dense = decide(problem(H=32, dtype=dtype, training=training), GPUS[gpu])
        assert dense.backend == ("triton" if GPUS[gpu].kind == "hip" else "torch")
        for T, expected in ((32, "torch"), (33, "triton")):
            packed = decide(problem(T=T, H=32, dtype=dtype, training=training, runs=3), GPUS[gpu])
            assert packed.backend == expected
    double = decide(problem(dtype=torch.float64, training=training), GPUS[gpu])
    assert double.backend == "torch"
    assert "float64" in double.reason


@pytest.mark.parametrize("gpu", GPUS)
def test_auto_takes_what_was_fastest(gpu):
    large, device = problem(H=512, dtype=torch.bfloat16), GPUS[gpu]
    for plan in plans.candidates(large, device):
        times = ((f"triton {plan.name}", 0.4123), ("torch", 2.0))
        decision = decide(large, device, times=times)
        assert (decision.backend, decision.regime, decision.layout) == ("triton", plan.regime, plan.name)
        assert decision.times == times
        assert decision.implementation == times[0][0]
        assert decision.reason == (
            f"In trials of calls like this it was the fastest: triton {plan.name} 0.412 ms, torch 2 ms."
        )
        assert choose(large, device, layout=decision.layout) == plan
    decision = decide(problem(H=64), device, times=(("torch", 0.1), ("triton resident-8", math.inf)))
    assert (decision.implementation, decision.regime) == ("torch", "stock")
    assert "triton resident-8 failed." in decision.reason
    assert decide(large, device, "reference", times=(("triton stepwise-16", 0.4), ("torch", 2.0))).regime == "loop"


def test_a_layout_that_is_no_candidate_is_taken_for_the_most_alike():
    given = (problem(H=512, B=128, dtype=torch.bfloat16), GPUS["H100"])
    assert choose(*given, layout="persistent-32").BLOCK_B == 32
    assert choose(*given, layout="persistent-8").regime == "persistent"
    assert choose(*given, layout="stepwise-8").regime == "stepwise"
    for backward in (False, True):
        assert choose(*given, backward, layout="resident-8") == choose(*given, backward)


@pytest.mark.parametrize("gpu", GPUS)
def test_candidates(gpu):
    for H, least in ((1, 2), (64, 2), (512, 3), (4096, 2)):
        found = candidates(problem(H=H, dtype=torch.bfloat16), GPUS[gpu])
        assert found[0] == "torch"
        assert len(set(found)) == len(found) >= least - (gpu in ("L4", "RTX 4090", "RX 7900 XTX"))
        assert all(decide(problem(H=H), GPUS[gpu], backend).implementation == backend for backend in found)
    assert has_choice(problem(), GPUS[gpu])
    assert not has_choice(problem(dtype=torch.float64), GPUS[gpu])
    assert has_choice(problem(H=23170), GPUS[gpu])
    assert not has_choice(problem(H=23171), GPUS[gpu])
    assert not has_choice(problem(B=0), GPUS[gpu])
    assert not has_choice(problem(), dataclasses.replace(GPUS[gpu], target="sm_75"))
    assert not has_choice(problem(), CPU)


def test_a_layer_of_a_compiled_graph(monkeypatch):
    for H in (64, 512, 4096):
        assert decide_layer(problem(H=H), GPUS["H100"]) == "triton"
    assert decide_layer(problem(dtype=torch.float64), GPUS["H100"]) == "reference"
    assert decide_layer(problem(), CPU) == "reference"
    monkeypatch.setenv("FASTLSTM_BACKEND", "reference")
    assert decide_layer(problem(), GPUS["H100"]) == "reference"


def test_auto_without_triton_or_on_another_device(monkeypatch):
    assert decide(problem(), Device("mps", "mps")).backend == "torch"
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    decision = decide(problem(), GPUS["H100"])
    assert decision.backend == "torch"
    assert "triton is not installed" in decision.reason


def test_triton_by_name(monkeypatch):
    assert decide(problem(H=64), GPUS["H100"], "triton").regime == "resident"
    assert decide(problem(H=512), GPUS["H100"], "triton").regime == "persistent"
    assert decide(problem(H=4096), GPUS["H100"], "triton").regime == "stepwise"
    with pytest.raises(RuntimeError, match=r"the tensors are on the CPU. .*TRITON_INTERPRET=1"):
        decide(problem(), CPU, "triton")
    with pytest.raises(RuntimeError, match="not float64; use backend='auto'"):
        decide(problem(dtype=torch.float64), GPUS["H100"], "triton")
    with pytest.raises(RuntimeError, match="on a mps device"):
        decide(problem(), Device("mps", "mps"), "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert decide(problem(), CPU, "triton").backend == "triton"
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    with pytest.raises(RuntimeError, match="triton is not installed"):
        decide(problem(), GPUS["H100"], "triton")


@pytest.mark.parametrize("device", [CPU, GPUS["H100"]], ids=["cpu", "gpu"])
def test_others_by_name(device):
    assert decide(problem(), device, "torch").regime == "stock"
    assert decide(problem(), device, "reference").regime == "loop"


def test_environment_overrides_auto_only(monkeypatch):
    monkeypatch.setenv("FASTLSTM_BACKEND", "reference")
    packed = problem(runs=3)
    decision = decide(packed, GPUS["H100"])
    assert decision.backend == "reference"
    assert "FASTLSTM_BACKEND" in decision.reason
    assert decide(packed, GPUS["H100"], "torch").backend == "torch"
    monkeypatch.setenv("FASTLSTM_BACKEND", "auto")
    assert decide(packed, GPUS["H100"]).backend == "triton"
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    monkeypatch.setenv("FASTLSTM_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="FASTLSTM_BACKEND='triton' cannot run here: triton is not installed"):
        decide(problem(), CPU)
    with pytest.raises(RuntimeError, match="backend='triton' cannot run here: triton is not installed"):
        decide(problem(), CPU, "triton")
    monkeypatch.setenv("FASTLSTM_BACKEND", "cudnn")
    with pytest.raises(ValueError, match=r"FASTLSTM_BACKEND must be one of auto, .* got 'cudnn'"):
        decide(problem(), GPUS["H100"])


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"backend must be one of auto, reference, triton, torch, got 'cuda'"):
        decide(problem(), CPU, "cuda")
    for unknown in ("triton ", "triton fast", "reference persistent-16", "auto persistent-16"):
        with pytest.raises(ValueError, match=f"got '{unknown}'"):
            decide(problem(), GPUS["H100"], unknown)


def test_a_decision_reads_as_a_sentence():
    decision = decide(problem(P=32, L=2, D=2, runs=5, training=True), GPUS["A100"], "torch")
    text = str(decision)
    assert "\n" not in text
    assert text.startswith("torch (stock) on NVIDIA A100-SXM4-80GB: It was asked for by name. ")
    for part in ("training", "float32", "packed in 5 runs", "hidden_size=64", "proj_size=32", "directions=2"):
        assert part in text


def test_every_reason_is_a_sentence():
    for device in (CPU, *GPUS.values(), Device("mps", "mps"), Device("cuda", "sm_75")):
        for changes in ({}, {"dtype": torch.float64}, {"H": 1024}, {"runs": 3}, {"P": 8}, {"training": True}):
            decision = decide(problem(**changes), device)
            assert isinstance(decision, Decision)
            assert decision.reason[0].isupper()
            assert decision.reason.endswith(".")


def test_values_are_immutable_and_hashable():
    for value in (problem(), CPU, choose(problem(), CPU), decide(problem(), CPU, "torch")):
        assert hash(value) == hash(dataclasses.replace(value))
        with pytest.raises(dataclasses.FrozenInstanceError):
            value.kind = "other"  # pyright: ignore


def test_device_of():
    assert CPU.kind == "cpu"
    assert CPU.target in ("avx2", "cpu", "intel", "amx")
    assert device_of(torch.zeros(1)) == CPU
    for on in (torch.device("meta"), torch.zeros(1, device="meta")):
        assert device_of(on) == Device("meta", "meta")
    assert BACKENDS[0] == "auto"


@pytest.fixture
def cards(monkeypatch):
    """Two equal cards in this machine, and what the driver says of them."""
    properties = SimpleNamespace(name="a card", major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(limits, "_gpus", {})
    monkeypatch.setattr(limits, "_limited", set())
    monkeypatch.delenv("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", raising=False)
    return properties


@pytest.mark.parametrize(
    ("share", "expected"), [(None, 132), ("100", 132), ("25", 33), ("12.5", 16), ("250", 132), ("0", 0), ("half", 132)]
)
def test_a_share_under_mps(share, expected, cards, monkeypatch):
    if share is not None:
        monkeypatch.setenv("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", share)
    device = device_of(torch.device("cuda", 0))
    assert device == Device("cuda", "sm_90", "a card", expected)
    # 32 programs for H=512: each needs a processor
    assert (choose(problem(H=512, dtype=torch.bfloat16), device).regime == "persistent") == (expected >= 32)


def test_processors_are_limited_with_one_warning(cards):
    one, other = torch.device("cuda", 0), torch.device("cuda", 1)
    assert device_of(one) == device_of(other)
    with pytest.warns(UserWarning, match="a card has 132 processors and cannot hold 64 programs at once"):
        limit_processors(one, 63)
    assert device_of(one).processors == device_of(other).processors == 63
    limit_processors(one, 31)  # a second warning would be an error
    assert device_of(other).processors == 31


def test_a_card_on_which_no_programs_meet(cards):
    one = torch.device("cuda", 0)
    with pytest.warns(UserWarning, match="a card has 132 processors and refuses programs that meet"):
        limit_processors(one, 0)
    assert device_of(one).processors == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_device_of_a_gpu():
    device = device_of(torch.device("cuda"))
    assert device == device_of(torch.device("cuda", torch.cuda.current_device()))
    assert device.kind == ("hip" if torch.version.hip else "cuda")
    assert device.target.startswith(("sm_", "gfx"))
    assert device.name == torch.cuda.get_device_name()
