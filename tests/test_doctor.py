"""`python -m fastlstm` tells the truth, with or without triton and a GPU, and never fails."""

from __future__ import annotations

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import fastlstm
from fastlstm import __main__ as doctor
from fastlstm import dispatch, problem, tuning
from fastlstm.problem import Device, device_of
from fastlstm.timings import timings


def test_command_prints_a_report():
    done = subprocess.run([sys.executable, "-m", "fastlstm"], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "Error" not in done.stdout
    assert done.stdout.startswith(f"fastlstm   {fastlstm.__version__}\n")
    assert f"torch      {torch.__version__}" in done.stdout
    assert "\n  cpu      " in done.stdout
    for name, _ in doctor.TYPICAL:
        assert f"\n  {name}: " in done.stdout
    assert "chooses on CPU\n" in done.stdout


def test_choices_are_those_of_dispatch():
    device = device_of(torch.device("cpu"))
    text = "\n".join(doctor.choices(device))
    for _, typical in doctor.TYPICAL:
        decision = dispatch.decide(typical, device)
        assert f"{decision.backend} ({decision.regime}): {decision.reason}" in text


def test_choices_that_differ_stand_apart(monkeypatch):
    def decide(problem, device, times):
        return SimpleNamespace(backend="torch", regime=f"training={problem.training}", reason="It is so.")

    monkeypatch.setattr(doctor, "decide", decide)
    assert list(doctor.choices(Device("cuda", "sm_90")))[1:3] == [
        "    inference  torch (training=False): It is so.",
        "    training   torch (training=True): It is so.",
    ]


def test_without_triton(monkeypatch):
    for module in (doctor, dispatch):
        monkeypatch.setattr(module, "has_triton", lambda: False)
    assert any(line.startswith("triton     not installed") for line in doctor.report())
    choices = "\n".join(doctor.choices(Device("cuda", "sm_90", "a card")))
    assert "triton is not installed" in choices
    assert "triton (" not in choices


@pytest.mark.parametrize("wanted", ["cudnn", "triton"])
def test_backend_that_cannot_be_had_is_reported(monkeypatch, wanted):
    monkeypatch.setenv("FASTLSTM_BACKEND", wanted)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    text = "\n".join(doctor.report())
    assert re.search(rf"FASTLSTM_BACKEND +{wanted}\n", text)
    assert ("ValueError: FASTLSTM_BACKEND" if wanted == "cudnn" else "RuntimeError: FASTLSTM_BACKEND='triton'") in text


def test_two_equal_cards(monkeypatch):
    card = SimpleNamespace(name="a card", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(problem, "_gpus", {})
    monkeypatch.setattr(torch.version, "hip", None)
    text = "\n".join(doctor.report())
    assert "  cuda:1   a card, sm_90, 132 processors, 80 GiB, 227 KiB of shared memory a program" in text
    assert text.count("chooses on a card") == 1
    assert "one stream: float32, T=100 B=1 I=64 H=64\n    inference, training  torch (stock)" in text


def test_timings(monkeypatch, tmp_path):
    pytest.importorskip("triton")
    monkeypatch.setenv("FASTLSTM_CACHE_DIR", str(tmp_path))
    timings.cache_clear()
    card = Device("cuda", "sm_90", "a card", 132)
    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    monkeypatch.setattr(tuning, "reproducible", lambda: False)
    name, typical = doctor.TYPICAL[0]
    timings().add(tuning.key(typical, card), (("torch", 0.25), ("triton resident-8", 0.5)))
    assert f"  fastlstm's timings: {tmp_path / 'times.json'}, 1 entries" in list(doctor.report())
    lines = list(doctor.choices(card))
    assert lines[0].startswith(f"  {name}: ")
    assert lines[1].startswith("    inference  torch (stock): In trials of calls like this it was the fastest: torch")
    assert lines[2].startswith("    training   torch (stock): Stock's own op runs, since cuDNN may keep")
    timings.cache_clear()


def test_whether_new_kinds_are_timed(monkeypatch):
    assert doctor._tuning() == "off, since torch or cuDNN is in deterministic mode"
    monkeypatch.setattr(tuning, "reproducible", lambda: False)
    monkeypatch.setattr(tuning, "_spent", 0.0)
    monkeypatch.delenv("FASTLSTM_AUTOTUNE", raising=False)
    assert doctor._tuning() == "on"
    monkeypatch.setenv("FASTLSTM_AUTOTUNE", "0")
    assert doctor._tuning() == "off, since FASTLSTM_AUTOTUNE says so"
    monkeypatch.setenv("FASTLSTM_AUTOTUNE", "1")
    monkeypatch.setenv("FASTLSTM_AUTOTUNE_MS", "soon")
    assert "got 'soon'" in doctor._tuning()
