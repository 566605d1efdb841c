"""Pages: Markdown, and the same with every figure as one HTML file that needs no other."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..records.files import write_text

MADE_BY = (
    "`kv-eviction report DIR` makes this page from the records beside it. The same command makes "
    "`report.html` with every figure, each figure as PNG and SVG, and the numbers behind them as "
    "JSON."
)
"""A line of every page: what is not beside it can be made."""
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #111; background: #fff; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 0.85rem; display: block;
  overflow-x: auto; }
th, td { border-bottom: 1px solid #ccc; padding: 0.3rem 0.6rem; vertical-align: top; }
th { border-bottom: 2px solid #333; text-align: left; }
img { max-width: 100%; height: auto; }
code { font-size: 0.9em; }
@media print { table { overflow: visible; } }
"""
_IMAGE = re.compile(r'<img src="([^":]+)"')


@dataclass(frozen=True)
class Figure:
    """A figure's place in a page: its file without suffix, beside the page, and its caption."""

    name: str
    caption: str

    def __str__(self) -> str:
        return f"![{self.caption}]({self.name}.png)\n\n*{self.caption}*"


def write_pages(
    folder: Path,
    parts: Sequence[str | Figure],
    shown: int = 1,
    name: str = "report",
    made_by: str = MADE_BY,
) -> None:
    """``report.md`` and ``report.html`` in ``folder``.

    Args:
        folder: where the figures lie.
        parts: paragraphs, tables, headings and figures, the title first.
        shown: so many figures, from the first on, stand in ``report.md``. ``report.html`` has all.
        name: of another page than the report.
        made_by: its last line in Markdown.

    """
    figures = [part for part in parts if isinstance(part, Figure)]
    hidden = {figure.name for figure in figures[shown:]}
    kept = [part for part in parts if not (isinstance(part, Figure) and part.name in hidden)]
    write_text(folder / f"{name}.md", _joined([*kept, made_by]))
    write_text(folder / f"{name}.html", to_html(_joined(parts), folder))


def _joined(parts: Sequence[str | Figure]) -> str:
    return "\n\n".join(map(str, parts)) + "\n"


def to_html(markdown: str, folder: Path) -> str:
    """A whole HTML page; figures that lie in ``folder`` are put into it."""
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark").enable("table").render(markdown)
    body = _IMAGE.sub(lambda match: f'<img src="{_embedded(folder / match[1])}"', body)
    title = html.escape(markdown.splitlines()[0].lstrip("# "))
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width">\n<title>{title}</title>\n'
        f"<style>{_STYLE}</style>\n{body}</html>\n"
    )


def _embedded(path: Path) -> str:
    svg = path.with_suffix(".svg")
    return "data:image/svg+xml;base64," + base64.b64encode(svg.read_bytes()).decode()
