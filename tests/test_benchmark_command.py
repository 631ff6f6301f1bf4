"""`python -m benchmarks`: what it selects, writes, goes on with and refuses."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmark_helpers import Scaled, make_result

from benchmarks import __main__, charlm, results
from benchmarks.measure import run_workload
from benchmarks.peers import EAGER, OURS, PEERS, STOCK, Peer

ROOT = Path(__file__).parents[1]
FAST = ["--device=cpu", "--budget=0.01", "--filter=^g/dense/fp32/forward"]


def test_command_writes_figures_and_plot(tmp_path):
    path = tmp_path / "result.json"
    arguments = ["--quick", "--device=cpu", "--threads=1", "--budget=0.01", "--filter=^g/", f"--json={path}"]
    done = subprocess.run([sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert str(path) in done.stdout
    assert path.with_suffix(".png").exists()
    assert path.with_suffix(".md").read_text().startswith("# fastlstm")
    assert path.with_suffix(".html").as_uri() in done.stdout
    result = results.load(path)
    assert [row["name"] for row in result["rows"]] == ["g/dense/fp32/forward", "g/dense/fp32/train"]
    assert result.keys() == results.Result.__annotations__.keys()
    assert result["rows"][0].keys() == results.Row.__annotations__.keys()
    assert list(result["columns"]) == list(result["rows"][0]["columns"]) == [STOCK, OURS, EAGER]
    assert result["settings"]["threads"] == 1
    assert shlex.split(result["command"]) == ["python", "-m", "benchmarks", *arguments]
    assert result["versions"]["torch"] == torch.__version__
    assert result["machine"]["cpu"]


@pytest.fixture
def command(monkeypatch):
    """`python -m benchmarks` without pictures, probes and other processes."""
    monkeypatch.setattr(__main__, "probe", lambda *_: {"fp32": 1.0, "bandwidth GB/s": 1.0})
    monkeypatch.setattr("benchmarks.memory.way", lambda _: results.TENSORS)
    monkeypatch.setattr(__main__, "draw", lambda *_: None)
    monkeypatch.setattr(__main__, "write_page", lambda _, path: path)
    return __main__


def test_a_job_that_fails_takes_no_row_with_it(tmp_path, monkeypatch, command, capsys):
    def fails(*_, **__):
        raise TypeError("no character model")

    path = tmp_path / "result.json"
    monkeypatch.setattr(command.charlm, "train", fails)
    arguments = ["--device=cpu", "--budget=0.01", f"--json={path}", "--filter=^g/dense/fp32/forward|charlm"]
    with pytest.raises(TypeError, match="no character model"):
        command.main(arguments)
    assert "ratio: stock's time" in capsys.readouterr().out
    assert len(results.load(path)["rows"]) == 1
    with pytest.raises(TypeError, match="no character model"):
        command.main([*arguments, "--fresh", "--filter=charlm"])


def test_interrupted_run_goes_on(tmp_path, monkeypatch, capsys, command):
    path, count = tmp_path / "result.json", []

    def run_and_count(workload, *args, **kwargs):
        count.append(workload.name)
        if len(count) == 2:
            raise KeyboardInterrupt
        return run_workload(workload, *args, **kwargs)

    monkeypatch.setattr(command, "run_workload", run_and_count)
    monkeypatch.setattr(command, "source", lambda: "5eed")
    monkeypatch.setattr(sys, "argv", ["-"])
    arguments = ["--suite=stack", "--device=cpu", "--budget=0.01", "--filter=^b/dense/fp32", f"--json={path}"]
    assert command.main(arguments) == 0
    assert len(results.load(path)["rows"]) == 1
    assert command.main([*arguments, "--minutes=1e-9"]) == 0  # no time for a second row
    assert "stack: 1 workloads left out for want of time" in capsys.readouterr().out
    assert len(count) == 2
    assert command.main(arguments) == 0
    assert count == ["b/dense/fp32/forward", "b/dense/fp32/train", "b/dense/fp32/train"]
    assert command.main([*arguments, "--fresh", "--filter=^b/dense/fp32/forward"]) == 0
    assert [row["name"] for row in results.load(path)["rows"]] == ["b/dense/fp32/forward"]


def test_a_row_without_memory_is_left_out(tmp_path, monkeypatch, capsys, command):
    path = tmp_path / "result.json"

    def run_without_memory(workload, *args, **kwargs):
        if not workload.training:
            raise torch.OutOfMemoryError("no memory\nfor it")
        return run_workload(workload, *args, **kwargs)

    monkeypatch.setattr(command, "run_workload", run_without_memory)
    arguments = ["--suite=stack", "--device=cpu", "--budget=0.01", "--filter=^b/dense/fp32", f"--json={path}"]
    assert command.main(arguments) == 0
    assert "b/dense/fp32/forward is left out: no memory\n" in capsys.readouterr().out
    assert [row["name"] for row in results.load(path)["rows"]] == ["b/dense/fp32/train"]


def test_interruption_before_the_first_row_leaves_the_file(tmp_path, monkeypatch, capsys, command):
    path = tmp_path / "result.json"
    results.save(make_result(), path)  # of another code: a row would begin it anew

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "probe", interrupt)
    assert command.main([*FAST, f"--json={path}"]) == 2
    assert results.load(path) == make_result()
    assert "nothing was measured" in capsys.readouterr().out


def test_a_file_that_goes_on_keeps_what_it_says_and_gets_what_it_lacks(tmp_path, monkeypatch, command):
    path, probed = tmp_path / "result.json", []
    monkeypatch.setattr(command, "source", lambda: "5eed")
    monkeypatch.setattr(command, "probe", lambda _, dtypes: probed.append(dtypes) or dict.fromkeys(dtypes, 1.0))
    monkeypatch.setattr(charlm, "train", lambda steps, *_, **__: {"steps": steps})
    monkeypatch.setattr(command, "print_report", lambda *_: None)
    monkeypatch.setattr(command, "refusals", lambda _: [])
    arguments = [f"--json={path}", "--device=cpu", "--budget=0.01"]
    first = ["--filter=^(charlm|g/dense/fp32/forward)", "--peer=haste", "--steps=3"]
    assert command.main([*arguments, *first]) == 0
    assert command.main([*arguments, "--filter=^(charlm|a/.*fp64)", "--peer=eager", "--steps=2"]) == 0
    assert probed == [{"fp32"}, {"fp64"}]
    result = results.load(path)
    assert result["probe"].keys() == {"fp32", "fp64"}
    assert list(result["columns"]) == [STOCK, OURS, EAGER]
    assert result["absent"] == {"haste": "needs a GPU"}
    assert result["jobs"] == [{"steps": 3}]  # the longer one
    monkeypatch.setitem(PEERS, "haste", PEERS[EAGER])
    assert command.main([*arguments, "--filter=^g/dense/fp32/forward", "--peer=haste"]) == 0
    assert results.load(path)["absent"] == {}
    assert len(probed) == 2
    assert command.main([*arguments, "--fresh", "--filter=^charlm", "--steps=0"]) == 2  # nothing to do


def test_command_refuses_what_it_cannot_use(tmp_path, capsys, command):
    path = tmp_path / "result.json"
    path.write_text("[]")
    assert command.main([*FAST, f"--json={path}"]) == 2
    assert "not a result file; --fresh replaces it" in capsys.readouterr().err
    assert path.read_text() == "[]"
    for wrong in (f"--json={tmp_path / 'page.html'}", "--filter=("):
        with pytest.raises(SystemExit, match="2"):
            command.main([*FAST, wrong])


def test_refusal_fails_the_command(tmp_path, monkeypatch, capsys, command):
    monkeypatch.setitem(PEERS, OURS, Peer(Scaled, ""))
    assert command.main([*FAST, f"--json={tmp_path / 'result.json'}"]) == 1
    printed = capsys.readouterr().out
    assert "refused g/dense/fp32/forward, fastlstm: wrong result" in " ".join(printed.split())


def test_command_lists_and_filters(capsys):
    assert __main__.main(["--device=cpu", "--list", "--filter=packed.*bf16|charlm"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line for line in lines if not line.startswith("column ")]
    assert names[-1] == charlm.NAME
    assert "b/packed/bf16/train" in names
    assert all("bf16" in name for name in names[:-1])
    assert any(line.startswith("column flashrnn: ") for line in lines)
    assert __main__.main(["--device=cpu", "--filter=nothing like it"]) == 2
    assert __main__.main(["--device=cpu", "--list", "--quick", "--dtype=fp16", "--filter=packed"]) == 0
    assert "f/packed/fp16/train" in capsys.readouterr().out.splitlines()
