"""What dispatch is asked about: a problem (sizes, dtype, flags) and a device (its limits)."""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """An LSTM call as dispatch sees it: sizes, dtype and what is asked of it.

    Attributes:
        T: time steps (the longest row, for a packed batch).
        B: rows of the batch.
        I: input_size of the first layer.
        H: hidden_size.
        P: proj_size, 0 without projection.
        L: num_layers.
        D: directions, 1 or 2.
        dtype: dtype of the input.
        training: whether a backward pass will follow (some input requires grad and grad mode is on).
        runs: 0 for a dense batch; for a packed one the number of runs of steps with equal batch size.
        tf32: whether float32 dots on a GPU may round their operands to TF32.
        apart: whether its layers must run one after the other: there is dropout between them, or gates to recompute.
    """

    T: int
    B: int
    I: int  # noqa: E741
    H: int
    P: int = 0
    L: int = 1
    D: int = 1
    dtype: torch.dtype = torch.float32
    training: bool = False
    runs: int = 0
    tf32: bool = True
    apart: bool = False

    @property
    def stack(self) -> bool:
        """Whether its layers can run together, each a few steps behind the one below it."""
        return self.L > 1 and self.D == 1 and not self.P and not self.apart


@dataclass(frozen=True)
class Device:
    """A device's limits, as far as a plan depends on them.

    Attributes:
        kind: "cpu", "cuda", "hip", or torch's own name of any other device type ("mps", "meta", ...).
        target: the compile target: "sm_90", "gfx942", ...; of a CPU "avx2" where torch uses AVX2 and no more, else
            "intel" of that maker, where MKL is at its best, "amx" where it also multiplies bfloat16 in tiles, or "cpu";
            of any other device the kind.
        name: as the vendor names it.
        processors: multiprocessors (of a MIG or MPS share: those it was given); of a CPU the threads that torch uses.
    """

    kind: str
    target: str
    name: str = ""
    processors: int = 0


def allows_tf32() -> bool:
    """Whether torch lets cuDNN's RNNs, and so our kernels, round float32 operands to TF32, as it does by default."""
    # as torch.backends.cudnn.rnn.fp32_precision, in a tenth of its time, which a short call on a GPU has not to spare
    return torch._C._get_fp32_precision_getter("cuda", "rnn") == "tf32"


def device_of(device: torch.device | Tensor) -> Device:
    """Return the limits of a torch device, or of that of a tensor; a GPU's are asked of its driver once.

    Example:
        >>> device_of(torch.device("cpu")).kind
        'cpu'
    """
    if isinstance(device, Tensor):
        if device.is_cpu:  # sooner asked than its device: 1 % of the smallest training step
            return _cpu(torch.get_num_threads())
        device = device.device
    if device.type == "cpu":
        return _cpu(torch.get_num_threads())
    if device.type != "cuda":
        return Device(device.type, device.type)
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _gpus:
        _gpus[index] = _gpu(index)
    return _gpus[index]


def capturing(device: torch.device) -> bool:
    """Whether what runs now on a device is being captured in a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def limit_processors(device: torch.device, most: int) -> None:
    """Have `device_of` tell of so many processors at most from now on, since the driver refused a grid of more.

    A process that got a share of a card is not always told how large it is; some cards refuse any such grid (0). The
    first limit of a card is a warning.
    """
    found = device_of(device)
    limited = dataclasses.replace(found, processors=most)
    _gpus.update({index: limited for index, gpu in _gpus.items() if gpu == found})
    first = found not in _limited
    _limited.add(limited)
    if first:
        if most:
            refused = f"cannot hold {most + 1} programs at once: this process may have a share of it only"
        else:
            refused = "refuses programs that meet"
        warnings.warn(
            f"{found.name} has {found.processors} processors and {refused}. From now on LSTMs are laid out in fewer "
            "programs, or in a launch a step, which is slower.",
            stacklevel=2,
        )


_gpus: dict[int, Device] = {}
_limited: set[Device] = set()


def cpu_capability() -> str:
    """Return what torch's own kernels use of this machine's processor, and whether it has AMX: "AVX512, AMX"."""
    return torch.backends.cpu.get_cpu_capability() + ", AMX" * torch.cpu._is_amx_tile_supported()


@functools.cache
def _cpu(threads: int) -> Device:
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        target = "avx2"
    elif not torch.backends.mkl.is_available() or "GenuineIntel" not in _cpu_names():
        target = "cpu"
    else:
        target = "amx" if torch.cpu._is_amx_tile_supported() else "intel"
    return Device("cpu", target, "CPU", threads)


def _cpu_names() -> str:
    """Return a text in which the maker of this machine's processor stands."""
    if sys.platform == "win32":
        return os.environ.get("PROCESSOR_IDENTIFIER", "")
    try:
        with open("/proc/cpuinfo") as file:
            return file.read(1024)
    except OSError:
        return ""


def _gpu(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    processors = properties.multi_processor_count  # under MIG that of the instance
    if torch.version.hip:
        # "gfx942:sramecc+:xnack-": the features after the colon do not change a plan
        return Device("hip", properties.gcnArchName.split(":")[0], properties.name, processors)
    return Device(
        "cuda", f"sm_{properties.major}{properties.minor}", properties.name, int(processors * _share_under_mps())
    )


def _share_under_mps() -> float:
    """Return the share of its processors that CUDA's multi-process service lets this process use."""
    try:
        percentage = float(os.environ.get("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "100"))
    except ValueError:
        return 1.0
    return min(max(percentage / 100, 0.0), 1.0)
