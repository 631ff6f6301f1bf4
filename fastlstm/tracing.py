"""Who looks on when a layer runs: compilers, tracers, modes, torch.func; and what they should see."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_PLAIN = (Tensor, nn.Parameter)
_functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]


def watched(*tensors: Tensor) -> bool:
    """Whether somebody looks on who should see one op, not what it does.

    That is a compiler, a tracer, any mode of dispatch, or a tensor with a way of its own.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    return torch._C._len_torch_dispatch_stack() > 0 or not all(type(t) in _PLAIN for t in tensors)


def transformed() -> bool:
    """Whether torch.func or forward-mode AD is at work: they see into plain ops only, and past ours to a wrong result.

    torch.compile has transforms of its own, and never asks.
    """
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or _functorch.peek_interpreter_stack() is not None


def need_plain_ops(cotangents: Sequence[Tensor | None]) -> bool:
    """Whether cotangents stand for several each (vmap, `is_grads_batched`) or may have tangents.

    As in a forward pass (`transformed`), that is followed into plain ops only.
    """
    interpreter = _functorch.peek_interpreter_stack()
    if interpreter is not None:  # in torch.func's own jvp autograd makes no graph of what runs here
        return interpreter.key() == _functorch.TransformType.Vmap
    legacy = any(t is not None and _functorch.is_legacy_batchedtensor(t) for t in cotangents)
    return legacy or forward_ad._current_level >= 0
