"""For the tests of the benchmark: a wrong LSTM, and a result as a run would write it."""

from __future__ import annotations

from torch.nn.utils.rnn import PackedSequence

import fastlstm
from benchmarks import results
from benchmarks.peers import EAGER, OURS, STOCK


class Scaled(fastlstm.LSTM):
    """Off by a factor."""

    factor = 1.01

    def forward(self, input, hx=None):
        output, state = super().forward(input, hx)
        if isinstance(output, PackedSequence):
            return output._replace(data=output.data * self.factor), state
        return output * self.factor, state


def make_column(ratio: float | None) -> results.Column:
    """A column that took 12 ms / ratio, or a refused one."""
    if ratio is None:
        return results.untimed("wrong result: x")
    ms = 12.0 / ratio
    return {
        **results.untimed("ok", 1e-7),
        "rounds": 9,
        "calls": 1,
        "ms": {"median": ms, "p20": ms, "p80": ms},
        "ratio": {"median": ratio, "p20": ratio * 0.95, "p80": ratio * 1.05},
        "samples": [ms] * 9,
        "peak_bytes": int(1e6 / ratio),
    }


def make_row(kind: str, training: bool, ratio: float | None) -> results.Row:
    """A workload of shape b on which fastlstm's ratio to stock is `ratio`."""
    return {
        "name": f"b/{kind}/fp32/{'train' if training else 'forward'}",
        "suite": "default",
        "shape": {"T": 100, "B": 16, "I": 64, "H": 128},
        "kind": kind,
        "dtype": "fp32",
        "training": training,
        "budget_s": 2.0,
        "flops": 1e9,
        "weight_bytes": 10**6,
        "route": "torch stock",
        "columns": {STOCK: make_column(1.0), OURS: make_column(ratio), EAGER: make_column(0.5)},
    }


def make_result() -> results.Result:
    """A result as a run would write it, with a winner, a loser and a refusal."""
    return {
        "schema": results.SCHEMA,
        "command": "python -m benchmarks",
        "date": "2026-01-02T03:04:05+00:00",
        "commit": "0123456789abcdef",
        "dirty": False,
        "source": "5eed",
        "machine": {
            "cpu": "a processor",
            "capability": "AVX2",
            "cores": 2,
            "gpu": None,
            "os": "an os",
            "load_1min": 0.1,
        },
        "versions": {"python": "3.11", "torch": "2.13.0", "triton": None, "cuda": None, "cudnn": None},
        "settings": {"threads": 1, "memory": results.RESIDENT},
        "probe": {"fp32": 100.0, "bandwidth GB/s": 20.0},
        "columns": {STOCK: "stock", OURS: "ours", EAGER: "<a loop>"},
        "absent": {"haste": "haste_pytorch is not installed"},
        "rows": [make_row("packed", False, 0.8), make_row("packed", True, 3.0), make_row("dense", True, None)],
        "jobs": [],
    }
