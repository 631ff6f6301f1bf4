"""The benchmark refuses wrong results, times in turns, counts memory, and says where its figures come from."""

from __future__ import annotations

import gc
import json
import math
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import assert_close, run_lstm
from torch.nn.utils.rnn import PackedSequence

import fastlstm
from benchmarks import charlm, results, timing
from benchmarks.measure import check, run_workload
from benchmarks.peers import COLUMNS, EAGER, OURS, STOCK, EagerLSTM
from benchmarks.timing import interleave, peak_bytes, spread
from benchmarks.workloads import Shape, Workload, default_workloads, quick_workloads

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]
TINY = Shape("tiny", 5, 4, 3, 6)
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


class Scaled(fastlstm.LSTM):
    """Off by a factor."""

    factor = 1.01

    def forward(self, input, hx=None):
        output, state = super().forward(input, hx)
        if isinstance(output, PackedSequence):
            return output._replace(data=output.data * self.factor), state
        return output * self.factor, state


class Nan(Scaled):
    """Not a number."""

    factor = math.nan


class WrongGradient(fastlstm.LSTM):
    """Right outputs; gradients off by one percent."""

    def forward(self, input, hx=None):
        output, state = super().forward(input, hx)
        if isinstance(output, torch.Tensor) and output.requires_grad:
            output.register_hook(lambda gradient: gradient * 1.01)
        return output, state


class Failing(fastlstm.LSTM):
    """Never returns."""

    def forward(self, input, hx=None):
        raise RuntimeError("out of order")


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_names_are_unique(device_type):
    names = [workload.name for workload in default_workloads(device_type)]
    assert len(names) == len(set(names))
    assert {workload.name for workload in quick_workloads(device_type)} <= set(names)
    kinds = {workload.kind for workload in default_workloads(device_type)}
    assert {"dense", "packed", "dense-bidirectional", "dense-2layer"} <= kinds
    assert any("proj" in kind for kind in kinds)


# in bfloat16 autograd sums its weight gradients over the steps in bfloat16: the benchmark may refuse it
@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("layers", "bidirectional", "proj"), [(1, False, 0), (2, True, 0), (2, True, 4)])
def test_eager_column_is_an_lstm(dtype, packed, layers, bidirectional, proj):
    shape = Shape("odd", 9, 7, 3, 5)
    workload = Workload(shape, dtype, True, packed, layers, bidirectional, proj)
    x = workload.make_input(CPU)
    stock = COLUMNS[STOCK](**workload.arguments, dtype=x.data.dtype)
    eager = EagerLSTM(**workload.arguments, dtype=x.data.dtype)
    eager.load_state_dict(stock.state_dict())
    directions = layers * (1 + bidirectional)
    hx = tuple(torch.randn(directions, shape.B, n, dtype=x.data.dtype) for n in (proj or shape.H, shape.H))

    oracle = COLUMNS[STOCK](**workload.arguments, dtype=torch.float64)
    oracle.load_state_dict(stock.state_dict())
    wide = x._replace(data=x.data.double()) if isinstance(x, PackedSequence) else x.double()
    truth = run_lstm(oracle, wide, tuple(state.double() for state in hx))
    assert_close(run_lstm(eager, x, hx), truth, run_lstm(stock, x, hx), dtype=x.data.dtype)


def test_packed_input_is_ragged_unsorted_and_repeatable():
    workload = Workload(Shape("s", 40, 16, 2, 2), packed=True)
    x, again = workload.make_input(CPU), workload.make_input(CPU)
    assert isinstance(x, PackedSequence)
    assert x.sorted_indices is not None
    assert torch.equal(x.data, again.data)
    assert len(x.batch_sizes) == 40
    assert len(x.batch_sizes.unique()) > 3
    assert not torch.equal(x.sorted_indices, torch.arange(16))


@pytest.mark.parametrize("training", [False, True])
def test_row_of_a_workload(training):
    row = run_workload(Workload(TINY, training=training, packed=True), CPU, budget_s=0.0, min_rounds=3)
    assert row["name"] == f"tiny/packed/fp32/{'train' if training else 'forward'}"
    assert row["shape"] == {"T": 5, "B": 4, "I": 3, "H": 6}
    assert list(row["columns"]) == [STOCK, OURS, EAGER]
    for column in row["columns"].values():
        assert column["error"] is not None
        assert column["peak_bytes"] is not None
        assert column["ms"]
        assert column["ratio"]
        assert column["status"] == "ok"
        assert column["rounds"] == 3
        assert column["calls"] >= 1
        assert column["error"] < 1e-5
        assert column["peak_bytes"] > 0
        assert 0 < column["ms"]["p20"] <= column["ms"]["median"] <= column["ms"]["p80"]
        assert column["ratio"]["median"] > 0
    assert row["columns"][STOCK]["ratio"] == {"median": 1.0, "p20": 1.0, "p80": 1.0}
    json.dumps(row, allow_nan=False)


@pytest.mark.parametrize("wrong", [Scaled, WrongGradient, Nan, Failing])
def test_wrong_results_are_not_timed(wrong):
    columns = {STOCK: COLUMNS[STOCK], OURS: wrong, EAGER: EagerLSTM}
    row = run_workload(Workload(TINY, training=True), CPU, budget_s=0.0, min_rounds=1, columns=columns)
    refused = row["columns"][OURS]
    assert refused["status"] != "ok"
    assert ("out of order" in refused["status"]) == (wrong is Failing)
    assert refused["ms"] is refused["ratio"] is refused["peak_bytes"] is None
    assert row["columns"][EAGER]["ms"] is not None
    json.dumps(row, allow_nan=False)


def test_what_is_checked_is_what_is_timed():
    workload = Workload(TINY)
    module, stock = WrongGradient(**workload.arguments), COLUMNS[STOCK](**workload.arguments)
    module.load_state_dict(stock.state_dict())
    x = workload.make_input(CPU)
    assert check(workload, {STOCK: stock, OURS: module}, x)[OURS][0] == "ok"
    training = Workload(TINY, training=True)
    assert "wrong result" in check(training, {STOCK: stock, OURS: module}, x)[OURS][0]


def test_columns_take_turns():
    order = []

    def step(name):
        def run():
            order.append((name, gc.isenabled()))
            time.sleep(3e-3)

        return run

    samples, calls = interleave({name: step(name) for name in "abc"}, CPU, budget_s=0.0, min_rounds=4)
    assert calls == {"a": 1, "b": 1, "c": 1}
    assert {name: len(values) for name, values in samples.items()} == {"a": 4, "b": 4, "c": 4}
    assert min(min(values) for values in samples.values()) >= 3.0
    timed = order[-12:]
    assert [name for name, _ in timed] == list("abcbcacababc")
    assert not any(collecting for _, collecting in timed)
    assert gc.isenabled()


def test_short_calls_are_averaged():
    samples, calls = interleave({"a": lambda: None}, CPU, budget_s=10.0, min_rounds=1)
    assert calls["a"] == timing.MAX_CALLS
    assert len(samples["a"]) == timing.MAX_ROUNDS
    count = []
    seconds = timing.sample_seconds(lambda: (count.append(1), time.sleep(1e-3)), CPU, calls=40)
    assert len(count) == 40
    assert 1e-3 <= seconds < 20e-3


def test_spread():
    assert spread([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == {"median": 3.5, "p20": 2.0, "p80": 5.0}
    assert spread([7.0]) == {"median": 7.0, "p20": 7.0, "p80": 7.0}


def test_peak_memory_is_what_is_held_at_once():
    MiB = 2**20

    def step():
        first = torch.zeros(MiB, dtype=torch.uint8)
        second = torch.zeros(2 * MiB, dtype=torch.uint8)
        del first
        torch.zeros(3 * MiB, dtype=torch.uint8)
        return second

    assert 5 * MiB <= peak_bytes(step, CPU) < 5 * MiB + 4096


def test_character_model_learns_alike():
    steps = []
    job = charlm.train(4, CPU, advance=lambda: steps.append(1))
    assert len(steps) == 4
    assert job["status"] == "ok"
    assert 0 <= job["error"] <= job["allowed"] < 1e-5
    stock, ours = job["columns"][STOCK], job["columns"][OURS]
    assert stock["ratio"]["median"] == 1.0
    assert len(ours["losses"]) == 4
    assert ours["losses"][-1] < ours["losses"][0]
    assert 6.5 < job["untrained_bits"] < 7.5
    assert ours["bits_per_character"] < job["untrained_bits"]
    assert ours["bits_per_character"] == pytest.approx(stock["bits_per_character"], abs=1e-4)
    json.dumps(job, allow_nan=False)


def test_character_model_notices_a_wrong_lstm():
    assert "loss curve is off" in charlm.train(2, CPU, make_lstm=Scaled)["status"]


def make_column(ratio: float | None) -> results.Column:
    """A column that took 12 ms / ratio, or a refused one."""
    column: results.Column = {
        "status": "wrong result, x",
        "error": None,
        "rounds": 0,
        "calls": 0,
        "ms": None,
        "ratio": None,
        "peak_bytes": None,
    }
    if ratio is not None:
        ms = 12.0 / ratio
        column["status"], column["error"], column["rounds"], column["calls"] = "ok", 1e-7, 9, 1
        column["ms"] = {"median": ms, "p20": ms, "p80": ms}
        column["ratio"] = {"median": ratio, "p20": ratio * 0.95, "p80": ratio * 1.05}
        column["peak_bytes"] = int(1000 / ratio)
    return column


def make_row(kind: str, training: bool, ratio: float | None) -> results.Row:
    """A workload of shape b on which fastlstm's ratio to stock is `ratio`."""
    return {
        "name": f"b/{kind}/fp32/{'train' if training else 'forward'}",
        "shape": {"T": 100, "B": 16, "I": 64, "H": 128},
        "kind": kind,
        "dtype": "fp32",
        "training": training,
        "route": "torch stock",
        "columns": {STOCK: make_column(1.0), OURS: make_column(ratio), EAGER: make_column(0.5)},
    }


def make_result() -> results.Result:
    """A result as a run would write it, with a winner, a loser and a refusal."""
    return {
        "schema": results.SCHEMA,
        "command": "python -m benchmarks",
        "date": "2026-01-02T03:04:05+00:00",
        "commit": "0123456789abcdef",
        "dirty": False,
        "machine": {"cpu": "a processor", "gpu": None},
        "versions": {"torch": "2.13.0"},
        "settings": {"threads": 1},
        "columns": [STOCK, OURS, EAGER],
        "rows": [make_row("packed", False, 0.8), make_row("packed", True, 3.0), make_row("dense", True, None)],
        "jobs": [],
    }


def test_result_file_round_trip(tmp_path):
    result = make_result()
    results.save(result, tmp_path / "new" / "result.json")
    assert results.load(tmp_path / "new" / "result.json") == result
    results.save({**result, "schema": 0}, tmp_path / "old.json")
    with pytest.raises(ValueError, match="schema 0"):
        results.load(tmp_path / "old.json")


def test_markdown_shows_losers_in_bold():
    table = results.markdown(make_result())
    assert table.splitlines()[2:] == [
        "| b (T=100 B=16 I=64 H=128) packed fp32 | **0.80x (12.0 to 15.0 ms)** | 3.00x (12.0 to 4.00 ms) | 0.33x |",
        "| b (T=100 B=16 I=64 H=128) dense fp32 |  | refused: wrong result |  |",
    ]
    assert "packed" not in results.markdown(make_result(), "dense")
    assert results.provenance(make_result()) == "a processor, 1 thread; torch 2.13.0; commit 0123456789; 2026-01-02"


def test_committed_results_are_readable():
    for path in results.committed():
        result = results.load(path)
        assert result["commit"], path
        assert results.markdown(result)


def test_plot_of_winner_loser_and_refusal(tmp_path):
    plot = pytest.importorskip("benchmarks.plot", reason="needs matplotlib", exc_type=ImportError)
    plot.draw(make_result(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    labels = [line.label for line in plot.lines(make_result())]
    assert labels[0] == "dense input"
    assert labels[2] == "packed input (variable lengths)"


@pytest.mark.parametrize(
    ("p20", "median", "p80", "expected"),
    [
        (1.01, 1.1, 1.2, "faster"),
        (0.99, 1.1, 1.2, "even"),
        (1.01, 1.02, 1.03, "even"),
        (0.97, 0.98, 0.99, "even"),
        (0.8, 0.9, 1.01, "even"),
        (0.8, 0.9, 0.99, "slower"),
    ],
)
def test_verdict(p20, median, p80, expected):
    assert results.verdict({"p20": p20, "median": median, "p80": p80}) == expected


def needs_extras():
    for name in ("rich", "matplotlib", "psutil"):
        pytest.importorskip(name, reason="needs the extra bench")


def test_command_writes_figures_and_plot(tmp_path):
    needs_extras()
    path = tmp_path / "result.json"
    arguments = ["--quick", "--device=cpu", "--threads=1", "--budget=0.01", "--filter=^g/", f"--json={path}"]
    done = subprocess.run([sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert str(path) in done.stdout
    assert path.with_suffix(".png").exists()
    result = results.load(path)
    assert [row["name"] for row in result["rows"]] == ["g/dense/fp32/forward", "g/dense/fp32/train"]
    assert result.keys() == results.Result.__annotations__.keys()
    assert result["rows"][0].keys() == results.Row.__annotations__.keys()
    assert result["columns"] == list(result["rows"][0]["columns"]) == [STOCK, OURS, EAGER]
    assert result["settings"]["threads"] == 1
    assert shlex.split(result["command"]) == ["python", "-m", "benchmarks", *arguments]
    assert result["versions"]["torch"] == torch.__version__
    assert result["machine"]["cpu"]


def test_refusal_fails_the_command(tmp_path, monkeypatch, capsys):
    needs_extras()
    from benchmarks.__main__ import main

    monkeypatch.setitem(COLUMNS, OURS, Scaled)
    status = main(["--device=cpu", "--budget=0.01", "--filter=^g/.*forward", f"--json={tmp_path / 'result.json'}"])
    assert status == 1
    printed = capsys.readouterr().out
    assert "refused g/dense/fp32/forward, fastlstm: wrong result" in " ".join(printed.split())


def test_command_lists_and_filters(capsys):
    needs_extras()
    from benchmarks.__main__ import main

    assert main(["--device=cpu", "--list", "--filter=packed.*bf16|charlm"]) == 0
    names = capsys.readouterr().out.split()
    assert names[-1] == charlm.NAME
    assert "b/packed/bf16/train" in names
    assert all("bf16" in name for name in names[:-1])
    assert main(["--device=cpu", "--filter=nothing like it"]) == 2


def test_commit_outside_git(monkeypatch, tmp_path):
    needs_extras()
    from benchmarks import machine

    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert machine.commit() == (None, None)


def test_readme_shows_the_committed_figures():
    readme = results.README.read_text()
    assert results.README_TABLE.search(readme)
    assert results.fill_readme(readme) == readme, "run `make plot`"
