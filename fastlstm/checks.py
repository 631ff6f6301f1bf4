"""What an LSTM call must satisfy, in torch's own words: sizes, dimension counts, dtypes and devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

States = tuple[Tensor, Tensor]


class Network(Protocol):
    """What an LSTM is, beside its weights: the module is one, the functional form makes one of its arguments."""

    input_size: int
    hidden_size: int
    proj_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    training: bool
    backend: str
    recompute: bool

    def weights_for_cudnn(self, weights: list[Tensor]) -> list[Tensor]:
        """Return the weights as views of one buffer in cuDNN's layout, for stock's op on CUDA."""
        ...


def check_recompute(recompute: bool, backend: str) -> None:
    """Raise for a backend that saves what it saves."""
    if recompute and backend == "torch":
        raise ValueError(
            "recompute=True needs backend 'auto', 'reference' or 'triton', got 'torch', which is stock's op"
        )


def check_input(network: Network, weights: Sequence[Tensor], data: Tensor, batch_sizes: Tensor | None) -> None:
    """Raise stock's errors for an input of the wrong dtype, dimension count or size."""
    if data.dtype != weights[0].dtype and not torch._C._is_any_autocast_enabled():
        # stock's check knows dense input only; a packed one fails inside the op, with a RuntimeError
        error = ValueError if batch_sizes is None else RuntimeError
        raise error(
            f"RNN input dtype ({data.dtype}) does not match weight dtype ({weights[0].dtype}). "
            f"Convert input: input.to({weights[0].dtype}), or convert model: model.to({data.dtype})"
        )
    dims = 3 if batch_sizes is None else 2
    if data.dim() != dims:
        raise RuntimeError(f"input must have {dims} dimensions, got {data.dim()}")
    if data.size(-1) != network.input_size:
        raise RuntimeError(
            f"input.size(-1) must be equal to input_size. Expected {network.input_size}, got {data.size(-1)}"
        )


def batched_states(hx: States, dims: int) -> States:
    """Check the dimension count of hx against the input's, and return it with a batch dimension."""
    kind, expected = ("batched 3-D", 3) if dims == 3 else ("unbatched 2-D", 2)
    if hx[0].dim() != expected or hx[1].dim() != expected:
        raise RuntimeError(
            f"For {kind} input, hx and cx should also be {expected}-D "
            f"but got ({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
        )
    return hx if dims == 3 else (hx[0].unsqueeze(1), hx[1].unsqueeze(1))


def check_pair(hx: States, op: str) -> None:
    """Raise stock's errors for an hx that is no pair."""
    if not isinstance(hx, tuple | list):
        raise TypeError(f"hx must be a tuple of two tensors (h_0, c_0), got {type(hx).__name__}")
    if len(hx) != 2:
        raise RuntimeError(f"{op} expects two hidden states, got {len(hx)}")


def check_states(network: Network, hx: States, B: int, data: Tensor) -> None:
    """Raise stock's errors for an hx that is no pair of tensors or has the wrong sizes or dtype."""
    check_pair(hx, "lstm")
    H = network.hidden_size
    rows = network.num_layers * (2 if network.bidirectional else 1)
    for index, width in enumerate((network.proj_size or H, H)):
        state = hx[index]
        if state.shape != (rows, B, width):
            raise RuntimeError(f"Expected hidden[{index}] size {(rows, B, width)}, got {list(state.shape)}")
        if state.dtype != data.dtype and not torch._C._is_any_autocast_enabled():
            raise RuntimeError(
                f"Input and hidden tensors are not the same dtype, found input tensor with {data.dtype} "
                f"and hidden[{index}] tensor with {state.dtype}"
            )


def check_rows(batch_sizes: Tensor, N: int, B: int) -> None:
    """Raise for batch_sizes that point outside the N rows or the B states of a packed batch."""
    sizes = batch_sizes.tolist()
    if sum(sizes) != N or sizes != sorted(sizes, reverse=True):  # no pack function makes these
        raise RuntimeError(f"batch_sizes of a packed batch must fall and sum to its {N} rows, got {sizes}")
    if sizes[0] != B:
        raise RuntimeError(f"Expected hidden[0] and hidden[1] with a batch of {sizes[0]}, got {B}")


def weight_sizes(I: int, H: int, P: int) -> dict[str, tuple[int, ...]]:  # noqa: E741
    """Return the size of each weight of a direction, in the order in which it is passed on."""
    return {
        "weight_ih": (4 * H, I),
        "weight_hh": (4 * H, P),
        "bias_ih": (4 * H,),
        "bias_hh": (4 * H,),
        "weight_hr": (P, H),
    }


def check_weights(weights: Sequence[Tensor | None], I: int, H: int, P: int) -> None:  # noqa: E741
    """Raise for a direction's weights (w_ih, w_hh, b_ih, b_hh, w_hr) of other sizes: oneDNN would read on past them."""
    for weight, (name, size) in zip(weights, weight_sizes(I, H, P).items(), strict=True):
        if weight is not None and weight.shape != size:
            raise RuntimeError(
                f"Expected {name} of size {size} in a layer of hidden_size={H}, got {list(weight.shape)}"
            )


def check_alike(data: Tensor, states: Sequence[Tensor], weights: list[Tensor]) -> None:
    """Raise what stock's op raises when its tensors differ in device or dtype."""
    for name, tensors in (("hidden", states), ("parameter", weights)):
        for tensor in tensors:
            if tensor.device != data.device:
                raise RuntimeError(
                    f"Input and {name} tensors are not at the same device, found input tensor at {data.device} "
                    f"and {name} tensor at {tensor.device}"
                )
            if tensor.dtype != data.dtype:
                raise RuntimeError(
                    f"Input and {name} tensors are not the same dtype, found input tensor with {data.dtype} "
                    f"and {name} tensor with {tensor.dtype}"
                )


def check_cell(cell: nn.LSTMCell, input: Tensor, hx: States) -> None:
    """Raise what stock's cell raises for a batched input and states that do not fit."""
    if input.size(1) != cell.input_size:
        raise RuntimeError(f"input has inconsistent input_size: got {input.size(1)} expected {cell.input_size}")
    for index, state in enumerate(hx):
        if state.size(0) != input.size(0):
            raise RuntimeError(
                f"Input batch size {input.size(0)} doesn't match hidden{index} batch size {state.size(0)}"
            )
        if state.size(1) != cell.hidden_size:
            raise RuntimeError(
                f"hidden{index} has inconsistent hidden_size: got {state.size(1)}, expected {cell.hidden_size}"
            )


def sizes_of(params: Sequence[Tensor], has_biases: bool, num_layers: int, bidirectional: bool) -> tuple[int, int, int]:
    """Read (input_size, hidden_size, proj_size) from the weights, and check the shape of each one."""
    D = 2 if bidirectional else 1
    kinds = ("weight_ih", "weight_hh") + (("bias_ih", "bias_hh") if has_biases else ())
    plain = num_layers * D * len(kinds)
    if num_layers < 1 or len(params) not in (plain, plain + num_layers * D):
        raise ValueError(
            f"params must hold {len(kinds)} tensors (with a projection {len(kinds) + 1}) for each of the {D} "
            f"direction(s) of num_layers={num_layers} layer(s) when has_biases={has_biases}, got {len(params)}"
        )
    projected = len(params) > plain
    kinds += ("weight_hr",) if projected else ()
    if params[0].dim() != 2 or params[1].dim() != 2:
        dims = (params[0].dim(), params[1].dim())
        raise ValueError(f"params[0] and params[1] must be weight_ih and weight_hh, both 2-D, got {dims}-D")
    H, I = params[0].size(0) // 4, params[0].size(1)  # noqa: E741
    width = params[1].size(1) if projected else H
    if projected and width >= H:  # stock's op takes such for no projection
        raise ValueError("proj_size has to be smaller than hidden_size")
    for start, group in enumerate(groups(params, num_layers * D)):
        layer, direction = divmod(start, D)
        inputs = I if layer == 0 else D * width
        sizes = weight_sizes(inputs, H, width)
        for offset, (kind, tensor) in enumerate(zip(kinds, group, strict=True)):
            if tensor.shape != sizes[kind]:
                name = f"{kind}_l{layer}{'_reverse' if direction else ''}"
                raise RuntimeError(
                    f"Expected params[{start * len(kinds) + offset}] ({name}) of size {sizes[kind]}, "
                    f"got {list(tensor.shape)}"
                )
    return I, H, width if projected else 0


def groups(weights: Sequence[Tensor], count: int) -> list[Sequence[Tensor]]:
    """Split the flat weights into one group for each layer and direction."""
    size = len(weights) // count
    return [weights[start : start + size] for start in range(0, len(weights), size)]
