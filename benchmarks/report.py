"""What a run says on the terminal: the table, the real job, and a summary that names what lost."""

from __future__ import annotations

import math
import statistics

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.peers import EAGER, OURS, STOCK
from benchmarks.results import Column, Job, Result, Row, Spread, milliseconds, verdict


def print_report(result: Result, console: Console) -> None:
    """Print everything; a narrow terminal gets no memory and no route."""
    wide = console.width >= 110
    table = Table(header_style="bold", box=None, pad_edge=False)
    for title in ("workload", "", "stock ms", "fastlstm ms", "ratio", "p20-p80", "eager ms", "ratio"):
        table.add_column(title, justify="left" if title in ("workload", "") else "right", no_wrap=True)
    if wide:
        table.add_column("MiB stock", justify="right")
        table.add_column("ours", justify="right")
        table.add_column("route", no_wrap=True)
    previous = None
    for row in result["rows"]:
        group, _, mode = row["name"].rpartition("/")
        if previous and previous.split("/")[1:] != group.split("/")[1:]:
            table.add_section()
        stock, ours, eager = (row["columns"][name] for name in (STOCK, OURS, EAGER))
        table.add_row(
            group if group != previous else "",
            mode,
            _time(stock),
            _time(ours),
            _ratio(ours["ratio"]),
            f"{ours['ratio']['p20']:.2f}-{ours['ratio']['p80']:.2f}" if ours["ratio"] else "",
            _time(eager),
            f"[dim]{eager['ratio']['median']:.2f}[/]" if eager["ratio"] else "",
            *((_mebibytes(stock), _mebibytes(ours), row["route"]) if wide else ()),
        )
        previous = group
    if result["rows"]:
        console.print(table)
        console.print(
            f"[dim]ratio: stock's time / the column's, above 1 is faster. {escape(_sizes(result['rows']))}[/]",
            highlight=False,
        )
        console.print(summary(result["rows"]), highlight=False)
    for job in result["jobs"]:
        console.print(job_summary(job), highlight=False)
    for _, problem in refusals(result):
        console.print(f"[bold red]refused[/] {escape(problem)}", highlight=False)


def _time(column: Column) -> str:
    return milliseconds(column["ms"]) if column["ms"] else "[red]refused[/]"


def _ratio(ratio: Spread | None) -> str:
    if not ratio:
        return ""
    style = {"faster": "bold green", "even": "default", "slower": "bold red"}[verdict(ratio)]
    return f"[{style}]{ratio['median']:.2f}[/]"


def _mebibytes(column: Column) -> str:
    return f"{column['peak_bytes'] / 2**20:.1f}" if column["peak_bytes"] is not None else ""


def _sizes(rows: list[Row]) -> str:
    """What the letters stand for."""
    shapes = {row["name"].split("/")[0]: row["shape"] for row in rows}
    return "T,B,I,H: " + "  ".join(f"{name}={','.join(map(str, sizes.values()))}" for name, sizes in shapes.items())


def summary(rows: list[Row]) -> str:
    """Wins, ties, losses by name, and the geometric mean, for each mode."""
    text = []
    for training, mode in ((False, "forward"), (True, "forward and backward")):
        ratios: dict[str, Spread] = {}
        for row in rows:
            ratio = row["columns"][OURS]["ratio"]
            if row["training"] == training and ratio:
                ratios[row["name"].rpartition("/")[0]] = ratio
        if not ratios:
            continue
        faster = sum(verdict(ratio) == "faster" for ratio in ratios.values())
        slower = [f"{name} {ratio['median']:.2f}" for name, ratio in ratios.items() if verdict(ratio) == "slower"]
        mean = math.exp(statistics.fmean(math.log(ratio["median"]) for ratio in ratios.values()))
        text.append(
            f"[bold]{mode}[/]: faster on {faster}, as fast on {len(ratios) - faster - len(slower)}, "
            f"slower on {len(slower)} of {len(ratios)}; geometric mean {mean:.2f}x"
        )
        text[-1] += f"; slower: {', '.join(slower)}" if slower else ""
    return "\n".join(text)


def job_summary(job: Job) -> str:
    """The real job in four lines."""
    stock, ours = job["columns"][STOCK], job["columns"][OURS]
    bits = stock["bits_per_character"], ours["bits_per_character"]
    return "\n".join(
        (
            f"\n[bold]character model[/], {job['parameters']:,} parameters, {job['steps']} steps of "
            f"{job['batch']} packed lines of the standard library's source, route {job['route']}",
            f"  bits per character, held out: {job['untrained_bits']:.3f} untrained, "
            f"{bits[0]:.4f} stock, {bits[1]:.4f} fastlstm",
            f"  loss curve's distance from float64: {job['error']:.1e}, allowed {job['allowed']:.1e}",
            f"  training: {stock['seconds']:.1f} s stock, {ours['seconds']:.1f} s fastlstm, "
            f"ratio {_ratio(ours['ratio'])} ({ours['ratio']['p20']:.2f}-{ours['ratio']['p80']:.2f}), "
            "the whole model and the optimizer included",
        )
    )


def refusals(result: Result) -> list[tuple[str, str]]:
    """Every column that failed its check, and a job that went astray: the column's name, and what happened."""
    found = [
        (name, f"{row['name']}, {name}: {column['status']}")
        for row in result["rows"]
        for name, column in row["columns"].items()
        if column["status"] != "ok"
    ]
    return found + [(OURS, f"{job['name']}: {job['status']}") for job in result["jobs"] if job["status"] != "ok"]
