"""The report: one HTML file with every table and chart of a result file, which needs nothing else to be read.

`python -m benchmarks.page FILE.json` makes it again, with a Markdown file of the tables beside it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jinja2
import matplotlib as mpl

from benchmarks.charts import sections, svg
from benchmarks.plot import figure, lines
from benchmarks.report import refusals
from benchmarks.results import Result, load, provenance
from benchmarks.tables import markdown, summaries, tables


def write_page(result: Result, path: Path) -> Path:
    """Write the page and, beside it, the tables as Markdown; return the page's path."""
    template = Path(__file__).with_name("page.html").read_text()
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastlstm"}):
        bars = svg(figure(result)) if lines(result) else ""
    text = environment.from_string(template).render(
        result=result,
        provenance=provenance(result),
        summaries=summaries(result["rows"]),
        refusals=refusals(result),
        bars=bars,
        sections=sections(result),
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
