"""What dispatch is told of a CPU: whose it is, and what it can."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fastlstm import problem


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize(
    ("text", "target"), [("vendor_id\t: GenuineIntel\n", "intel"), ("vendor_id\t: AuthenticAMD\n", "cpu"), ("", "cpu")]
)
def test_the_maker_of_the_processor(text, target, amx, monkeypatch):
    target = "amx" if amx and target == "intel" else target
    monkeypatch.setattr(problem, "_cpu_names", lambda: text)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    for capability, found in (("AVX2", "avx2"), ("AVX512", target), ("DEFAULT", target)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        assert problem._cpu.__wrapped__(1).target == found


def test_a_cpu_has_the_threads_that_torch_uses():
    threads = torch.get_num_threads()
    try:
        for count in (threads + 1, threads):
            torch.set_num_threads(count)
            for on in (torch.device("cpu"), torch.empty(0)):
                assert problem.device_of(on).processors == count
    finally:
        torch.set_num_threads(threads)


def test_where_the_makers_name_stands(monkeypatch):
    def no_proc(*_):
        raise FileNotFoundError

    monkeypatch.setattr(problem, "open", no_proc, raising=False)
    monkeypatch.setattr("sys.platform", "darwin")
    assert problem._cpu_names() == ""
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setenv("PROCESSOR_IDENTIFIER", "Intel64 Family 6 Model 85 Stepping 7, GenuineIntel")
    assert "GenuineIntel" in problem._cpu_names()
    monkeypatch.delenv("PROCESSOR_IDENTIFIER")
    assert problem._cpu_names() == ""


def test_tf32_is_what_torch_allows_its_rnns():
    """In a process of its own: what torch was told by one API, its older one refuses to tell."""
    code = (
        "import torch; from fastlstm.problem import allows_tf32; cudnn = torch.backends.cudnn; assert allows_tf32()\n"
        "cudnn.conv.fp32_precision = 'ieee'; assert allows_tf32()\n"
        "cudnn.rnn.fp32_precision = 'ieee'; assert not allows_tf32()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
