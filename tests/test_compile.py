"""torch.compile: one graph for all lengths, dense and packed, with nothing unrolled and nothing recompiled."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from helpers import assert_close, run_lstm
from pairs import INTERPRETED, H, I, make_pair
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import Unsupported
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._inductor import config
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

import fastlstm
from fastlstm import cpu_rules

OPTIONS: dict[str, Any] = {"num_layers": 2, "bidirectional": True}
FORMS = ("dense", "batch_first", "sorted", "unsorted")
# a first graph is for the sizes seen, and once all have changed a second one is for any; none is H or I, which dynamo
# would take for the same size
LENGTHS = ((9, 5, 3, 2, 1), (11, 8, 7, 6, 4, 1), (10, 6), (13, 2, 2, 1, 1, 1, 1))
# inductor's own, when it is first used; caches that are off are told of once
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled"),
]


@pytest.fixture(autouse=True)
def _afresh():
    torch.compiler.reset()


def make_input(form: str, lengths: tuple[int, ...]) -> Any:
    if form in ("sorted", "unsorted"):
        rows = [torch.randn(n, I) for n in (lengths if form == "sorted" else lengths[::-1])]
        return pack_sequence(rows, enforce_sorted=form == "sorted")
    shape = (max(lengths), len(lengths))
    return torch.randn(*(shape[::-1] if form == "batch_first" else shape), I)


def make_states(lstm: nn.RNNBase, B: int) -> Any:
    rows = lstm.num_layers * (2 if lstm.bidirectional else 1)
    return torch.randn(rows, B, H), torch.randn(rows, B, H)


def run(compiled: Any, x: Any, hx: Any) -> dict[str, torch.Tensor]:
    return {name.replace("_orig_mod.", ""): value for name, value in run_lstm(compiled, x, hx).items()}


@pytest.mark.parametrize(
    ("form", "with_states"), [*((form, False) for form in FORMS), ("dense", True), ("unsorted", True)]
)
def test_one_graph_for_all_lengths(form, with_states):
    stock, ours = make_pair("reference", **OPTIONS, batch_first=form == "batch_first")
    counter = CompileCounterWithBackend("aot_eager")
    compiled: Any = torch.compile(ours, fullgraph=True, backend=counter)
    for training in (True, False):
        ours.train(training)
        counter.clear()
        for lengths in LENGTHS:
            x, hx = make_input(form, lengths), make_states(ours, len(lengths)) if with_states else None
            if training:
                assert_close(run(compiled, x, hx), run_lstm(stock, x, hx), dtype=torch.float32)
                continue
            with torch.no_grad():
                (output, states), (expected, expected_states) = compiled(x, hx), stock(x, hx)
            assert type(output) is type(expected)
            rows = (output.data, expected.data) if isinstance(output, PackedSequence) else (output, expected)
            torch.testing.assert_close((rows[0], *states), (rows[1], *expected_states))
        assert counter.frame_count <= 2, "recompiled for a length"


@pytest.mark.parametrize("widened", [True, False])
def test_one_graph_in_16_bit(widened, monkeypatch):
    monkeypatch.setattr(cpu_rules, "is_widened", lambda dtype: widened and dtype.itemsize == 2)
    ours = fastlstm.LSTM(I, 4, dtype=torch.bfloat16)
    counter = CompileCounterWithBackend("aot_eager")
    compiled: Any = torch.compile(ours, fullgraph=True, backend=counter, dynamic=True)
    for lengths in LENGTHS:
        x = make_input("dense", lengths).detach().bfloat16().requires_grad_()
        compiled(x)[0].sum().backward()
    assert counter.frame_count <= 2, "recompiled for a length"


@pytest.mark.parametrize("form", ["dense", "sorted"])
def test_inductor(form):
    stock, ours = make_pair("reference")
    counter = CompileCounterWithBackend("inductor")
    compiled: Any = torch.compile(ours, fullgraph=True, backend=counter, dynamic=True)
    counts = []
    for lengths in LENGTHS[:2]:
        x = make_input(form, lengths)
        with config.patch(force_disable_caches=True):  # one on disk would have the backward of an older fastlstm
            assert_close(run(compiled, x, None), run_lstm(stock, x), dtype=torch.float32)
        counts.append(counter.frame_count)
    assert counts[0] == counts[1], "recompiled for a length"


@pytest.mark.parametrize("form", ["dense", "sorted"])
def test_nothing_is_unrolled(form):
    """Forward and backward graphs are of the same size for any length, and each layer is one node of each."""

    def nodes(lengths):
        torch.compiler.reset()
        graphs = []

        def keep(graph, _):
            graphs.append([str(node.target) for node in graph.graph.nodes])
            return make_boxed_func(graph.forward)

        _, ours = make_pair("reference", **OPTIONS)
        run(
            torch.compile(ours, fullgraph=True, backend=aot_autograd(fw_compiler=keep)),
            make_input(form, lengths),
            None,
        )
        return graphs

    short, long = nodes((3, 2)), nodes((40, 30))
    assert [len(graph) for graph in short] == [len(graph) for graph in long]
    assert [sum("fastlstm.lstm" in name for name in graph) for graph in long] == [2, 2]


# dynamo's own, where torch breaks the graph
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_packing_inside_the_region():
    """Torch itself refuses to trace its packing; around it, each part is still one graph for all lengths."""
    stock, ours = make_pair("reference")

    def model(x, lengths, lstm=ours):
        output, _ = lstm(pack_padded_sequence(x, lengths, enforce_sorted=False))
        return pad_packed_sequence(output)[0]

    with pytest.raises(Unsupported, match="pack_padded_sequence"):
        torch.compile(pack_padded_sequence, fullgraph=True, backend="eager")(torch.zeros(2, 2, I), torch.tensor([2, 1]))
    counters.clear()
    counter = CompileCounterWithBackend("aot_eager")
    compiled: Any = torch.compile(model, backend=counter)
    counts = []
    for lengths in LENGTHS:
        x = torch.randn(max(lengths), len(lengths), I)
        torch.testing.assert_close(compiled(x, torch.tensor(lengths)), model(x, torch.tensor(lengths), stock))
        counts.append(counter.frame_count)
    assert counts[1:] == counts[1:2] * 3, "recompiled for a length"
    reasons = counters["graph_break"]
    assert reasons
    assert all("pack_padded_sequence" in reason or "pad_packed_sequence" in reason for reason in reasons), list(reasons)


def test_a_packed_sequence_made_inside_the_region():
    stock, ours = make_pair("reference")
    x = make_input("sorted", LENGTHS[0])

    def model(data, batch_sizes, lstm: Any = ours):
        return lstm(PackedSequence(2 * data, batch_sizes))[0].data

    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x.data, x.batch_sizes), model(x.data, x.batch_sizes, stock))


def test_values_that_a_tracer_cannot_see_are_checked_when_it_runs():
    _, ours = make_pair("reference")
    compiled: Any = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=True)
    x = make_input("sorted", LENGTHS[0])
    with pytest.raises(RuntimeError, match="must fall and sum to its 20 rows"):
        compiled(x._replace(batch_sizes=x.batch_sizes.flip(0)))
    with pytest.raises(RuntimeError, match="with a batch of 5, got 4"):
        compiled(x, make_states(ours, 4))
    unsorted = make_input("unsorted", LENGTHS[0])
    with pytest.raises(Exception, match=r"Expected hidden\[0\] size"):
        compiled(unsorted, make_states(ours, 4))


def test_in_a_region_of_autocast():
    _, ours = make_pair("reference")
    compiled: Any = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = make_input("dense", LENGTHS[0])
    with torch.autocast("cpu", torch.bfloat16):
        results, expected = run(compiled, x, None), run_lstm(ours, x)
    for name, value in expected.items():
        torch.testing.assert_close(results[name], value, msg=name)


@INTERPRETED
def test_the_kernels_when_compiled():
    stock, ours = make_pair("triton", **OPTIONS)
    compiled: Any = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = make_input("unsorted", LENGTHS[0])
    assert_close(run(compiled, x, None), run_lstm(stock, x), dtype=torch.float32)


@INTERPRETED
def test_what_the_kernels_cannot_is_refused_when_it_runs():
    _, ours = make_pair("triton", torch.float64)
    compiled: Any = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="the kernels compute in float32, float16 and bfloat16, not float64"):
        compiled(make_input("dense", LENGTHS[0]).double())


def test_time_to_compile():
    """To train a 2-layer LSTM over 256 steps takes about as long as a 2-layer MLP, so not a step of it is traced.

    1.2 times is measured, where a graph of the steps would take a hundred; dynamo has more to read, inductor has as
    many kernels to make.
    """
    lstm = fastlstm.LSTM(16, 16, num_layers=2, backend="reference")
    mlp = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
    x = torch.randn(256, 2, 16)

    def seconds(model: nn.Module) -> float:
        torch.compiler.reset()
        started = os.times()
        with config.patch(force_disable_caches=True, compile_threads=1):
            results = torch.compile(model, fullgraph=True)(x)
            (results if model is mlp else results[0]).sum().backward()
        return sum(os.times()[:4]) - sum(started[:4])  # of the C++ compiler that inductor starts, too

    seconds(mlp)  # what is imported and started once
    ratio = seconds(lstm) / seconds(mlp)
    print(f"compile time over an MLP's: {ratio:.2f}")
    assert ratio < 2
