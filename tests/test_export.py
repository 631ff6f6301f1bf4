"""torch.export: one node a layer, any length, and forms that run without fastlstm: torch's own ops, and ONNX's."""

from __future__ import annotations

import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch
from pairs import H, I, make_input, make_pair
from torch import nn
from torch.export import Dim

import fastlstm.export

pytestmark = [
    # torch's own: of how it copies programs, and once a process of a route that it does not take
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two layers, both directions": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "no bias": {"bias": False, "bidirectional": True},
}
ANY = Dim.DYNAMIC


class Flat(nn.Module):
    """An LSTM with tensors for arguments and results, as an exported program wants them."""

    def __init__(self, lstm: Any):
        super().__init__()
        self.lstm = lstm

    def forward(self, x, h0=None, c0=None):
        output, (h_n, c_n) = self.lstm(x, None if h0 is None else (h0, c0))
        return output, h_n, c_n


def arguments(lstm: Any, T: int, B: int, with_states: bool, dtype: torch.dtype = torch.float32) -> tuple:
    x = torch.randn((B, T, I) if lstm.batch_first else (T, B, I), dtype=dtype)
    rows = lstm.num_layers * (2 if lstm.bidirectional else 1)
    states = [torch.randn(rows, B, width, dtype=dtype) for width in (lstm.proj_size or H, H)]
    return (x, *states) if with_states else (x,)


def export(options: dict[str, Any], with_states: bool = False) -> tuple[Flat, Flat, torch.export.ExportedProgram]:
    stock, ours = (Flat(lstm) for lstm in make_pair(**options))
    shapes = ({0: ANY, 1: ANY}, {1: ANY}, {1: ANY})[: 3 if with_states else 1]
    return stock, ours, torch.export.export(ours, arguments(ours.lstm, 5, 2, with_states), dynamic_shapes=shapes)


def nodes(program: torch.export.ExportedProgram, word: str) -> list[str]:
    return [str(n.target) for n in program.graph.nodes if n.op == "call_function" and word in str(n.target)]


def assert_equal(got: Any, expected: Any) -> None:
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("with_states", [False, True], ids=["", "hx"])
@pytest.mark.parametrize("options", [*OPTIONS.values(), {"proj_size": 2}], ids=str)
def test_one_node_a_layer_for_any_length(options, with_states):
    stock, ours, program = export(options, with_states)
    assert nodes(program, "fastlstm") == ["fastlstm.lstm_forward.default"] * ours.lstm.num_layers
    saves = [node.args[5] for node in program.graph.nodes if "lstm_forward" in str(node.target)]
    assert not any(saves)  # for inference nothing is kept
    for T, B in ((5, 2), (9, 3), (2, 6)):
        inputs = arguments(ours.lstm, T, B, with_states)
        assert_equal(program.module()(*inputs), stock(*inputs))


def test_an_exported_program_trains():
    stock, ours, program = export(OPTIONS["two layers, both directions"])
    x = arguments(ours.lstm, 4, 3, False)[0].requires_grad_()
    gradients = []
    for model in (stock, program.module()):
        output, h_n, c_n = model(x)
        loss = output.square().sum() + h_n.sum() + c_n.sum()
        gradients.append(torch.autograd.grad(loss, [x, *model.parameters()]))
    assert_equal(*gradients)


def test_packed_input():
    stock, ours = make_pair("reference", num_layers=2)

    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = ours

        def forward(self, data, batch_sizes):
            output, _ = self.lstm(nn.utils.rnn.PackedSequence(data, batch_sizes))
            return output.data

    x = make_input("sorted")
    program = torch.export.export(Packed(), tuple(x[:2]), dynamic_shapes=({0: ANY}, {0: ANY}))
    assert nodes(program, "lstm_forward") == ["fastlstm.lstm_forward.default"] * 2
    torch.testing.assert_close(program.module()(*x[:2]), stock(x)[0].data)
    other = nn.utils.rnn.pack_sequence([torch.randn(n, I) for n in (7, 6)])
    torch.testing.assert_close(program.module()(*other[:2]), stock(other)[0].data)
    with pytest.raises(NotImplementedError, match="packed input has no form"):
        program.run_decompositions(fastlstm.export.decompositions())


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_decomposed_for_any_length(options):
    stock, ours, program = export(options, with_states=True)
    program = program.run_decompositions(fastlstm.export.decompositions())
    assert not nodes(program, "fastlstm")
    for T, B in ((9, 3), (2, 6)):
        inputs = arguments(ours.lstm, T, B, True)
        with torch.no_grad():
            assert_equal(program.module()(*inputs), stock(*inputs))


@pytest.mark.parametrize("options", [{"proj_size": 2}, {"dtype": torch.float64}], ids=str)
def test_decomposed_for_one_length(options):
    stock, ours = (Flat(lstm) for lstm in make_pair(**options))
    inputs = arguments(ours.lstm, 5, 2, False, options.get("dtype", torch.float32))
    program = torch.export.export(ours, inputs).run_decompositions(fastlstm.export.decompositions())
    assert nodes(program, "lstm") == ["aten.lstm.input"]
    assert_equal(program.module()(*inputs), stock(*inputs))


def test_decomposed_runs_where_fastlstm_is_absent(tmp_path):
    _, ours, program = export(OPTIONS["two layers, both directions"])
    x = torch.randn(3, 7, I)
    torch.save((x, [result.detach() for result in ours(x)]), tmp_path / "expected.pt")
    torch.export.save(program.run_decompositions(fastlstm.export.decompositions()), tmp_path / "program.pt2")
    code = (
        "import sys, torch\n"
        "sys.modules['fastlstm'] = None\n"
        "x, expected = torch.load('expected.pt')\n"
        "with torch.no_grad():\n"
        "    got = torch.export.load('program.pt2').module()(x)\n"
        "torch.testing.assert_close(list(got), expected)\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=tmp_path)


@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # inductor's own
@pytest.mark.parametrize("decomposed", [False, True], ids=["our ops", "torch's ops"])
def test_aot_inductor(decomposed, tmp_path):
    """Compiled ahead of time, both forms run any length: ours from Python, torch's own wherever its package goes."""
    stock, ours, program = export({})
    if decomposed:
        program = program.run_decompositions(fastlstm.export.decompositions())
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "lstm.pt2"))
    compiled = torch._inductor.aoti_load_package(package)
    for T, B in ((9, 3), (2, 6)):
        inputs = arguments(ours.lstm, T, B, False)
        with torch.no_grad():
            assert_equal(compiled(*inputs), stock(*inputs))


# the exporter's own warnings: of an onnx it does not know, and of its use of deprecated functions
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("with_states", [False, True], ids=["", "hx"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_onnx(options, with_states):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    _, ours, program = export(options, with_states)
    table = fastlstm.export.onnx_translations()
    model: Any = torch.onnx.export(program, dynamo=True, custom_translation_table=table, verbose=False)
    operators = [node.op_type for node in model.model.graph]
    assert operators.count("LSTM") == ours.lstm.num_layers
    assert not {"Loop", "Scan", "MatMul", "Gemm"} & set(operators)
    assert {node.domain for node in model.model.graph} == {""}
    session = runtime.InferenceSession(model.model_proto.SerializeToString())
    for T, B in ((5, 2), (9, 3)):
        inputs = arguments(ours.lstm, T, B, with_states)
        names = [value.name for value in session.get_inputs()]
        results = session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
        assert_equal([torch.from_numpy(result) for result in results], [result.detach() for result in ours(*inputs)])


@pytest.mark.filterwarnings("ignore")
def test_onnx_has_no_projection():
    pytest.importorskip("onnxscript")
    _, _, program = export({"proj_size": 2})
    table = fastlstm.export.onnx_translations()
    with pytest.raises(torch.onnx.OnnxExporterError) as caught:
        torch.onnx.export(program, dynamo=True, custom_translation_table=table, verbose=False)
    causes, cause = [], caught.value
    while cause is not None:
        causes.append(str(cause))
        cause = cause.__cause__
    assert any("a projection has no form" in words for words in causes)
