"""`convert`: make the LSTMs of a model that exists ours, in place.

A module is converted by giving it another class, as `torch.nn.utils.parametrize` does: it stays the same object, with
the same Parameters, hooks, train flag and attributes, and whoever holds a reference to it (a parent, an optimizer, a
second parent that shares it) holds the converted one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn
from torch.nn.utils import parametrize

from fastlstm import module as ours

# bound here, because users may rebind torch.nn.LSTM to our own class
_STOCK = {nn.LSTM: ours.LSTM, nn.LSTMCell: ours.LSTMCell}


@dataclass(frozen=True)
class Report:
    """What `convert` did. `str()` lists it, one module a line.

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
    may itself be an LSTM. Subclasses of torch's classes are left alone, since what they change is not known here.

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
    ours.check_backend(backend)
    report = Report()
    converted = set()
    # the list is complete before anything changes, and a shared module is in it under each of its names
    for name, module in list(model.named_modules(remove_duplicate=False)):
        original = parametrize.type_before_parametrizations(module)
        if original in _STOCK and "forward" not in vars(module):
            _change_class(module, _STOCK[original])
            vars(module)["backend"] = backend
            converted.add(module)
        if module in converted:
            report.replaced[name] = f"fastlstm.{original.__name__}({module.extra_repr()})"
        elif isinstance(module, ours.LSTM | ours.LSTMCell):
            report.skipped[name] = f"already a fastlstm.{original.__name__}, backend={module.backend!r}"
        elif original in _STOCK:
            report.skipped[name] = "its forward was replaced on the instance"
        elif isinstance(module, tuple(_STOCK)):
            report.skipped[name] = f"{original.__qualname__} is a subclass, and may change what is computed"
    return report


def _change_class(module: nn.Module, target: type[nn.Module]) -> None:
    current = type(module)
    if parametrize.is_parametrized(module):
        # torch made a class for this very module, with a property for each parametrized tensor: make it anew
        body = {key: value for key, value in vars(current).items() if key not in ("__dict__", "__weakref__")}
        target = type(current.__name__, (target,), body)
    module.__class__ = target
    vars(module).pop("_flat_weights", None)  # nn.LSTM's list of its weights; ours is computed
