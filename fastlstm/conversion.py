"""`convert`: make the LSTMs of a model that exists ours, in place; `revert`: make them torch's again.

A module is converted by giving it another class, as `torch.nn.utils.parametrize` does: it stays the same object, with
the same Parameters, hooks, train flag and attributes, and whoever holds a reference to it (a parent, an optimizer, a
second parent that shares it) holds the converted one.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from fastlstm import module as ours
from fastlstm.dispatch import check_backend

# bound here, because users may rebind torch.nn.LSTM to our own class
_STOCK = {nn.LSTM: ours.LSTM, nn.LSTMCell: ours.LSTMCell}
_OURS = {target: stock for stock, target in _STOCK.items()}

# what nn.LSTM.forward calls on itself and ours does not, and names that ours adds
_STEPS = ("check_input", "check_hidden_size", "check_forward_args", "get_expected_hidden_size", "permute_hidden")
_ADDED = ("backend", "recompute", "current_weights", "weights_for_cudnn")


@dataclass(frozen=True)
class Report:
    """What `convert` or `revert` did. `str()` lists it, one module a line.

    Attributes:
        replaced: qualified name ("" is the model itself) -> what it is now. A module that is shared
            has one entry for each of its names.
        skipped: qualified name -> why an LSTM was left as it was.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"fastlstm: {len(self.replaced)} replaced, {len(self.skipped)} skipped"]
        lines += [f"  {name or '(the model itself)'}: {now}" for name, now in self.replaced.items()]
        lines += [f"  {name or '(the model itself)'}: skipped, {why}" for name, why in self.skipped.items()]
        return "\n".join(lines)


def convert(model: nn.Module, backend: str = "auto") -> Report:
    """Turn every `nn.LSTM` and `nn.LSTMCell` in a model into `fastlstm.LSTM` and `fastlstm.LSTMCell`, in place.

    Modules keep their identity, and with it Parameters, hooks, buffers, parametrizations and train flag; `model`
    may itself be an LSTM. An instance of a subclass of torch's classes keeps every method of its own, and what it
    calls by `super()` is ours; since it is still an `nn.LSTM`, torch.compile still refuses to look into it.

    Args:
        model: any module.
        backend: the backend of the converted modules: "auto", "reference", "triton" or "torch".

    Returns:
        A Report of what was replaced and what was skipped, and why.

    Raises:
        ValueError: `backend` is unknown.

    Example:
        >>> import torch, fastlstm
        >>> model = torch.nn.ModuleDict({"encoder": torch.nn.LSTM(3, 4), "head": torch.nn.Linear(4, 1)})
        >>> print(fastlstm.convert(model))
        fastlstm: 1 replaced, 0 skipped
          encoder: fastlstm.LSTM(3, 4)
    """
    check_backend(backend)
    report = Report()
    converted = set()
    # the list is complete before anything changes, and a shared module is in it under each of its names
    for name, module in list(model.named_modules(remove_duplicate=False)):
        original = parametrize.type_before_parametrizations(module)
        if id(module) not in converted:
            obstacle = _obstacle(module, original)
            if obstacle:
                report.skipped[name] = obstacle
            if obstacle != "":
                continue
            _change_class(module, _STOCK.get(original) or _converted_subclass(original))
            for cached in ("_flat_weights", "_flat_weight_refs"):  # what nn.LSTM remembers of its weights
                vars(module).pop(cached, None)
            vars(module)["backend"] = backend
            converted.add(id(module))
        report.replaced[name] = _describe(module)
    return report


def revert(model: nn.Module) -> Report:
    """Turn every `fastlstm.LSTM` and `fastlstm.LSTMCell` in a model into what torch has, in place.

    For what knows torch's own classes only: `torch.jit.script`, `torch.ao.quantization.quantize_dynamic`, a model
    that is pickled whole for a machine without fastlstm. State_dicts are the same either way.

    Args:
        model: any module.

    Returns:
        A Report of what was replaced and what was skipped, and why.

    Example:
        >>> import torch, fastlstm
        >>> model = torch.nn.Sequential(fastlstm.LSTM(3, 4))
        >>> print(fastlstm.revert(model))
        fastlstm: 1 replaced, 0 skipped
          0: torch.nn.LSTM(3, 4)
        >>> type(model[0]) is torch.nn.LSTM
        True
    """
    report = Report()
    reverted = set()
    for name, module in list(model.named_modules(remove_duplicate=False)):
        current = parametrize.type_before_parametrizations(module)
        original = getattr(current, "_converted_from", None) or _OURS.get(current)
        if original is not None:
            _change_class(module, original)
            for attribute in ("backend", "recompute", "_flat_pointers", "_flat_storage"):
                vars(module).pop(attribute, None)
            if isinstance(module, nn.RNNBase):
                module._init_flat_weights()
                module.flatten_parameters()
            reverted.add(id(module))
        elif isinstance(module, ours.LSTM | ours.LSTMCell):
            report.skipped[name] = f"{current.__qualname__} is a subclass of fastlstm's, and torch has none like it"
        if id(module) in reverted:
            stock = parametrize.type_before_parametrizations(module)
            prefix = "torch.nn." if stock in _STOCK else ""
            report.replaced[name] = f"{prefix}{stock.__name__}({module.extra_repr()})"
    return report


def _obstacle(module: nn.Module, original: type[nn.Module]) -> str | None:
    """Return why an LSTM cannot be converted, "" if it can, or None for any other module."""
    kind = getattr(module, "original_name", original.__name__)  # the class that TorchScript compiled
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled by TorchScript: convert before that" if kind in ("LSTM", "LSTMCell") else None
    if original.__module__.startswith("torch.ao.nn.quantized") and kind in ("LSTM", "LSTMCell"):
        return "it is quantized: its weights are packed for other kernels"
    if isinstance(module, ours.LSTM | ours.LSTMCell):
        return f"already a {_describe(module)}" if original in _OURS else f"already on fastlstm: {_describe(module)}"
    stock = next((stock for stock in _STOCK if isinstance(module, stock)), None)
    if stock is None:
        return None
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    for name in _STEPS:
        if getattr(original, name, None) is not getattr(stock, name, None):
            return f"{original.__qualname__} overrides {name}, which fastlstm does not call"
    for name in _ADDED:
        if hasattr(_STOCK[stock], name) and hasattr(module, name):
            return f"{original.__qualname__} has an attribute {name}, which fastlstm would add"
    return ""


def _describe(module: Any) -> str:
    original = parametrize.type_before_parametrizations(module)
    text = f"{original.__name__}({module.extra_repr()})"
    return f"fastlstm.{text}" if original in _OURS else f"{text}, its super() is fastlstm's"


class _Beneath(ours.LSTM, nn.LSTM):  # pyright: ignore[reportIncompatibleMethodOverride]
    """fastlstm.LSTM, found before nn.LSTM where methods are looked up: what a subclass of nn.LSTM is put upon."""


@functools.cache
def _converted_subclass(original: type[Any]) -> type[Any]:
    """Return the class of converted instances of `original`: its methods, and ours where they call `super()`."""

    def reduce_ex(self: Any, protocol: Any) -> tuple:
        _, _, *state = object.__reduce_ex__(self, 2)
        return (_blank, (original,), *state)

    base = _Beneath if issubclass(original, nn.RNNBase) else ours.LSTMCell
    body = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__reduce_ex__": reduce_ex,
        "_converted_from": original,
    }
    metaclass: Any = type(original)
    return metaclass(original.__name__, (original, base), body)


def _blank(original: type[Any]) -> Any:
    """Return an instance without attributes, for pickle and copy, which cannot find such a class by its name."""
    converted: Any = _converted_subclass(original)
    return converted.__new__(converted)


def _change_class(module: nn.Module, target: type[nn.Module]) -> None:
    current = type(module)
    if parametrize.is_parametrized(module):
        # torch made a class for this very module, with a property for each parametrized tensor: make it anew
        body = {key: value for key, value in vars(current).items() if key not in ("__dict__", "__weakref__")}
        target = type(current.__name__, (target,), body)
    module.__class__ = target
