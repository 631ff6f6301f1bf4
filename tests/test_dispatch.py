"""Plans and decisions for a table of devices, none of which is needed."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastlstm import dispatch
from fastlstm.dispatch import BACKENDS, Decision, decide
from fastlstm.plans import choose, every_plan
from fastlstm.problem import Device, Problem, device_of

CPU = device_of(torch.device("cpu"))
GPUS = {
    "RTX 3090": Device("cuda", "sm_86", "NVIDIA GeForce RTX 3090", 82),
    "A100": Device("cuda", "sm_80", "NVIDIA A100-SXM4-80GB", 108),
    "L4": Device("cuda", "sm_89", "NVIDIA L4", 58),
    "RTX 4090": Device("cuda", "sm_89", "NVIDIA GeForce RTX 4090", 128),
    "H100": Device("cuda", "sm_90", "NVIDIA H100 80GB HBM3", 132),
    "B200": Device("cuda", "sm_100", "NVIDIA B200", 148),
    "RTX 5090": Device("cuda", "sm_120", "NVIDIA GeForce RTX 5090", 170),
    "MI300X": Device("hip", "gfx942", "AMD Instinct MI300X", 304),
}
LARGEST_RESIDENT = {  # H in 16 bit, H in float32
    "RTX 3090": (64, 64),
    "A100": (128, 64),
    "L4": (64, 64),
    "RTX 4090": (64, 64),
    "H100": (128, 64),
    "B200": (128, 64),
    "RTX 5090": (64, 64),
    "MI300X": (64, 64),
}


def problem(**given) -> Problem:
    return Problem(**{"T": 100, "B": 16, "I": 64, "H": 64, **given})


@pytest.fixture(autouse=True)
def _triton_installed_and_compiling(monkeypatch):
    """The answers of a Linux machine with triton, wherever the tests run."""
    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("gpu", GPUS)
def test_resident_as_far_as_it_fits(gpu, backward):
    for dtype, largest in zip((torch.bfloat16, torch.float32), LARGEST_RESIDENT[gpu], strict=True):
        for H in (1, 16, 17, 33, 64, 65, 100, 128, 129, 1024):
            plan = choose(problem(H=H, dtype=dtype), GPUS[gpu], backward)
            assert (plan.regime == "resident") == (largest >= H), (H, dtype)
            if plan.regime == "resident":
                assert max(H, 16) <= plan.BLOCK_H < 2 * max(H, 16)


@pytest.mark.parametrize("gpu", GPUS)
def test_plans_enumerates_what_choose_returns(gpu):
    device = GPUS[gpu]
    for dtype, tf32 in ((torch.float16, True), (torch.bfloat16, True), (torch.float32, True), (torch.float32, False)):
        enumerated = {(backward, plan) for _, backward, plan in every_plan(dtype, device.target, tf32)}
        chosen = {
            (backward, choose(problem(H=H, B=B, D=D, dtype=dtype, tf32=tf32), device, backward))
            for H in (*range(1, 1600, 9), 128, 512, 1024, 1536, 4096)
            for B in (1, 8, 16, 17, 64, 1000)
            for D in (1, 2)
            for backward in (False, True)
        }
        assert chosen <= enumerated
        # only those persistent plans whose programs this very card can hold
        assert all(plan.regime == "persistent" for _, plan in enumerated - chosen)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("gpu", ["RTX 3090", "A100", "H100", "B200", "RTX 5090"])
def test_persistent_where_all_programs_are_on_the_chip(gpu, backward):
    device = GPUS[gpu]
    for H in (256, 300, 512, 768, 1024, 1500, 2048, 4096):
        for B in (1, 16, 17, 64, 128, 1000):
            for D in (1, 2):
                for dtype in (torch.bfloat16, torch.float32):
                    plan = choose(problem(H=H, B=B, D=D, dtype=dtype), device, backward)
                    if plan.regime != "persistent":
                        continue
                    assert device.processors >= -(-H // plan.BLOCK_H) * -(-B // plan.BLOCK_B) * D
                    columns = (plan.KEPT - 1) * plan.BLOCK_K + plan.TAIL_K
                    assert H <= columns < 2 * H
    assert choose(problem(H=512), device, backward).regime == "persistent"
    # a share of the card too small for the grid, and a precision without matrix instructions
    assert choose(problem(H=512), dataclasses.replace(device, processors=31), backward).regime == "stepwise"
    assert choose(problem(H=512, tf32=False), device, backward).regime == "stepwise"


def test_odd_sizes_do_not_pay_for_the_next_power_of_two():
    for H, most in ((650, 768), (768, 768), (1100, 1152), (1500, 1536)):
        for backward in (False, True):
            plan = choose(problem(H=H, dtype=torch.float16), GPUS["H100"], backward)
            assert most >= (plan.KEPT - 1) * plan.BLOCK_K + plan.TAIL_K


def test_length_never_matters_to_a_plan():
    for T in (1, 16, 1000, 70_000):
        assert choose(problem(T=T), GPUS["H100"]) == choose(problem(), GPUS["H100"])


def test_an_unknown_gpu_gets_a_frugal_plan_but_stock_by_default():
    old = Device("cuda", "sm_75", "Tesla T4")
    assert choose(problem(H=128, dtype=torch.float16), old).regime == "stepwise"
    assert choose(problem(H=64, dtype=torch.float16), old).regime == "resident"
    decision = decide(problem(), old)
    assert (decision.backend, decision.regime) == ("torch", "stock")
    assert "sm_75" in decision.reason


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("training", [False, True])
def test_auto_on_a_gpu(gpu, training):
    small = decide(problem(H=64, dtype=torch.bfloat16, training=training), GPUS[gpu])
    assert (small.backend, small.regime) == ("triton", "resident")
    large = decide(problem(H=1024, dtype=torch.bfloat16, training=training), GPUS[gpu])
    assert (large.backend, large.regime) == ("torch", "stock")
    double = decide(problem(dtype=torch.float64, training=training), GPUS[gpu])
    assert double.backend == "torch"
    assert "float64" in double.reason


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
    decision = decide(problem(), GPUS["H100"])
    assert decision.backend == "reference"
    assert "FASTLSTM_BACKEND" in decision.reason
    assert decide(problem(), GPUS["H100"], "torch").backend == "torch"
    monkeypatch.setenv("FASTLSTM_BACKEND", "auto")
    assert decide(problem(), GPUS["H100"]).backend == "triton"
    monkeypatch.setenv("FASTLSTM_BACKEND", "cudnn")
    with pytest.raises(ValueError, match=r"FASTLSTM_BACKEND must be one of auto, .* got 'cudnn'"):
        decide(problem(), GPUS["H100"])


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"backend must be one of auto, reference, triton, torch, got 'cuda'"):
        decide(problem(), CPU, "cuda")


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
    assert CPU.kind == CPU.target == "cpu"
    assert device_of(torch.device("meta")) == Device("meta", "meta")
    assert BACKENDS[0] == "auto"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_device_of_a_gpu():
    device = device_of(torch.device("cuda"))
    assert device == device_of(torch.device("cuda", torch.cuda.current_device()))
    assert device.kind == ("hip" if torch.version.hip else "cuda")
    assert device.target.startswith(("sm_", "gfx"))
    assert device.name == torch.cuda.get_device_name()
