"""Every example runs in smoke mode and ends with a metric beside its baselines and a plot; the comparison is fair."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastlstm
from examples import common

ROOT = Path(__file__).resolve().parent.parent
# distributed.py is started by torch's launcher, in test_distributed.py
EXAMPLES = sorted({path.stem for path in (ROOT / "examples").glob("*.py")} - {"common", "distributed"})
# what an example needs beside the extra bench
PACKAGES = {
    "gestures": ("aeon", "sklearn"),
    "music": ("music21",),
    "sentiment": ("vaderSentiment", "sklearn"),
    "streaming": ("aeon",),
    "translation": ("pycountry",),
    "weather": ("vega_datasets",),
}
# those that beat a baseline in the few steps of smoke mode
QUICK = {"streaming": "no change"}


class Reader(torch.nn.Module):
    """An LSTM and a head."""

    def __init__(self, make_lstm: type[torch.nn.LSTM | fastlstm.LSTM]):
        super().__init__()
        self.lstm = make_lstm(3, 4, num_layers=2, bidirectional=True, batch_first=True)
        self.head = torch.nn.Linear(8, 1)


@pytest.mark.parametrize("name", EXAMPLES)
def test_smoke(name, tmp_path):
    for package in PACKAGES.get(name, ()):
        pytest.importorskip(package)
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), "--smoke", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr

    results = re.findall(r"^result: .+ \((higher|lower) is better\): (.+)$", done.stdout, re.MULTILINE)
    assert results, done.stdout
    for better, figures in results:
        values = {label: float(value) for label, value in re.findall(r"([^,]+?) (-?[\d.]+|nan|inf)(?:, |$)", figures)}
        assert len(values) >= 2, figures
        assert all(map(math.isfinite, values.values())), figures
        if name in QUICK:
            difference = values["LSTM"] - values[QUICK[name]]
            assert difference > 0 if better == "higher" else difference < 0, figures
    assert re.search(r"^explain\(\w+\): \w+ \(\w+\) on ", done.stdout, re.MULTILINE), done.stdout
    assert re.search(r"^time: .+ with torch.nn.LSTM, .+ with fastlstm: .+x", done.stdout, re.MULTILINE), done.stdout
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", EXAMPLES)
def test_gallery(name):
    picture = ROOT / "examples" / "pictures" / f"{name}.png"
    assert picture.stat().st_size < 60_000
    readme = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert f"pictures/{name}.png" in readme
    assert f"{name}.py" in readme


@pytest.mark.parametrize("make_lstm", [torch.nn.LSTM, fastlstm.LSTM])
def test_stock_and_fastlstm_are_compared_on_one_model(make_lstm, capsys):
    model = Reader(make_lstm)
    x = torch.randn(2, 5, 3)
    seen: dict[type, set[float]] = {}

    def loss(each: Reader) -> torch.Tensor:
        value = each.head(each.lstm(x)[0]).sum()
        seen.setdefault(type(each.lstm), set()).add(round(value.item(), 4))
        return value

    common.explain_and_compare(model, loss, rounds=2)
    assert set(seen) == {torch.nn.LSTM, fastlstm.LSTM}
    assert seen[torch.nn.LSTM] == seen[fastlstm.LSTM] == {round(loss(model).item(), 4)}
    assert type(model.lstm) is make_lstm
    assert all(parameter.grad is None for parameter in model.parameters())
    assert "explain(lstm): torch (stock)" in capsys.readouterr().out


def test_fit_learns():
    model = torch.nn.Linear(1, 1)
    x = torch.linspace(-1, 1, 8).unsqueeze(1)
    losses = common.fit(model, lambda: torch.nn.functional.mse_loss(model(x), 3 * x), 100, learning_rate=0.2)
    assert len(losses) == 100
    assert losses[-1] < 0.01 * losses[0]
