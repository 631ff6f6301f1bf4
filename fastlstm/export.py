"""Forms of an exported program that run where fastlstm is absent: torch's own ops, and ONNX's LSTM.

`torch.export.export` makes one `fastlstm::lstm_forward` of a layer, both its directions. What is here says the same in
the words of others, without unrolling the loop over time, so that lengths may stay dynamic:

    program = torch.export.export(model, (x,), dynamic_shapes=...)
    program.run_decompositions(fastlstm.export.decompositions())  # then torch.export.save, or AOTInductor
    torch.onnx.export(model, (x,), dynamo=True, custom_translation_table=fastlstm.export.onnx_translations())

Packed input has neither form: export the padded one. A projection has none in ONNX.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlstm.stock import ONEDNN_LSTM
from fastlstm.weights import directions

_LAYER = torch.ops.fastlstm.lstm_forward.default


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Return what makes torch's own ops of `fastlstm::lstm_forward`, for `ExportedProgram.run_decompositions`.

    On a CPU each direction of a layer becomes oneDNN's `aten::mkldnn_rnn_layer`, whose lengths may be dynamic. What
    oneDNN does not run (float64, float16, a projection), and other devices, get `aten::lstm`, which torch traces for
    the one length that the program was exported with. In bfloat16 the program needs a processor for which oneDNN has
    it, wherever it was exported.

    Returns:
        A decomposition table of one entry. What it makes is for inference.

    Raises:
        NotImplementedError: when a program is decomposed that has packed input.

    Example:
        >>> import fastlstm.export
        >>> list(fastlstm.export.decompositions())
        [<OpOverload(op='fastlstm.lstm_forward', overload='default')>]
    """
    return {_LAYER: _in_torch}


def onnx_translations() -> dict[Any, Callable[..., Any]]:
    """Return what makes ONNX's LSTM of `fastlstm::lstm_forward`, for `torch.onnx.export(dynamo=True)`.

    Returns:
        A `custom_translation_table` of one entry.

    Raises:
        ImportError: onnxscript, which torch's exporter needs too, is not installed.
        NotImplementedError: when a program is exported that has a projection or packed input.
    """
    import onnxscript  # what torch's exporter is written in, and optional like it

    op: Any = onnxscript.opset18

    def gates(tensor: Any) -> Any:
        """Reorder i, f, g, o to ONNX's i, o, f, c."""
        i, f, g, o = op.Split(tensor, num_outputs=4, axis=0)
        return op.Concat(i, o, f, g, axis=0)

    def stacked(tensors: Any) -> Any:
        return op.Concat(*(op.Unsqueeze(tensor, [0]) for tensor in tensors), axis=0)

    def layer(x: Any, h0: Any, c0: Any, weights: Any, batch_sizes: Any, *_: Any) -> Any:
        D, _, P = h0.shape
        H = c0.shape[2]
        _refuse(batch_sizes, "a projection" if H != P else "")
        w_ih, w_hh, b_ih, b_hh, _ = zip(*directions(weights, D), strict=True)
        bias = None
        if b_ih[0] is not None:
            bias = stacked(op.Concat(gates(b), gates(r), axis=0) for b, r in zip(b_ih, b_hh, strict=True))
        output, h_n, c_n = op.LSTM(
            x,
            stacked(map(gates, w_ih)),
            stacked(map(gates, w_hh)),
            bias,
            None,
            h0,
            c0,
            hidden_size=H,
            direction="bidirectional" if D == 2 else "forward",
        )
        output = op.Reshape(op.Transpose(output, perm=[0, 2, 1, 3]), [0, 0, D * H])  # of [T, D, B, H]
        return output, h_n, c_n, op.Identity(c_n), op.Identity(c_n)  # the last two, for backward, are not used

    return {_LAYER: layer}


def _in_torch(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    *_: Any,
) -> tuple[Tensor, ...]:
    """Run a layer by torch's own ops."""
    _refuse(batch_sizes)
    D, P = h0.shape[::2]
    H = c0.shape[2]
    has_biases = len(weights) // D >= 4
    nothing = x.new_empty(0), c0.new_empty(0)
    if x.device.type != "cpu" or P != H or x.dtype not in (torch.float32, torch.bfloat16):
        flags = (has_biases, 1, 0.0, False, D == 2, False)
        output, h_n, c_n = torch.ops.aten.lstm.input(x, [h0, c0], weights, *flags)
        return output, h_n, c_n, *nothing

    flags = ([], ONEDNN_LSTM, H, 1, has_biases, False, False, False)
    results = []
    for d, direction in enumerate(directions(weights, D)):
        tensors = (x.new_empty(0) if weight is None else weight for weight in direction[:4])
        states = (h0[d : d + 1].contiguous(), c0[d : d + 1].contiguous())
        results.append(torch.ops.aten.mkldnn_rnn_layer.default(x.contiguous(), *tensors, *states, d == 1, *flags))
    output, h_n, c_n, _ = zip(*results, strict=True)
    return torch.cat(output, 2), torch.cat(h_n), torch.cat(c_n), *nothing


def _refuse(batch_sizes: Any, other: str = "") -> None:
    """Raise for a layer that has no such form."""
    if what := "packed input" if batch_sizes is not None else other:
        raise NotImplementedError(f"an LSTM with {what} has no form without fastlstm here; see fastlstm.export")
