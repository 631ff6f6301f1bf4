"""Stock's own ops: a whole network by `torch._VF.lstm`, a step by `lstm_cell`, and the one buffer that cuDNN reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.weak import TensorWeakRef

from fastlstm import autocast, checks
from fastlstm.checks import Network, States
from fastlstm.weights import directions

# torch._VF looks an op up on every call
lstm_cell: Any = torch._VF.lstm_cell  # pyright: ignore[reportAttributeAccessIssue]
# the cell's number in `aten.mkldnn_rnn_layer`, oneDNN's dense layer
ONEDNN_LSTM = 2
_lstm: Any = torch._VF.lstm  # pyright: ignore[reportAttributeAccessIssue]
# the backward passes of cuDNN and MIOpen have no derivative
_ONCE = ("CudnnRnn", "MiopenRnn")


def run(
    network: Network,
    weights: list[Tensor],
    data: Tensor,
    batch_sizes: Tensor | None,
    states: States,
    training: bool,
    plain: Callable[..., tuple[Tensor, Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor]:
    """Call stock's op for the whole network; `training` says whether a backward pass will follow.

    `plain(network, weights, data, batch_sizes, states)` computes the same, and can be differentiated twice.
    """
    train, dropout = network.training, network.dropout
    if data.is_cuda:
        weights = network.weights_for_cudnn(weights)
        states = (states[0].contiguous(), states[1].contiguous())  # cuDNN refuses other strides
        if training and not train:
            # cuDNN saves for backward in training mode only; without dropout the two modes compute the same
            train, dropout = True, 0.0
    flags = (network.bias, network.num_layers, dropout, train, network.bidirectional)
    if batch_sizes is None:
        results = _lstm(data, states, weights, *flags, network.batch_first)
    else:
        results = _lstm(data, batch_sizes, states, weights, *flags)
    node = results[0].grad_fn if _may_be_a_vendors(data) else None  # to look at it costs 2 % of a small training step
    # a mask of dropout is not to be had again: there torch's own error stays
    if node is not None and node.name().startswith(_ONCE) and not (train and dropout and network.num_layers > 1):

        def again(data: Tensor, *others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            *weights, h0, c0 = others
            return plain(network, weights, data, batch_sizes, (h0, c0))

        _differentiate_twice(node, (data, *weights, *states), again)
    return results


def _may_be_a_vendors(data: Tensor) -> bool:
    """Whether stock's op may be cuDNN's or MIOpen's."""
    return data.is_cuda


def _differentiate_twice(
    node: torch.autograd.graph.Node,
    inputs: Sequence[Tensor],
    again: Callable[..., tuple[Tensor, Tensor, Tensor]],
) -> None:
    """Where a graph of the backward pass is asked for, put gradients that have one in the place of the node's own.

    Args:
        node: what computes the gradients of `inputs`, in their order.
        inputs: the node's; it saves them, and they are not kept alive beyond that.
        again: computes the node's outputs from the inputs, differentiably.
    """
    references = [TensorWeakRef(tensor) for tensor in inputs]

    def replace(gradients: tuple[Tensor | None, ...], cotangents: tuple[Tensor | None, ...]) -> Any:
        if not torch.is_grad_enabled():
            return None
        saved = [reference() for reference in references]
        present = [tensor for tensor in saved if tensor is not None]
        if len(present) < len(saved):
            return None
        given = [cotangent for cotangent in cotangents if cotangent is not None]
        # aliases, in the dtype that autocast has brought them to: other ways to the same tensors must not be counted
        aliases = [tensor.view_as(tensor).to(given[0].dtype) for tensor in present]
        with autocast.off(given[0].device):
            outputs = again(*aliases)
        used = [output for output, cotangent in zip(outputs, cotangents, strict=False) if cotangent is not None]
        # of the weights cuDNN makes all gradients or none; those that nobody asked for go no further
        asked = [t.requires_grad and g is not None for t, g in zip(aliases, gradients, strict=True)]
        wanted = [alias for alias, ask in zip(aliases, asked, strict=True) if ask]
        found = iter(torch.autograd.grad(used, wanted, given, create_graph=True))
        return tuple(next(found) if ask else None for ask in asked)

    node.register_hook(replace)


def run_step(network: Network, weights: list[Tensor], data: Tensor, states: States) -> tuple[Tensor, Tensor, Tensor]:
    """Run one time step, without a projection, by torch's cell: a direction is no more than a set of weights."""
    checks.check_alike(data, states, weights)
    h0, c0 = states
    D = 2 if network.bidirectional else 1
    rows = data.flatten(0, -2)
    stepped: list[States] = []
    for k, (w_ih, w_hh, b_ih, b_hh, _) in enumerate(directions(weights, network.num_layers * D)):
        stepped.append(lstm_cell(rows, (h0[k], c0[k]), w_ih, w_hh, b_ih, b_hh))
        if (k + 1) % D == 0:
            rows = torch.cat([h for h, _ in stepped[-D:]], 1)
            if network.dropout and network.training and k + 1 < len(h0):
                rows = F.dropout(rows, network.dropout)
    h_n, c_n = (torch.stack(states) for states in zip(*stepped, strict=True))
    return rows.view(*data.shape[:-1], -1), h_n, c_n


def flat_copies(network: Network, weights: list[Tensor]) -> list[Tensor]:
    """Return differentiable copies of the weights in the one buffer that cuDNN reads.

    Without it ATen makes the same copy inside the op on every call, and warns about it.
    """
    recording = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(recording):  # `flatten` cannot move an inference tensor
        copies = [weight.clone() for weight in weights]
    flatten(network, copies)
    return copies


def flatten(network: Network, weights: list[Tensor]) -> None:
    """Move the storage of each weight into one buffer in cuDNN's layout, as `nn.RNNBase` does; values stay.

    `nn.RNNBase` leaves bfloat16 out, so that its op copies all weights in every call, and warns. Here it moves as bits.
    """
    names = ("input_size", "hidden_size", "proj_size", "num_layers", "bias", "batch_first", "bidirectional")
    sizes = {name: getattr(network, name) for name in names}
    with torch.inference_mode(False):  # or the parameters themselves would become inference tensors, for good
        sixteen_bits = all(weight.dtype == torch.bfloat16 for weight in weights)
        moved = [weight.data.view(torch.float16) for weight in weights] if sixteen_bits else weights
        holder: Any = SimpleNamespace(mode="LSTM", _flat_weights=moved, _flat_weights_names=moved, **sizes)
        nn.RNNBase.flatten_parameters(holder)
        if sixteen_bits:
            for weight, bits in zip(weights, moved, strict=True):
                weight.data = bits.view(torch.bfloat16)
