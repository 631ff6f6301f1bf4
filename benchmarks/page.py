"""The report: one HTML file with every table and chart of a result file, which needs nothing else to be read.

`python -m benchmarks.page FILE.json` makes it again, with a Markdown file of the tables beside it.
"""

from __future__ import annotations

import argparse
from itertools import groupby
from pathlib import Path

import jinja2
import matplotlib as mpl

from benchmarks.charts import charts, svg
from benchmarks.plot import figure, lines
from benchmarks.report import refusals
from benchmarks.results import Result, load, provenance
from benchmarks.tables import markdown, summaries, tables

NOTES = {
    "Where is it faster: ratio to stock over H and B": "Stock's time / fastlstm's. Green is faster, red is slower than "
    "stock by more than its noise; grey was not measured.",
    "Time of a step as sequences grow": "The median time of a call / T.",
    "Roofline: against what this machine can do": "The flat roof is a matrix product (float32: without TF32) or, on a "
    "CPU, oneDNN's product or LSTM on a large batch, whichever is fastest; the slanted one a copy; both are measured "
    "before the run. The input product's weights count too, though one product for all steps reads them less often: a "
    "point more than (I + H) / H above the slanted roof is only possible where the recurrent weights stay in registers "
    "or caches between steps; one above the flat roof shows that the clock has risen since.",
    "Accuracy as sequences grow": "The largest absolute difference, relative to the largest magnitude in the float64 "
    "result or to 1. The dotted line is the dtype's machine epsilon.",
    "Memory at the peak of a call": "What one call needs at its peak beyond what is held before it, its results and "
    "gradients included; above 1, in the shaded part, fastlstm needs more than stock. None is drawn under half a MiB.",
}


def write_page(result: Result, path: Path) -> Path:
    """Write the page and, beside it, the tables as Markdown; return the page's path."""
    template = Path(__file__).with_name("page.html").read_text()
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastlstm"}):
        bars = svg(figure(result)) if lines(result) else ""
    sections = [
        {"title": title, "note": NOTES[title], "charts": list(group)}
        for title, group in groupby(charts(result), key=lambda chart: chart.section)
    ]
    text = environment.from_string(template).render(
        result=result,
        provenance=provenance(result),
        summaries=summaries(result["rows"]),
        refusals=refusals(result),
        bars=bars,
        sections=sections,
        tables=list(tables(result)),
    )
    path.write_text(text)
    path.with_suffix(".md").write_text(markdown(result))
    return path


def main() -> None:
    """Make the page of a result file."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--to", type=Path, metavar="FILE.html", help="default: beside the result file")
    options = parser.parse_args()
    print(write_page(load(options.file), options.to or options.file.with_suffix(".html")).resolve().as_uri())


if __name__ == "__main__":
    main()
