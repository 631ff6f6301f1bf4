"""The modules: LSTM and LSTMCell, drop-in for torch's, and `explain`, which says what a call of one would run.

`LSTM` derives from `nn.RNNBase`, not from `nn.LSTM`: torch.compile refuses to look into instances of `nn.LSTM`. So
parameters, names, initial values, state_dict, repr and pickling are torch's own code. What differs is that weights
are read afresh on every call: nothing caches them, so nothing is stale and there is no flat buffer to warn about.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.utils.rnn import PackedSequence

from fastlstm import autocast, checks, dispatch, functional, stock, tracing
from fastlstm.checks import States
from fastlstm.dispatch import Decision


class LSTM(nn.RNNBase):
    """`torch.nn.LSTM` with the recurrence in fused kernels: same arguments, parameters, results and errors.

    See `torch.nn.LSTM` for the arguments; the two that are new are last. With T time steps, B rows, I = input_size,
    H = hidden_size, P = proj_size or H, L = num_layers and D = 2 if bidirectional, otherwise 1:

    Args:
        input_size: features of the input.
        hidden_size: features of the hidden state.
        num_layers: how many layers are stacked.
        bias: whether the layers have biases.
        batch_first: whether input and output are [B, T, ...] instead of [T, B, ...].
        dropout: probability of zeroing an element of each layer's output but the last, in training mode.
        bidirectional: whether each layer also runs backwards in time.
        proj_size: if positive, the hidden state is projected to this size.
        device: where the parameters live.
        dtype: of the parameters.
        backend: "auto" chooses what is best for each call (`explain` tells what, the environment variable
            FASTLSTM_BACKEND overrules it); "reference" is plain torch; "triton" the fused kernels; "torch" the op
            that `torch.nn.LSTM` calls (under torch.compile, which would unroll it, plain torch in one opaque op).
        recompute: whether backward makes the activated gates again instead of finding them saved. With the kernels
            in 16 bit and no projection it takes one GEMM over all steps, and a layer in training keeps 4 bytes a row
            and hidden unit beside its output instead of 12. Otherwise backward runs forward once more, to the same
            bits, and the layer keeps nothing instead of 20 bytes in float32. "auto" takes a backend that can: the
            kernels, or plain torch.

    Inputs and outputs:
        `lstm(input, hx=None) -> (output, (h_n, c_n))`. input is [T, B, I], [T, I] or a PackedSequence of either
        enforce_sorted; hx is a pair ([L*D, B, P], [L*D, B, H]) of any strides, zeros if left out; output is
        [T, B, D*P] in the form of the input; h_n and c_n have the shapes of hx.

    Raises:
        ValueError: a size or dropout is out of range, `backend` is unknown or cannot recompute, or an input has the
            wrong dtype or dimension count.
        RuntimeError: the sizes, dtypes or devices of a call disagree, or the backend cannot run here.

    Example:
        >>> import torch
        >>> from fastlstm import LSTM
        >>> lstm = LSTM(10, 20, num_layers=2)
        >>> output, (h_n, c_n) = lstm(torch.randn(5, 3, 10))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))
        >>> torch.nn.LSTM(10, 20, num_layers=2).load_state_dict(lstm.state_dict())
        <All keys matched successfully>
    """

    backend: str = "auto"
    recompute: bool = False
    # addresses of the weights, and of the one buffer they are in, when they were last laid out for cuDNN
    _flat_pointers: list[int] | None = None
    _flat_storage: int | None = None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
        *,
        backend: str = "auto",
        recompute: bool = False,
    ) -> None:
        dispatch.check_backend(backend)
        checks.check_recompute(recompute, backend)
        super().__init__(
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
        )
        self.backend = backend
        self.recompute = recompute

    def forward(
        self, input: Tensor | PackedSequence, hx: States | None = None
    ) -> tuple[Tensor | PackedSequence, States]:
        """Run the network; the class docstring says on what."""
        if isinstance(input, Proxy):
            return tracing.leaf(self, input, hx)
        return functional.forward(self, self.current_weights(), input, hx)

    def current_weights(self) -> list[Tensor]:
        """Return the weights as they are now, in torch's flat order."""
        parameters: dict[str, Any] = self._parameters
        try:
            return [parameters[name] for name in self._flat_weights_names]
        except KeyError:  # a weight that is computed, or a plain tensor
            return [getattr(self, name) for name in self._flat_weights_names]

    @property
    def _flat_weights(self) -> list[Tensor | None]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """`current_weights` for code that knows torch's own; None for a weight that is missing."""
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, weights: list[Tensor | None]) -> None:
        for name, weight in zip(self._flat_weights_names, weights, strict=True):
            if weight is not getattr(self, name, None):
                setattr(self, name, weight)

    # what RNNBase remembers of its weights: nothing here, or torch.utils.swap_tensors would refuse them
    _flat_weight_refs: Any = property(lambda self: [], lambda self, refs: None)

    def _update_flat_weights(self) -> None:
        """Do nothing: the weights are read afresh."""

    def flatten_parameters(self) -> None:
        """Do nothing: there is no flat buffer to keep, and never a warning about one."""

    def weights_for_cudnn(self, weights: list[Tensor]) -> list[Tensor]:
        """Return the weights as views of one buffer in cuDNN's layout, for stock's op on CUDA.

        Parameters that own their storage are moved into the buffer, once, as `nn.LSTM` does when it is made; they
        are moved again when their storage was replaced. Weights that are computed, tied or views of a buffer
        of somebody else (FSDP) stay where they are, and a copy is handed out.
        """
        pointers = [weight.data_ptr() for weight in weights]
        if pointers == self._flat_pointers:
            return weights
        tied = len(set(pointers)) < len(pointers)
        if tied or not all(self._may_move(weight) for weight in weights):
            return stock.flat_copies(self, weights)
        stock.flatten(self, weights)
        self._flat_pointers = [weight.data_ptr() for weight in weights]
        self._flat_storage = weights[0].untyped_storage().data_ptr()
        return weights

    def _may_move(self, weight: Tensor) -> bool:
        storage = weight.untyped_storage()
        owned = storage.data_ptr() == self._flat_storage or storage.nbytes() == weight.nbytes
        return owned and isinstance(weight, nn.Parameter)

    def get_expected_cell_size(self, input: Tensor, batch_sizes: Tensor | None) -> tuple[int, int, int]:
        """Return the size that c_0 must have for an input."""
        layers, batch, _ = self.get_expected_hidden_size(input, batch_sizes)
        return layers, batch, self.hidden_size

    def check_forward_args(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input: Tensor, hidden: States, batch_sizes: Tensor | None
    ) -> None:
        """Raise what `forward` raises for a batched input and states that do not fit."""
        checks.check_input(self, self.current_weights(), input, batch_sizes)
        _, batch, _ = self.get_expected_hidden_size(input, batch_sizes)
        checks.check_states(self, hidden, batch, input)

    def permute_hidden(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, hx: States, permutation: Tensor | None
    ) -> States:
        """Return hx with its rows in another order."""
        return functional.permute(hx, permutation)

    def extra_repr(self) -> str:
        """Return torch's own, and the backend where it is not "auto"."""
        backend = "" if self.backend == "auto" else f", backend={self.backend!r}"
        return super().extra_repr() + backend + (", recompute=True" if self.recompute else "")

    def __getstate__(self) -> dict[str, Any]:
        addresses = ("_flat_pointers", "_flat_storage")  # they mean nothing in a copy
        return {name: value for name, value in vars(self).items() if name not in addresses}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.pop("_flat_weights", None)  # the copies that an nn.LSTM pickled


class LSTMCell(nn.LSTMCell):
    """`torch.nn.LSTMCell` with a choice of backend.

    "auto" and "torch" call stock's op: in a single step there is nothing to gain. "reference" and "triton" run the
    same code as one step of `LSTM`.

    Args:
        input_size: features of the input, I.
        hidden_size: features of the hidden state, H.
        bias: whether the cell has biases.
        device: where the parameters live.
        dtype: of the parameters.
        backend: "auto", "reference", "triton" or "torch".

    Inputs and outputs:
        `cell(input, hx=None) -> (h_1, c_1)`. input is [B, I] or [I]; hx is a pair of [B, H] or [H], zeros if left
        out; h_1 and c_1 have its shapes.

    Example:
        >>> import torch
        >>> from fastlstm import LSTMCell
        >>> h, c = LSTMCell(10, 20)(torch.randn(3, 10))
        >>> h.shape
        torch.Size([3, 20])
    """

    backend: str = "auto"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        backend: str = "auto",
    ) -> None:
        dispatch.check_backend(backend)
        super().__init__(input_size, hidden_size, bias, device, dtype)
        self.backend = backend

    def forward(self, input: Tensor, hx: States | None = None) -> States:
        """Run one step; the class docstring says on what."""
        if isinstance(input, Proxy):
            return tracing.leaf(self, input, hx)
        if self.backend == "torch" or (self.backend == "auto" and dispatch.override() in ("auto", "torch")):
            return self._run_stock(input, hx)
        if not input.is_cpu or (low := autocast.dtype_for(input)) is None:
            return self._run_own(input, hx)
        if hx is not None:
            checks.check_pair(hx, "lstm_cell")
        # on a CPU autocast lowers the GEMMs of stock's cell only, so that its states are not rounded in every step
        dtype = torch.promote_types(low, (input if hx is None else hx[1]).dtype)
        own = self.weight_ih.dtype
        with autocast.off(input.device):
            h, c = self._run_own(input.to(own), None if hx is None else (hx[0].to(own), hx[1].to(own)))
        return h.to(dtype), c.to(dtype)

    def _run_own(self, input: Tensor, hx: States | None) -> States:
        """Run a layer of one step."""
        _, (h, c) = functional.forward(*_one_step(self, input, hx, self.backend))
        h, c = h.squeeze(0), c.squeeze(0)
        return (h, c) if input.dim() == 2 else (h.squeeze(0), c.squeeze(0))

    def _run_stock(self, input: Tensor, hx: States | None) -> States:
        """Do what `super().forward` does, without a slow `Module.__getattr__` a weight, 5 % of a small step."""
        parameters: dict[str, Any] = self._parameters
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        states = () if hx is None else hx
        plain = all(name in parameters for name in names)  # none is computed
        if not plain or input.dim() != 2 or any(state.dim() != 2 for state in states):
            return super().forward(input, hx)
        if hx is None:
            zeros = input.new_zeros(input.size(0), self.hidden_size)
            hx = (zeros, zeros)
        return stock.lstm_cell(input, hx, *(parameters[name] for name in names))

    def extra_repr(self) -> str:
        """Return torch's own, and the backend where it is not "auto"."""
        backend = "" if self.backend == "auto" else f", backend={self.backend!r}"
        return super().extra_repr() + backend


def explain(module: LSTM | LSTMCell, input: Tensor | PackedSequence, hx: States | None = None) -> Decision:
    """Say which backend and regime would run `module(input, hx)` here and now, and why.

    The call itself is not run. On a GPU its candidates may be timed, as on a first call.

    Args:
        module: a `fastlstm.LSTM` or `fastlstm.LSTMCell`.
        input: as for a call of `module`.
        hx: as for a call of `module`.

    Returns:
        A Decision; `str()` of it is one readable paragraph.

    Raises:
        TypeError: `module` is of another type.
        ValueError, RuntimeError: those of the call itself.

    Example:
        >>> import torch, fastlstm
        >>> decision = fastlstm.explain(fastlstm.LSTM(3, 4, backend="reference"), torch.randn(5, 2, 3))
        >>> decision.backend, decision.regime
        ('reference', 'loop')
    """
    if isinstance(module, LSTM):
        return functional.prepare(module, module.current_weights(), input, hx)[-1]
    if not isinstance(module, LSTMCell):
        raise TypeError(f"module must be a fastlstm.LSTM or fastlstm.LSTMCell, got {type(module).__name__}")
    if module.backend != "auto" or dispatch.override() != "auto":
        return functional.prepare(*_one_step(module, input, hx, module.backend))[-1]
    decision = functional.prepare(*_one_step(module, input, hx, "torch"))[-1]
    return replace(decision, reason="Stock's own op runs: in a single step there is nothing to gain.")


def _one_step(
    cell: LSTMCell, input: Any, hx: States | None, backend: str
) -> tuple[functional.Stateless, list[Tensor], Tensor, Any]:
    """Return the arguments of `functional.forward` that run a cell as one layer and one step."""
    if hx is not None:
        checks.check_pair(hx, "lstm_cell")
    for name, value in (("input", input), *((f"hx[{index}]", state) for index, state in enumerate(hx or ()))):
        if value.dim() not in (1, 2):
            raise ValueError(f"LSTMCell: Expected {name} to be 1D or 2D, got {value.dim()}D instead")
    batched = input.dim() == 2
    rows = input if batched else input.unsqueeze(0)
    states: Any = [state if batched else state.unsqueeze(0) for state in hx or ()]
    checks.check_cell(cell, rows, states)
    weights = [w for w in (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh) if w is not None]
    if not torch._C._is_any_autocast_enabled():
        checks.check_alike(rows, states, weights)
    sizes = (cell.input_size, cell.hidden_size, 0, 1)
    network = functional.Stateless(*sizes, cell.bias, False, 0.0, False, cell.training, backend)
    return network, weights, rows.unsqueeze(0), None if hx is None else tuple(s.unsqueeze(0) for s in states)
