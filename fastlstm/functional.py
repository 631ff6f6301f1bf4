"""The functional LSTM: checks, routing, and the loops over layers that the chosen backend needs.

`lstm` is the stateless form for users. `forward` is what it shares with the module: it brings any input (batched,
unbatched, batch_first, packed in any order) and any hx into one form, asks `dispatch.decide` which code should run,
runs it, and gives the result back in the form of the input. Both speak torch's own words in their errors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils.rnn import PackedSequence

from fastlstm import autocast, autograd, checks, cpu, cpu_rules, dispatch, ops, stock, tracing, tuning
from fastlstm.checks import Network, States
from fastlstm.problem import Device, Problem, allows_tf32, device_of


@dataclass
class Stateless:
    """A Network without a module: the arguments of `lstm`, or an LSTMCell seen as one layer and one step."""

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
    recompute: bool = False

    def weights_for_cudnn(self, weights: list[Tensor]) -> list[Tensor]:
        """Return copies: the caller's tensors stay where they are."""
        return stock.flat_copies(self, weights)


def lstm(
    input: Tensor | PackedSequence,
    hx: States | None,
    params: Sequence[Tensor],
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    train: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    *,
    backend: str = "auto",
    recompute: bool = False,
) -> tuple[Tensor | PackedSequence, States]:
    """Run an LSTM on weights that the caller holds: `fastlstm.LSTM` without the module.

    The arguments are those of `torch._VF.lstm`, in its order; what is returned is what `nn.LSTM` returns. The sizes
    input_size I, hidden_size H and, where there is a projection, proj_size P (otherwise P is H) are read from
    `params`. D is 2 if `bidirectional`, otherwise 1.

    Args:
        input: [T, B, I], or [B, T, I] if `batch_first`, or [T, I] for one sequence, or a PackedSequence.
        hx: (h_0 [num_layers*D, B, P], c_0 [num_layers*D, B, H]), without B for one sequence; None for zeros. Rows
            are in the order of the batch before packing.
        params: for each layer, and in it for each direction, weight_ih [4H, I] (from layer 1 on [4H, D*P]),
            weight_hh [4H, P], then bias_ih [4H] and bias_hh [4H] if `has_biases`, then weight_hr [P, H] if there
            is a projection: the order of `nn.LSTM.parameters()`. All share the input's dtype and device.
        has_biases: whether `params` holds biases.
        num_layers: how many layers are stacked.
        dropout: probability of zeroing an element between layers, if `train`.
        train: whether dropout is active. Gradients do not depend on it.
        bidirectional: whether each layer also runs backwards in time.
        batch_first: whether the batch is the first dimension of input and output (not of hx).
        backend: "auto", "reference", "triton" or "torch", as for `fastlstm.LSTM`.
        recompute: whether backward makes the activated gates again, likewise.

    Returns:
        (output, (h_n, c_n)): output [T, B, D*P] in the form of `input`, h_n and c_n in the shapes of hx.

    Raises:
        RuntimeError: a size, dtype or device disagrees with the others, or the backend cannot run here.
        ValueError: `input` has neither 2 nor 3 dimensions or another dtype than `params`, `dropout` is no
            probability, `params` holds the wrong number of tensors or a projection that is none, or `backend` is
            unknown.

    Example:
        >>> import torch, fastlstm
        >>> stock = torch.nn.LSTM(3, 4, num_layers=2)
        >>> x = torch.randn(5, 2, 3)
        >>> output, (h_n, c_n) = fastlstm.lstm(x, None, list(stock.parameters()), num_layers=2)
        >>> output.shape, h_n.shape
        (torch.Size([5, 2, 4]), torch.Size([2, 2, 4]))
        >>> torch.allclose(output, stock(x)[0], atol=1e-6)
        True
    """
    dispatch.check_backend(backend)
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout should be a number in range [0, 1], got {dropout}")
    checks.check_recompute(recompute, backend)
    weights = list(params)
    I, H, P = checks.sizes_of(weights, has_biases, num_layers, bidirectional)  # noqa: E741
    network = Stateless(
        I, H, P, num_layers, has_biases, batch_first, dropout, bidirectional, bool(train), backend, recompute
    )
    return forward(network, weights, input, hx)


def forward(
    network: Network, weights: list[Tensor], input: Tensor | PackedSequence, hx: States | None
) -> tuple[Any, States]:
    """Run `network` with `weights` (torch's flat order) over any form of input: what `nn.LSTM.forward` does."""
    data, batch_sizes, states, decision = prepare(network, weights, input, hx)
    if decision.regime == "step":
        output, h_n, c_n = stock.run_step(network, weights, data, states)
    elif decision.backend == "torch":
        training = decision.problem.training
        output, h_n, c_n = stock.run(network, weights, data, batch_sizes, states, training, _run_plain)
    else:
        stack = decision.regime == "wavefront"
        output, h_n, c_n = _run_layers(network, weights, data, batch_sizes, states, decision.implementation, stack)

    if isinstance(input, PackedSequence):
        _, batch_sizes, sorted_indices, unsorted_indices = input
        output = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
        return output, permute((h_n, c_n), unsorted_indices)
    if input.dim() == 2:
        return output.squeeze(0 if network.batch_first else 1), (h_n.squeeze(1), c_n.squeeze(1))
    return output, (h_n, c_n)


def prepare(
    network: Network, weights: list[Tensor], input: Tensor | PackedSequence, hx: States | None
) -> tuple[Tensor, Tensor | None, States, dispatch.Decision]:
    """Check a call, bring it into one form and decide who runs it.

    Returns:
        data: [T, B, I] ([B, T, I] if batch_first), or the rows [N, I] of a packed batch.
        batch_sizes: of a packed batch, otherwise None.
        states: (h0 [L*D, B, P], c0 [L*D, B, H]), rows in the order of `data`.
        decision: which backend runs it.
    """
    if isinstance(input, PackedSequence):
        data, batch_sizes, order, _ = input
        checks.check_input(network, weights, data, batch_sizes)
        T, B, runs = batch_sizes.size(0), *_rows_and_runs(batch_sizes, order, hx)
    else:
        dims = input.dim()
        if dims != 3 and dims != 2:
            raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {dims}D instead")
        data, batch_sizes, order, runs = input, None, None, 0
        if dims == 2:
            data = input.unsqueeze(0 if network.batch_first else 1)
        if hx is not None:
            hx = checks.batched_states(hx, dims)
        checks.check_input(network, weights, data, None)
        T, B, _ = data.shape
        if network.batch_first:
            T, B = B, T
        if T == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")

    compiling = torch.compiler.is_compiling()
    if hx is None:
        states = _zero_states(network, data, B, compiling)
    else:
        checks.check_states(network, hx, B, data)
        states = permute(hx, order)
    return data, batch_sizes, states, _decide(network, weights, data, states, T, B, runs, compiling)


def _rows_and_runs(batch_sizes: Tensor, order: Tensor | None, hx: States | None) -> tuple[int, int]:
    """Return B, and the number of runs of steps with equal batch size, of a packed batch."""
    if not torch.compiler.is_compiling():
        if tracing.recorded():
            return cast("int", batch_sizes[0]), 2  # a tensor: a number would be recorded as a constant
        sizes = batch_sizes.tolist()
        return sizes[0], len(set(sizes))  # that they only fall is checked when they run
    # a tracer knows no values, but sizes that must agree with them; that they do, the op checks when it runs
    if order is not None:
        return order.size(0), 1
    if hx is not None:
        checks.check_pair(hx, "lstm")
        return hx[0].size(1), 1
    return ops.first_step(batch_sizes).size(0), 1


def permute(hx: States, order: Tensor | None) -> States:
    """Return hx with its rows in another order."""
    if order is None:
        return hx
    return hx[0].index_select(1, order), hx[1].index_select(1, order)


def _zero_states(network: Network, data: Tensor, B: int, compiling: bool) -> States:
    rows = network.num_layers * (2 if network.bidirectional else 1)
    as_op = compiling and not torch.compiler.is_exporting()

    def zeros(width: int) -> Tensor:
        return ops.zero_states(data.detach(), rows, B, width) if as_op else data.new_zeros((rows, B, width))

    c0 = zeros(network.hidden_size)
    return (zeros(network.proj_size) if network.proj_size else c0), c0


def _decide(
    network: Network, weights: list[Tensor], data: Tensor, states: States, T: int, B: int, runs: int, compiling: bool
) -> dispatch.Decision:
    """Ask dispatch who runs this call."""
    training = torch.is_grad_enabled() and (
        data.requires_grad or any(w.requires_grad for w in weights) or any(s.requires_grad for s in states)
    )
    D = 2 if network.bidirectional else 1
    sizes = (T, B, network.input_size, network.hidden_size, network.proj_size, network.num_layers, D)
    backend = network.backend
    if compiling:
        # one opaque op a layer, which chooses when it runs: no loop is unrolled, and nothing makes a guard on T or B
        chosen = "reference" if backend == "torch" else backend
        problem, device = Problem(*sizes, data.dtype, training, runs), Device(data.device.type, data.device.type)
        return dispatch.Decision(chosen, "compiled", "torch.compile is tracing.", problem, device)
    dtype = autocast.dtype_for(data)
    tf32 = data.is_cuda and (dtype or data.dtype) == torch.float32 and allows_tf32()
    apart = bool((network.dropout and network.training) or (network.recompute and training))
    given = (*sizes, dtype or data.dtype, training, runs, tf32, apart)
    override = ""
    if backend == "auto":
        override = dispatch.override()
        recompute = network.recompute and training
        checks.check_recompute(recompute, override)
        if (decision := _decide_without_choice(given, override, recompute, data)) is not None:
            return decision
    device = device_of(data)
    times: dispatch.Times = ()
    if override == "auto" and device.kind != "cpu":
        times = tuning.times(_problem(*given), device, data.device, trial)
        device = device_of(data)  # a trial may have found that it has fewer processors for us
    onednn = torch._C._get_mkldnn_enabled()
    lowered = "" if dtype is None else "graph" if torch.is_grad_enabled() else "no graph"
    decision = _decision(backend, override, lowered, onednn, device, times, *given)
    if decision.backend == "onednn" and tracing.watched(data):
        return replace(decision, backend="reference", regime="loop", reason="A tracer or a mode should see one op.")
    return decision


def _decide_without_choice(
    given: tuple[Any, ...], override: str, recompute: bool, data: Tensor
) -> dispatch.Decision | None:
    """Return who runs a call with backend="auto" where speed does not decide, or None; `given` makes its Problem."""
    if tracing.transformed():
        reason = "torch.func and forward-mode AD see into plain torch ops only."
        return dispatch.Decision("reference", "plain", reason, Problem(*given), device_of(data))
    if override != "auto":
        return None
    if tracing.recorded():  # then T and B are tensors
        reason = "torch.jit.trace records torch's own op, which takes any lengths and rows."
        return dispatch.Decision("torch", "stock", reason, Problem(*given), device_of(data))
    if recompute:
        device = device_of(data)
        decision = dispatch.decide(Problem(*given), device, dispatch.decide_layer(Problem(*given), device))
        return replace(decision, reason="It can recompute its gates, which stock's op cannot.")
    return None


# the very object of an earlier call: it is made sooner, and looked up sooner by what keeps an answer for it
_problem = functools.lru_cache(maxsize=4096)(Problem)


@functools.lru_cache(maxsize=4096)
def _decision(
    backend: str,
    override: str,
    lowered: str,
    onednn: bool,
    device: Device,
    times: dispatch.Times,
    *problem: Any,
) -> dispatch.Decision:
    """Decide once for each kind of call; `override` (empty but for "auto") and `onednn` are read again underneath.

    `lowered` tells whether autocast is on, and if so whether stock's op would keep a graph.
    """
    decision = dispatch.decide(Problem(*problem), device, backend, times)
    p = decision.problem
    on_cpu = bool(lowered) and device.kind == "cpu" and override == "auto"
    if on_cpu and decision.regime == "step":  # the cell is another op to autocast
        return replace(decision, regime="stock", reason="Stock's own op runs under autocast.")
    dense = p.runs <= 1 and not p.P  # as stock sees it
    if on_cpu and decision.backend == "torch" and dense and not cpu_rules.onednn_has(p.dtype, lowered == "graph"):
        reason = "Under autocast stock asks oneDNN for a kernel that it does not have in this dtype here."
        return replace(decision, backend="reference", regime="loop", reason=reason)
    return decision


def trial(problem: Problem, device: torch.device, backend: str) -> Callable[[], list[Tensor]]:
    """Return a run of a problem on made-up data: forward and, if it trains, backward, to all results and gradients.

    The data are the same each time. Nothing of the caller's is touched, random numbers included.
    """
    p = problem
    width = p.P or p.H
    shapes = []
    for layer in range(p.L):
        sizes = checks.weight_sizes(p.D * width if layer else p.I, p.H, width).values()
        shapes += [*sizes][: 5 if p.P else 4] * p.D
    generator = torch.Generator(device).manual_seed(0)

    def uniform(bound: float, *shape: int) -> Tensor:
        values = torch.empty(shape, dtype=p.dtype, device=device).uniform_(-bound, bound, generator=generator)
        return values.requires_grad_(p.training)

    weights = [uniform(p.H**-0.5, *shape) for shape in shapes]  # as nn.LSTM has them at first
    network = Stateless(p.I, p.H, p.P, p.L, True, False, 0.0, p.D == 2, p.training, backend)
    stock.flatten(network, weights)
    network.weights_for_cudnn = lambda weights: weights  # they are in cuDNN's buffer already
    if p.runs:  # half of the rows' lengths lie between T/2 and T
        batch_sizes = torch.tensor([max(1, min(p.B, 2 * p.B * (p.T - t) // p.T)) for t in range(p.T)])
        data = uniform(1, int(batch_sizes.sum()), p.I)
        input = PackedSequence(data, batch_sizes)
    else:
        input = data = uniform(1, p.T, p.B, p.I)

    def run() -> list[Tensor]:
        with torch.set_grad_enabled(p.training):
            output, states = forward(network, weights, input, None)
            rows = output.data if isinstance(output, PackedSequence) else output
            results = [rows, *states]
            if p.training:
                results += torch.autograd.grad(rows, [data, *weights], torch.ones_like(rows))
        return [result.detach() for result in results]

    return run


def _run_layers(
    network: Network,
    weights: list[Tensor],
    data: Tensor,
    batch_sizes: Tensor | None,
    states: States,
    backend: str,
    stack: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run layer after layer over rows, or over [T, B, I], with dropout between them; or all at once as a `stack`."""
    if (dtype := autocast.dtype_for(data)) is not None:
        lowered = [autocast.cast(weight, dtype) for weight in weights], data.to(dtype)
        low_states = states[0].to(dtype), states[1].to(dtype)
        with autocast.off(data.device):
            output, h_n, c_n = _run_layers(network, *lowered, batch_sizes, low_states, backend, stack)
        packed = batch_sizes is not None and (torch.compiler.is_compiling() or bool(batch_sizes[0] != batch_sizes[-1]))
        dtype, cell = autocast.result_dtypes(data, states[1], packed, network.proj_size > 0, dtype)
        return output.to(dtype), h_n.to(dtype), c_n.to(cell)
    checks.check_alike(data, states, weights)
    if backend == "onednn" and batch_sizes is not None:  # the ops check for themselves
        checks.check_rows(batch_sizes, len(data), states[0].size(1))
    h0, c0 = states
    L, D = network.num_layers, 2 if network.bidirectional else 1
    each = len(weights) // (L * D)
    dense = batch_sizes is None
    transposed = dense and network.batch_first
    rows = data.transpose(0, 1) if transposed else data

    last_states = []
    together = L if stack else D
    for first in range(0, L * D, together):
        layer = slice(first, first + together)
        arguments = (rows, h0[layer], c0[layer], weights[first * each : (first + together) * each])
        if backend == "onednn":
            rows, *last = cpu.lstm_layer(*arguments, batch_sizes)
        else:
            rows, *last = autograd.lstm_layer(*arguments, batch_sizes, backend, network.recompute, stack)
        last_states.append(last)
        if network.dropout and network.training and first + together < L * D:
            rows = F.dropout(rows, network.dropout)
    h_n, c_n = (torch.cat(parts) if together < L * D else parts[0] for parts in zip(*last_states, strict=True))
    return rows.transpose(0, 1) if transposed else rows, h_n, c_n


_run_plain = functools.partial(_run_layers, backend="reference", stack=False)
