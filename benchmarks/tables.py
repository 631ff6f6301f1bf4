"""What a result file shows as tables: made once here, rendered as Markdown here, on a terminal and on a page elsewhere.

`python -m benchmarks.tables FILE` prints a whole result file as Markdown.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks.peers import INPUT_PRODUCT, OURS, STOCK
from benchmarks.results import Column, Result, Row, Spread, load, outcome, percentile, provenance, verdict
from benchmarks.suites import SUITES


class Cell(NamedTuple):
    """A text and what it tells: "faster", "even", "slower", "refused", "rough", or nothing of the kind."""

    text: str
    tone: str = ""


@dataclass(frozen=True)
class Table:
    """Titles and rows of cells; the first `names` columns are text, the others figures."""

    title: str
    header: list[str]
    rows: list[list[Cell]]
    names: int = 2


def tables(result: Result) -> Iterator[Table]:
    """Yield the tables of each suite that the file holds, in the order of SUITES."""
    for suite, described in SUITES.items():
        rows = [row for row in result["rows"] if row["suite"] == suite]
        if not rows:
            continue
        title = f"{suite}: {described.about}"
        if described.measure == "latency":
            yield latency_table(f"{title}, in microseconds", rows)
        elif described.measure == "accuracy":
            yield accuracy_table(title, rows)
        else:
            yield speed_table(title, rows)
            alone = [row for row in rows if INPUT_PRODUCT in row["columns"] and row["columns"][INPUT_PRODUCT]["ms"]]
            if alone:
                yield recurrence_table(f"{suite}: the recurrence alone, microseconds a step", alone)


def columns_of(rows: list[Row]) -> list[str]:
    """The columns of any of the rows, in order."""
    return list(dict.fromkeys(name for row in rows for name in row["columns"]))


def start(row: Row) -> list[Cell]:
    """A row's name and mode."""
    return [Cell(row["name"].rpartition("/")[0]), Cell("train" if row["training"] else "forward")]


def speed_table(title: str, rows: list[Row]) -> Table:
    """Times of stock and fastlstm, the ratio to stock of every column, and memory."""
    others = [name for name in columns_of(rows) if name not in (STOCK, OURS, INPUT_PRODUCT)]
    header = ["workload", "", "ratio", "p20-p80", "stock ms", "fastlstm ms"]
    header += [f"{name} ratio" for name in others] + ["MiB stock", "ours", "route"]
    body = []
    for row in rows:
        stock, ours = row["columns"][STOCK], row["columns"].get(OURS)
        spread = ours["ratio"] if ours else None
        body.append(
            [
                *start(row),
                ratio_cell(ours),
                Cell(f"{spread['p20']:.2f}-{spread['p80']:.2f}" if spread else ""),
                time_cell(stock),
                time_cell(ours),
                *(ratio_cell(row["columns"].get(name), own=name.startswith(OURS)) for name in others),
                *(Cell(mebibytes(column)) for column in (stock, ours)),
                Cell(row["route"]),
            ]
        )
    return Table(title, header, body)


def latency_table(title: str, rows: list[Row]) -> Table:
    """What a caller waits for one step: p50 and p99 of every column, in microseconds."""
    names = columns_of(rows)
    header = ["workload", "", *names]
    body = []
    for row in rows:
        cells = start(row)
        for name in names:
            column = row["columns"].get(name)
            if not column or not column["ms"]:
                cells.append(status_cell(column))
                continue
            tone = verdict(column["ratio"]) if column["ratio"] and name.startswith(OURS) else ""
            p50, p99 = (1e3 * percentile(column["samples"], percent) for percent in (50, 99))
            cells.append(Cell(f"{p50:.4g} / {p99:.4g}", tone))
        body.append(cells)
    return Table(title, header, body)


def accuracy_table(title: str, rows: list[Row]) -> Table:
    """The relative error of every tensor in every column; one that is over the tests' allowance is marked."""
    names = list(dict.fromkeys(key for row in rows for column in row["columns"].values() for key in column["errors"]))
    body = []
    for row in rows:
        for name, column in row["columns"].items():
            tone = "" if column["status"] == "ok" else "refused" if name.startswith(OURS) else "rough"
            errors = [Cell(_error(column["errors"], key), tone) for key in names]
            body.append([start(row)[0], Cell(name), *(errors if column["errors"] else [status_cell(column)])])
            body[-1] += [Cell("")] * (2 + len(names) - len(body[-1]))
    return Table(title, ["workload", "column", *names], body)


def _error(errors: dict[str, float | None], key: str) -> str:
    return "" if key not in errors else "not finite" if errors[key] is None else f"{errors[key]:.1e}"


def recurrence_table(title: str, rows: list[Row]) -> Table:
    """Every column's time less that of the input product, per step: what FlashRNN's own figures show."""
    names = [name for name in columns_of(rows) if name != INPUT_PRODUCT]
    body = []
    for row in rows:
        product = row["columns"][INPUT_PRODUCT]["ms"]
        cells = start(row)
        for name in names:
            column = row["columns"].get(name)
            if column and column["ms"] and product:
                alone = 1e3 * (column["ms"]["median"] - product["median"]) / row["shape"]["T"]
                cells.append(Cell(f"{alone:.2f}"))
            else:
                cells.append(status_cell(column))
        body.append(cells)
    return Table(title, ["workload", "", *names], body)


class Summary(NamedTuple):
    """A mode's wins, ties and losses in words, and the losing workloads, the worst first."""

    mode: str
    counts: str
    slower: list[str]


def summaries(rows: list[Row]) -> list[Summary]:
    """Wins, ties, losses by name, and the geometric mean, for each mode."""
    found = []
    for training, mode in ((False, "forward"), (True, "forward and backward")):
        ratios: dict[str, Spread] = {}
        for row in rows:
            ours = row["columns"].get(OURS)
            if row["training"] == training and ours and ours["ratio"]:
                ratios[row["name"].rpartition("/")[0]] = ours["ratio"]
        if not ratios:
            continue
        faster = sum(verdict(ratio) == "faster" for ratio in ratios.values())
        lost = sorted((ratio["median"], name) for name, ratio in ratios.items() if verdict(ratio) == "slower")
        slower = [f"{name} {median:.2f}" for median, name in lost]
        mean = math.exp(statistics.fmean(math.log(ratio["median"]) for ratio in ratios.values()))
        counts = f"faster on {faster}, as fast on {len(ratios) - faster - len(slower)}, slower on {len(slower)} of "
        counts += f"{len(ratios)}; geometric mean {mean:.2f}x"
        found.append(Summary(mode, counts, slower))
    return found


def status_cell(column: Column | None) -> Cell:
    """Why a column has no figure; nothing where it is stock that lacks one."""
    word = outcome(column) if column else ""
    shown = {"": "", "ok": "", "rough": "", "not supported": "n/a", "wrong result": "refused"}.get(word, word)
    return Cell(shown, "refused" if word in ("wrong result", "failed") else "")


def time_cell(column: Column | None) -> Cell:
    """A median in milliseconds."""
    return Cell(milliseconds(column["ms"])) if column and column["ms"] else status_cell(column)


def ratio_cell(column: Column | None, own: bool = True) -> Cell:
    """A ratio to stock; a ~ marks a column that is less accurate than the tests allow. Only our own are judged."""
    if not column or not column["ratio"]:
        return status_cell(column)
    mark = "~" if column["status"] != "ok" else ""
    return Cell(f"{mark}{column['ratio']['median']:.2f}", verdict(column["ratio"]) if own else "")


def mebibytes(column: Column | None) -> str:
    """Peak memory."""
    return f"{column['peak_bytes'] / 2**20:.1f}" if column and column["peak_bytes"] is not None else ""


def milliseconds(spread: Spread) -> str:
    """The median to three significant figures."""
    value = spread["median"]
    return f"{value:.0f}" if value >= 100 else f"{value:.{2 if value < 10 else 1}f}" if value >= 1 else f"{value:.3f}"


def markdown(result: Result) -> str:
    """Render a whole result file; losses and refusals in bold."""
    conditions = f"{provenance(result)}; memory: {result['settings']['memory']}; `{result['command']}`"
    text = [f"# fastlstm beside torch.nn.LSTM\n\n{conditions}\n"]
    for table in tables(result):
        rule = ["---"] * table.names + ["---:"] * (len(table.header) - table.names)
        lines = [table.header, rule] + [
            [f"**{cell.text}**" if cell.tone in ("slower", "refused") and cell.text else cell.text for cell in cells]
            for cells in table.rows
        ]
        text.append(f"## {table.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")
    text += [f"- {name}: {about}" for name, about in result["columns"].items()]
    text += [f"- {name} is absent: {reason}" for name, reason in result["absent"].items()]
    return "\n".join(text) + "\n"


def main() -> None:
    """Print a result file as Markdown."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("file", type=Path)
    print(markdown(load(parser.parse_args().file)))


if __name__ == "__main__":
    main()
