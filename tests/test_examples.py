"""Every example runs in smoke mode and ends with a metric beside its baselines and a plot; what they share is right."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import random
import re
import runpy
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import FRESH

import fastlstm
from examples import common, ngrams

ROOT = Path(__file__).resolve().parent.parent
SHARED = {"common", "ngrams", "plots"}
# distributed.py is started by torch's launcher, in test_distributed.py
EXAMPLES = sorted({path.stem for path in (ROOT / "examples").glob("*.py")} - SHARED - {"distributed"})
VALIDATED = ("gestures", "music", "weather")  # settings that were chosen on a part of the training data
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


Scores = dict[str, float]


def run(folder: Path, name: str, *flags: str) -> tuple[str, Path]:
    """Run an example in smoke mode, in a process of its own; return what it printed, and where its plot is."""
    (folder / "printed").touch()  # the process may die before it opens it
    process: Any = multiprocessing.get_context(FRESH).Process(target=run_here, args=(folder, name, *flags))
    process.start()
    process.join(timeout=300)
    process.kill()
    process.join()
    printed = (folder / "printed").read_text()
    assert process.exitcode == 0, printed
    return printed, folder / f"{name}.png"


def run_here(folder: Path, name: str, *flags: str) -> None:
    """Run an example as `python` would."""
    os.environ["TRITON_INTERPRET"] = "0"
    torch.set_num_threads(1)
    os.chdir(folder)
    script = ROOT / "examples" / f"{name}.py"
    sys.path[:0] = [str(script.parent), str(ROOT)]
    sys.argv = [str(script), "--smoke", *flags, "--out", str(folder)]
    with open("printed", "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        runpy.run_path(str(script), run_name="__main__")


def results(printed: str) -> list[tuple[str, Scores]]:
    """What is better, and the scores, of each result in an example's output."""
    found = re.findall(r"^result: .+ \((higher|lower) is better\): (.+)$", printed, re.MULTILINE)
    scores = re.compile(r"([^,]+?) (-?[\d.]+|nan|inf)(?:, |$)")
    return [(better, {label: float(value) for label, value in scores.findall(line)}) for better, line in found]


@pytest.mark.parametrize("name", EXAMPLES)
def test_smoke(name, tmp_path):
    for package in PACKAGES.get(name, ()):
        pytest.importorskip(package)
    printed, plot = run(tmp_path, name)
    assert results(printed), printed
    for better, scores in results(printed):
        assert len(scores) >= 2, printed
        assert all(map(math.isfinite, scores.values())), printed
        if name in QUICK:
            difference = scores["LSTM"] - scores[QUICK[name]]
            assert difference > 0 if better == "higher" else difference < 0, printed
    assert re.search(r"^explain\(\w+\): \w+ \(\w+\) on ", printed, re.MULTILINE), printed
    assert re.search(r"^time: .+ with torch.nn.LSTM, .+ with fastlstm: .+x", printed, re.MULTILINE), printed
    assert plot.read_bytes().startswith(b"\x89PNG")
    if name in VALIDATED:  # no baseline of these has the same scores on other data, and none depends on the LSTM
        validated = results(run(tmp_path, name, "--validate")[0])
        assert len(validated) == len(results(printed))
        for (_, scores), (_, others) in zip(results(printed), validated, strict=True):
            assert scores.keys() == others.keys()
            assert {**scores, "LSTM": 0} != {**others, "LSTM": 0}


def test_validation_leaves_the_test_alone():
    parts = []
    for validate in (False, True):
        random.seed(7)
        parts.append(common.split(range(40), 1 / 4, validate=validate))
    (seen, test), (rest, validation) = parts
    assert sorted(seen + test) == list(range(40))
    assert len(test) == 10
    assert sorted(rest + validation) == sorted(seen)
    assert len(validation) == round(30 / 4)


@pytest.mark.parametrize("name", EXAMPLES)
def test_short(name):
    assert len((ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 120


def test_ngrams():
    # after the first symbol "a" came twice and "b" once, so by the rule "a" has (2 + 2 / 3) / (3 + 2) of 3 symbols
    assert ngrams.ngram_bits(["aaba"], ["ba"], order=1, symbols=3) == pytest.approx(-math.log2(8 / 15))
    assert ngrams.ngram_bits(["ab" * 500], ["ab" * 50], order=1, symbols=3) == pytest.approx(1, abs=0.01)
    assert ngrams.ngram_bits(["ab" * 500], ["ab" * 50], order=2, symbols=3) < 0.01
    assert ngrams.ngram_bits([], [(1, 2, 3)], order=3, symbols=8) == 3


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

    common.explain_and_compare(Namespace(smoke=False), model, loss, rounds=2)
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
