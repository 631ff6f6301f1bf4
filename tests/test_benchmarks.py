"""The benchmark refuses wrong results and times in turns."""

from __future__ import annotations

import gc
import itertools
import json
import math
import time

import pytest
import torch
from benchmark_helpers import Scaled, make_result
from torch.nn.utils.rnn import PackedSequence

import fastlstm
from benchmarks import charlm, timing
from benchmarks.compare import compare
from benchmarks.measure import check, make_step, run_workload
from benchmarks.peers import EAGER, OURS, PEERS, STOCK, STOCK_LSTM, EagerLSTM, Peer
from benchmarks.plot import lines
from benchmarks.probe import BANDWIDTH, _best, probe
from benchmarks.readme import readme_table
from benchmarks.suites import MAX_FLOPS, SUITES, in_dtypes, quick_workloads
from benchmarks.tables import Cell, tables
from benchmarks.timing import interleave, spread
from benchmarks.workloads import Shape, Workload
from fastlstm import cpu_rules, explain

CPU = torch.device("cpu")
THREE = {name: PEERS[name] for name in (STOCK, OURS, EAGER)}
TINY = Shape("tiny", 5, 4, 3, 6)
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


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


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_suites(suite, device_type):
    workloads = list(SUITES[suite].workloads(device_type))
    names = [workload.name for workload in workloads]
    assert len(names) == len(set(names)) > 5
    assert SUITES[suite].peers[:2] == (STOCK, OURS)
    assert set(SUITES[suite].peers) <= PEERS.keys()
    assert max(workload.flops for workload in workloads) <= MAX_FLOPS[device_type]
    assert {workload.dtype for workload in in_dtypes(workloads, ["fp32"])} == {"fp32"}
    assert {workload.dtype for workload in in_dtypes(workloads, ["fp16", "fp64"])} == {"fp16", "fp64"}


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_the_default_suite_has_every_kind(device_type):
    workloads = list(SUITES["default"].workloads(device_type))
    assert {workload.name for workload in quick_workloads(device_type)} <= {workload.name for workload in workloads}
    kinds = {workload.kind for workload in workloads}
    assert {"dense", "packed", "dense-bidirectional", "dense-2layer"} <= kinds
    assert any("proj" in kind for kind in kinds)


def test_the_sweep_begins_with_a_coarse_picture():
    shapes = [workload.shape for workload in SUITES["sweep"].workloads("cuda")]
    tenth = shapes[: len(shapes) // 10]
    assert {shape.H for shape in tenth} == {32, 128, 512, 2048}
    assert {shape.B for shape in tenth} == {1, 16, 128}
    assert {shape.T for shape in tenth} == {16, 256, 4096}
    assert {shape.H for shape in shapes} == {2**n for n in range(5, 13)}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 2 * 10 * 3 * 4 * 6 * (5 + 6)),
        ({"training": True}, 3 * 2 * 10 * 3 * 4 * 6 * (5 + 6)),
        ({"num_layers": 2, "bidirectional": True}, 2 * 10 * 3 * 2 * 4 * 6 * (5 + 6 + 12 + 6)),
        ({"proj_size": 2}, 2 * 10 * 3 * (4 * 6 * (5 + 2) + 2 * 6)),
        ({"streaming": True}, 2 * 3 * 4 * 6 * (5 + 6)),
    ],
)
def test_flops(options, expected):
    assert Workload(Shape("s", 10, 3, 5, 6), **options).flops == expected


@pytest.mark.parametrize("lengths", ["uniform", "short", "onelong"])
def test_packed_input_is_ragged_unsorted_and_repeatable(lengths):
    workload = Workload(Shape("s", 40, 16, 2, 2), lengths=lengths)
    x, again = workload.make_input(CPU), workload.make_input(CPU)
    assert isinstance(x, PackedSequence)
    assert workload.tokens == len(x.data)
    if lengths == "onelong":
        assert x.batch_sizes.tolist() == [16] * 2 + [1] * 38
        return
    assert x.sorted_indices is not None
    assert torch.equal(x.data, again.data)
    assert len(x.batch_sizes) == 40
    assert len(x.batch_sizes.unique()) > 3
    assert not torch.equal(x.sorted_indices, torch.arange(16))


@pytest.mark.parametrize("training", [False, True])
def test_row_of_a_workload(training):
    workload = Workload(TINY, training=training, lengths="uniform")
    row = run_workload(workload, CPU, budget_s=0.0, min_rounds=3, peers=THREE)
    assert row["name"] == f"tiny/packed/fp32/{'train' if training else 'forward'}"
    assert row["shape"] == {"T": 5, "B": 4, "I": 3, "H": 6}
    assert list(row["columns"]) == [STOCK, OURS, EAGER]
    for column in row["columns"].values():
        assert column["error"] is not None
        assert column["ms"]
        assert column["ratio"]
        assert column["status"] == "ok"
        assert column["rounds"] == 3 == len(column["samples"])
        assert column["error"] == max(error or 0.0 for error in column["errors"].values())
        assert ("dweight_hh_l0" in column["errors"]) == training
        assert column["ms"]["median"] == pytest.approx(sorted(column["samples"])[1], rel=1e-3)
        assert column["calls"] >= 1
        assert column["error"] < 1e-5
        assert 0 < column["ms"]["p20"] <= column["ms"]["median"] <= column["ms"]["p80"]
        assert column["ratio"]["median"] > 0
    assert row["columns"][STOCK]["ratio"] == {"median": 1.0, "p20": 1.0, "p80": 1.0}
    json.dumps(row, allow_nan=False)


@pytest.mark.parametrize("wrong", [Scaled, WrongGradient, Nan, Failing])
def test_wrong_results_are_not_timed(wrong):
    peers = {**THREE, OURS: Peer(wrong, "")}
    row = run_workload(Workload(TINY, training=True), CPU, budget_s=0.0, min_rounds=1, peers=peers)
    refused = row["columns"][OURS]
    assert refused["status"] != "ok"
    assert ("out of order" in refused["status"]) == (wrong is Failing)
    assert refused["ms"] is refused["ratio"] is None
    assert row["columns"][EAGER]["ms"] is not None
    json.dumps(row, allow_nan=False)


def test_without_stock_there_is_a_time_but_no_ratio():
    peers = {STOCK: Peer(Failing, ""), OURS: PEERS[OURS], "wrong": Peer(Scaled, "")}
    row = run_workload(Workload(TINY), CPU, budget_s=0.0, min_rounds=1, peers=peers)
    assert row["columns"][STOCK]["status"] == "failed: RuntimeError: out of order"
    assert row["columns"][OURS]["ms"]
    assert row["columns"][OURS]["ratio"] is None
    assert row["columns"]["wrong"]["status"].startswith("wrong result")

    row["name"], row["kind"] = "b/dense/fp32/forward", "dense"
    result = make_result()
    result["rows"] = [row]
    (table,) = tables(result)
    shown = dict(zip(table.header, table.rows[0], strict=True))
    assert shown["ratio"] == Cell("")
    assert shown["stock ms"] == Cell("failed", "refused")
    assert float(shown["fastlstm ms"].text)
    assert "refused" not in readme_table(result)
    assert [line.modes for line in lines(result)] == [{}, {False: {STOCK: None, "wrong": None}}]
    assert [verdict.word for verdict in compare(result, result)] == ["unclear"]


def test_a_state_of_another_shape_is_refused():
    class Squeezed(EagerLSTM):
        def forward(self, x, hx=None):
            output, (h_n, c_n) = super().forward(x, hx)
            return output, (h_n[0], c_n[0])

    peers = {STOCK: PEERS[STOCK], "squeezed": Peer(Squeezed, "")}
    row = run_workload(Workload(TINY), CPU, budget_s=0.0, min_rounds=1, peers=peers)
    assert row["columns"]["squeezed"]["status"] == "failed: ValueError: h_n: shape (4, 6), expected (1, 4, 6)"


def test_a_backend_that_cannot_run_here_is_a_finding(monkeypatch):
    monkeypatch.setenv("FASTLSTM_BACKEND", "nobody's")
    row = run_workload(Workload(TINY), CPU, budget_s=0.0, min_rounds=1, peers=THREE)
    assert row["columns"][OURS]["status"].startswith("failed: ValueError")
    assert row["columns"][EAGER]["ms"]
    assert row["route"] == ""


def test_others_may_be_rough_but_not_wrong():
    class Rough(Scaled):
        factor = 1 + 1e-5

    peers = {STOCK: PEERS[STOCK], OURS: Peer(Rough, ""), "other": Peer(Rough, ""), "wrong": Peer(Scaled, "")}
    row = run_workload(Workload(TINY), CPU, budget_s=0.0, min_rounds=1, peers=peers)
    statuses = {name: column["status"].split(":")[0] for name, column in row["columns"].items()}
    assert statuses == {STOCK: "ok", OURS: "wrong result", "other": "rough", "wrong": "wrong result"}
    assert [name for name, column in row["columns"].items() if column["ms"]] == [STOCK, "other"]


class Forgetful(fastlstm.LSTM):
    """Drops the state that it is given, and counts the calls that were given one."""

    given = 0

    def forward(self, input, hx=None):
        Forgetful.given += hx is not None
        return super().forward(input, None)


def test_streams_carry_their_state(monkeypatch):
    asked = []
    monkeypatch.setattr(fastlstm, "explain", lambda module, x: asked.append(x) or explain(module, x))
    peers = {**THREE, OURS: Peer(Forgetful, ""), "kept": Peer(fastlstm.LSTM, "")}
    workload = Workload(Shape("s", 6, 1, 3, 4), streaming=True)
    row = run_workload(workload, CPU, budget_s=0.0, min_rounds=7, suite="latency", peers=peers)
    statuses = {name: column["status"].split(":")[0] for name, column in row["columns"].items()}
    assert statuses == {STOCK: "ok", OURS: "wrong result", EAGER: "ok", "kept": "ok"}
    assert row["columns"][EAGER]["calls"] == 1
    assert len(row["columns"][EAGER]["samples"]) == 7
    (table,) = tables({**make_result(), "rows": [row]})
    assert table.rows[0][table.header.index(OURS)].text == "refused"
    assert [tuple(x.shape) for x in asked] == [(1, 1, 3)]  # the route is that of one step, as it is timed

    step = make_step(Forgetful(**workload.arguments), workload.make_input(CPU), workload)
    Forgetful.given = 0
    for _ in range(9):  # more than the six steps of the input
        step()
    assert Forgetful.given == 8


def test_accuracy_times_nothing():
    workload = Workload(TINY, training=True)
    row = run_workload(workload, CPU, budget_s=9.0, suite="accuracy", peers=THREE)
    assert all(column["samples"] == [] and len(column["errors"]) == 8 for column in row["columns"].values())
    (table,) = tables({**make_result(), "rows": [row]})
    assert [cells[1].text for cells in table.rows] == [STOCK, OURS, EAGER]


def test_what_is_checked_is_what_is_timed():
    workload = Workload(TINY)
    module, stock = WrongGradient(**workload.arguments), STOCK_LSTM(**workload.arguments)
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
            time.sleep(6e-3)

        return run

    samples, calls = interleave({name: step(name) for name in "abc"}, CPU, budget_s=0.0, min_rounds=4)
    assert calls == {"a": 1, "b": 1, "c": 1}
    assert {name: len(values) for name, values in samples.items()} == {"a": 4, "b": 4, "c": 4}
    assert min(min(values) for values in samples.values()) >= 6.0
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


@pytest.mark.parametrize("fastest", ["product", "onednn product", "onednn lstm", "no onednn"])
def test_roofs_count_bytes_and_operations(monkeypatch, fastest):
    """Where each takes a given time, the figures are what was counted."""
    product, lstm = 2 * 512**3, Workload(Shape("s", 8, 256, 512, 512)).flops
    counts = {"product": product, "onednn product": product, "onednn lstm": lstm}
    if fastest == "no onednn":
        counts = {"product": product}
    elif not cpu_rules.onednn_has(torch.float32):
        pytest.skip("needs oneDNN")
    monkeypatch.setattr(cpu_rules, "onednn_has", lambda _: fastest != "no onednn")
    # at 2 GFLOP/s the fastest, at 1 the others; the copy, of 2^28 bytes, takes two seconds
    seconds = [count / (2e9 if name == fastest else 1e9) for name, count in counts.items()]
    answers = iter([2.0, *seconds])
    monkeypatch.setattr("benchmarks.probe._best", lambda step, _: step() is not None and next(answers))
    assert probe(CPU, {"fp32"}) == {BANDWIDTH: 0.2684, "fp32": 1.0 if fastest == "no onednn" else 2.0}
    assert list(answers) == []


def test_a_roof_is_the_best_of_many_calls(monkeypatch):
    called, times = [], itertools.chain([3.0, 1.0, 2.0], itertools.repeat(5.0))
    monkeypatch.setattr("benchmarks.probe.sample_seconds", lambda step, _: next(times))
    assert _best(lambda: called.append(1), CPU) == 1.0
    assert called == [1]  # outside the clock, to compile and prepare


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
