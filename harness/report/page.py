"""Pages: Markdown, and the same as one HTML file that needs no other."""

from __future__ import annotations

import base64
import html
import re
from pathlib import Path

from ..records.files import write_text

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


def write_pages(folder: Path, markdown: str) -> None:
    """``report.md`` and ``report.html`` in ``folder``."""
    write_text(folder / "report.md", markdown)
    write_text(folder / "report.html", to_html(markdown, folder))


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
