"""What "auto" takes on a CPU that need not be there."""

from __future__ import annotations

import torch

from fastlstm.dispatch import decide
from fastlstm.problem import Device, Problem

BF16 = {"dtype": torch.bfloat16}
FP16 = {"dtype": torch.float16}
PACKED = Problem(T=100, B=16, I=64, H=128, runs=14, training=True)


def decide_with(target, changes, threads=1):
    return decide(Problem(**{**vars(PACKED), **changes}), Device("cpu", target, processors=threads)).backend
