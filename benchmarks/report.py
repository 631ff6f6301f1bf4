"""What a run says on the terminal: the table, the real job, and a summary that names what lost."""

from __future__ import annotations

import rich.table
from rich.console import Console
from rich.markup import escape

from benchmarks.peers import OURS, STOCK
from benchmarks.results import Job, Result, Row, Spread, outcome, verdict
from benchmarks.tables import Table, summaries, tables

STYLES = {"faster": "bold green", "slower": "bold red", "refused": "red", "rough": "yellow"}


def make_console() -> Console:
    """The terminal, or lines long enough for a table where there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=132)


def print_report(result: Result, console: Console) -> None:
    """Print everything; a narrow terminal gets no memory and no route."""
    for table in tables(result):
        print_table(table, console)
    if result["rows"]:
        console.print(
            f"[dim]ratio: stock's time / the column's, above 1 is faster. {escape(_sizes(result['rows']))}[/]",
            highlight=False,
        )
        for line in summaries(result["rows"]):
            more = f", and {len(line.slower) - 20} more" if len(line.slower) > 20 else ""
            slower = f"; slower: {', '.join(line.slower[:20])}{more}" if line.slower else ""
            console.print(f"[bold]{line.mode}[/]: {line.counts}{escape(slower)}", highlight=False)
    for name, reason in result["absent"].items():
        console.print(f"[dim]absent: {name}, {escape(reason)}[/]", highlight=False)
    for job in result["jobs"]:
        console.print(job_summary(job), highlight=False)
    for _, problem in refusals(result):
        console.print(f"[bold red]refused[/] {escape(problem)}", highlight=False)


def print_table(table: Table, console: Console) -> None:
    """Print a table; a workload's name stands once, at its first mode."""
    shown = [
        index
        for index, title in enumerate(table.header)
        if console.width >= 110 or title not in ("MiB stock", "ours", "route")
    ]
    drawn = rich.table.Table(title=table.title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for index in shown:
        text = index < table.names or table.header[index] in ("route", "note")
        drawn.add_column(table.header[index], justify="left" if text else "right", no_wrap=True)
    previous = None
    for cells in table.rows:
        texts = [f"[{STYLES.get(cell.tone, 'default')}]{escape(cell.text)}[/]" if cell.text else "" for cell in cells]
        texts[0] = "" if cells[0] == previous else texts[0]
        if previous and cells[0].text.split("/")[1:] != previous.text.split("/")[1:]:
            drawn.add_section()
        previous = cells[0]
        drawn.add_row(*(texts[index] for index in shown))
    console.print(drawn)


def _ratio(ratio: Spread) -> str:
    return f"[{STYLES.get(verdict(ratio), 'default')}]{ratio['median']:.2f}[/]"


def _sizes(rows: list[Row]) -> str:
    """What the letters stand for; longer names say it themselves."""
    shapes = {row["name"].split("/")[0]: row["shape"] for row in rows}
    lettered = {name: sizes for name, sizes in shapes.items() if len(name) == 1}
    text = "  ".join(f"{name}={','.join(map(str, sizes.values()))}" for name, sizes in lettered.items())
    return f"T,B,I,H: {text}" if text else ""


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
        if outcome(column) not in ("ok", "rough", "not supported")
    ]
    return found + [(OURS, f"{job['name']}: {job['status']}") for job in result["jobs"] if job["status"] != "ok"]
