"""Adapters: other people's LSTMs behind nn.LSTM's parameters and call, so that all are checked and timed alike.

Each takes nn.LSTM's arguments, runs one layer forward in time on a dense [T, B, I] tensor from a zero state, and
imports its package when it is built.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import RNNBase, functional

from fastlstm.problem import allows_tf32

State = tuple[Tensor, Tensor]

TORCHRL = "torchrl.modules.tensordict_module._rnn_triton"


class _OneLayer(RNNBase):
    """nn.LSTM's parameters; names the four of the first layer."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__("LSTM", *args, **kwargs)

    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """weight_ih, weight_hh, bias_ih, bias_hh."""
        return self.weight_ih_l0, self.weight_hh_l0, self.bias_ih_l0, self.bias_hh_l0  # pyright: ignore[reportReturnType]


class InputProduct(_OneLayer):
    """Only what comes before the recurrence: x W_ih^T + b for all steps, one GEMM, and its gradients.

    Not an LSTM: the yardstick by which columns with and without this product are compared.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.get_parameter("weight_hh_l0").requires_grad_(False)

    def forward(self, x: Tensor, hx: None = None) -> tuple[Tensor, None]:  # type: ignore[override]
        """Return gates_x [T, B, 4H]."""
        w_ih, _, b_ih, b_hh = self.weights()
        return functional.linear(x, w_ih, b_ih + b_hh), None


class FlashRNN(_OneLayer):
    """`flashrnn.flashrnn`, a CUDA kernel that holds the recurrent matrix on the chip.

    FlashRNN starts from gates_x; the input product is done here, as its users do it, and is in the time. One head:
    several are a block-diagonal recurrent matrix, which is no nn.LSTM.
    """

    backend = "cuda_fused"

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.package = importlib.import_module("flashrnn")

    def forward(self, x: Tensor, hx: None = None) -> tuple[Tensor, State]:  # type: ignore[override]
        """Run the layer."""
        w_ih, w_hh, b_ih, b_hh = self.weights()
        H = self.hidden_size
        dtype = str(x.dtype).removeprefix("torch.")
        gates_x = functional.linear(x, w_ih).unflatten(2, (4, 1, H))
        config = self.package.FlashRNNConfig(
            backend=self.backend,
            dtype=dtype,
            num_heads=1,
            head_dim=H,
            batch_size=x.shape[1],
            input_shape="TBGHD",
            output_shape="STBHD",
        )
        bias = (b_ih + b_hh).view(4, 1, H)
        states, last = self.package.flashrnn(gates_x, w_hh.view(4, 1, H, H), bias, config=config)
        # states [2, T, B, 1, H], last [2, 1, B, 1, H]: h, then c
        return states[0].squeeze(2), (last[0].squeeze(2), last[1].squeeze(2))


class TorchRL(_OneLayer):
    """The kernel of torchrl's `LSTMModule(recurrent_backend="triton")`, without the TensorDict around it.

    It wants [B, T, I] and a state to reset to for every step; those zeros are made once and not timed. In 16 bit its
    operands are rounded and everything else stays float32, as its `compute_dtype` does.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.kernel = importlib.import_module(TORCHRL).lstm_triton
        self.resets: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor, hx: None = None) -> tuple[Tensor, State]:  # type: ignore[override]
        """Run the layer."""
        T, B, _ = x.shape
        if self.resets is None or self.resets[1].shape != (B, T):
            zeros = torch.zeros(B, T, self.hidden_size, device=x.device)
            self.resets = zeros, torch.zeros(B, T, dtype=torch.bool, device=x.device)
        zeros, is_init = self.resets
        weights = (weight.float() for weight in self.weights())
        rows = x.transpose(0, 1).float()
        # its default is IEEE float32; stock's cuDNN and ours follow torch's setting for RNNs
        precision = "fast" if allows_tf32() else "ieee"
        h, _, h_n, c_n = self.kernel(
            rows, zeros, zeros, *weights, is_init, compute_dtype=x.dtype, input_precision=precision
        )
        state = h_n.to(x.dtype).unsqueeze(0), c_n.to(x.dtype).unsqueeze(0)
        return h.transpose(0, 1).to(x.dtype), state


class Haste(_OneLayer):
    """`haste_pytorch.LSTM`: cuBLAS and one fused CUDA kernel a step, float32 on a GPU.

    Its layout is i, g, f, o and transposed; the weights are reordered in every call, which is in the time.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        package = importlib.import_module("haste_pytorch")
        # outside the module tree, so that the parameters are nn.LSTM's alone
        self.__dict__["layer"] = package.LSTM(self.input_size, self.hidden_size)

    def forward(self, x: Tensor, hx: None = None) -> tuple[Tensor, State]:  # type: ignore[override]
        """Run the layer."""
        w_ih, w_hh, b_ih, b_hh = self.weights()
        layout = {"kernel": w_ih, "recurrent_kernel": w_hh, "bias": b_ih + b_hh}
        layout = {name: _igfo(weight).t() if weight.dim() == 2 else _igfo(weight) for name, weight in layout.items()}
        layer: nn.Module = self.__dict__["layer"].train(torch.is_grad_enabled())
        return torch.func.functional_call(layer, layout, (x,))


def _igfo(weight: Tensor) -> Tensor:
    i, f, g, o = weight.chunk(4)
    return torch.cat((i, g, f, o))
