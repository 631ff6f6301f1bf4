"""Who looks on when a layer runs: compilers, tracers, modes, torch.func; and what they should see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx import Proxy

_PLAIN = (Tensor, nn.Parameter)
_functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]


def leaf(module: nn.Module, input: Proxy, hx: Any) -> Any:
    """Return the node of a call that torch.fx traces symbolically: as torch's own, ours is one, and not looked into."""
    arguments = (input,) if hx is None else (input, hx)
    tracer: Any = input.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), arguments, {})


def watched(*tensors: Tensor) -> bool:
    """Whether somebody looks on who should see one op, not what it does.

    That is a compiler, a tracer, any mode of dispatch, or a tensor with a way of its own.
    """
    if torch.compiler.is_compiling() or recorded():
        return True
    return torch._C._len_torch_dispatch_stack() > 0 or not all(type(t) in _PLAIN for t in tensors)


def recorded() -> bool:
    """Whether torch.jit.trace records what runs, to run it again with other sizes; torch.compile never asks."""
    return torch._C._get_tracing_state() is not None


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
