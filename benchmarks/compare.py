"""The regression gate: what became faster or slower between two result files.

`python -m benchmarks compare OLD.json NEW.json`; the exit status is 1 when something became slower, or is refused, or
needs more memory than before, and 2 when the files cannot be compared.

Two runs are never paired with each other, so fastlstm is compared with stock of its own run: what is compared is the
ratio stock / fastlstm, paired by round, in which a slower clock or a busy neighbour cancels. The change is the quotient
of the medians, new by old. Its interval comes from a bootstrap over the rounds of both files, in blocks, since rounds
that follow one another share their noise; it is as wide as the number of rows asks (Bonferroni), so that a run with
nothing changed stays silent.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Literal, NamedTuple

import numpy as np

from benchmarks.peers import OURS, STOCK
from benchmarks.report import make_console, print_table
from benchmarks.results import SMALLEST_PEAK, Column, Result, Row, load, provenance
from benchmarks.tables import Cell, Table

CHANGE = 0.05  # a smaller change is not reported: two runs of the same code differ by up to so much
LEVEL = 0.01  # chance that a comparison of like with like reports any row
RESAMPLES = 1000
FEWEST_ROUNDS = 3
MEMORY = 1.1  # two processes that do the same differ by up to 5 %

Word = Literal["faster", "even", "unclear", "slower", "refused", "more memory"]


class Verdict(NamedTuple):
    """What happened to a workload: new speed / old speed, and the interval that it lies in."""

    suite: str
    name: str
    word: Word
    note: str = ""
    change: float | None = None
    low: float | None = None
    high: float | None = None


def bootstrap(old: Sequence[float], new: Sequence[float], level: float, seed: int = 0) -> tuple[float, float, float]:
    """Return median(new) / median(old) and its interval at 1 - level, by a circular block bootstrap over both.

    The logarithm of the quotient is taken as normal with the bootstrap's deviation: a level of one in a thousand would
    need a hundred thousand resamples if it were read off them.
    """
    generator = np.random.default_rng(seed)
    variance = 0.0
    for values in (old, new):
        blocks = len(values) / _block(len(values))
        # resampling m blocks underestimates the variance by (m - 1) / m
        variance += np.var(np.log(_medians(np.asarray(values), generator))) * blocks / (blocks - 1)
    change = float(np.median(new) / np.median(old))
    reach = math.exp(NormalDist().inv_cdf(1 - level / 2) * variance**0.5)
    return change, change / reach, change * reach


def _block(n: int) -> int:
    return max(1, round(n ** (1 / 3)))


def _medians(values: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Medians of RESAMPLES resamples, [RESAMPLES], each of blocks of about n^(1/3) neighbours."""
    n, length = len(values), _block(len(values))
    starts = generator.integers(n, size=(RESAMPLES, -(-n // length), 1))
    picked = (starts + np.arange(length)) % n
    return np.median(values[picked.reshape(RESAMPLES, -1)[:, :n]], axis=1)


def compare(old: Result, new: Result) -> Iterator[Verdict]:
    """Yield a verdict on fastlstm for every workload that both files hold."""
    before = {(row["suite"], row["name"]): row for row in old["rows"]}
    pairs = [(before[key], row) for row in new["rows"] if (key := (row["suite"], row["name"])) in before]
    same_way = old["settings"]["memory"] == new["settings"]["memory"]
    for a, b in pairs:
        verdict = _verdict(a, b, LEVEL / len(pairs))
        growth = _growth(a["columns"][OURS], b["columns"][OURS]) if same_way else 1.0
        if verdict.word != "slower" and growth > 1:
            note = f"{growth:.2f}x the bytes; {verdict.note}".rstrip("; ")
            verdict = verdict._replace(word="more memory", note=note)
        yield verdict


def _growth(old: Column, new: Column) -> float:
    """New peak / old peak of memory; 1 where there is none, or where the difference may be noise."""
    before, now = old["peak_bytes"] or 0, new["peak_bytes"] or 0
    return now / before if before and now > max(MEMORY * before, SMALLEST_PEAK) else 1.0


def _verdict(old: Row, new: Row, level: float) -> Verdict:
    a, b = old["columns"][OURS], new["columns"][OURS]
    key = new["suite"], new["name"]
    before, now = (_ratios(row["columns"][STOCK], row["columns"][OURS]) for row in (old, new))
    if not b["ms"]:  # refused, or of a suite that times nothing
        return Verdict(*key, "refused" if a["status"] == "ok" != b["status"] else "even", b["status"])
    if min(len(before), len(now)) < FEWEST_ROUNDS:
        return Verdict(*key, "unclear", "too few samples")
    change, low, high = bootstrap(before, now, level)
    word: Word = "even"
    if high < 1 and change < 1 - CHANGE:
        word = "slower"
    elif low > 1 and change > 1 + CHANGE:
        word = "faster"
    elif high > 1 + 2 * CHANGE or low < 1 - 2 * CHANGE:
        word = "unclear"
    note = "" if old["route"] == new["route"] else f"route: {old['route']} before, {new['route']} now"
    return Verdict(*key, word, note, change, low, high)


def _ratios(stock: Column, own: Column) -> list[float]:
    if not (stock["samples"] and own["samples"]):  # one of them refused
        return []
    return [theirs / ours for theirs, ours in zip(stock["samples"], own["samples"], strict=True)]


def main(arguments: list[str]) -> int:
    """Compare two result files and print what changed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks compare", description=main.__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--all", action="store_true", help="print the rows on which nothing changed, too")
    options = parser.parse_args(arguments)
    console = make_console()
    try:
        old, new = load(options.old), load(options.new)
    except (OSError, ValueError) as problem:
        parser.error(str(problem))  # exits with 2
    console.out(f"old: {provenance(old)}\nnew: {provenance(new)}", highlight=False)
    if any(old["machine"][name] != new["machine"][name] for name in ("cpu", "gpu")):
        console.print("[bold]different machines[/]: what follows compares them, not the code")
    verdicts = list(compare(old, new))
    if not verdicts:
        console.print("no workload is in both files")
        return 2
    tones = {"faster": "faster", "even": "", "unclear": ""}
    rows = [
        [
            Cell(f"{verdict.suite} {verdict.name}"),
            Cell(verdict.word, tones.get(verdict.word, "slower")),
            Cell(f"{verdict.change:.2f}x" if verdict.change else ""),
            Cell(f"{verdict.low:.2f}-{verdict.high:.2f}" if verdict.low and verdict.high else ""),
            Cell(verdict.note),
        ]
        for verdict in verdicts
        if options.all or verdict.word != "even"
    ]
    header = ["workload", "verdict", "speed", "interval", "note"]
    print_table(Table("new speed / old speed, each relative to stock of its own run", header, rows), console)
    counts = Counter(verdict.word for verdict in verdicts)
    console.print(", ".join(f"{word}: {count}" for word, count in counts.items()) + f" of {len(verdicts)}")
    return int(any(verdict.word in ("slower", "refused", "more memory") for verdict in verdicts))
