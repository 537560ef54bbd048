"""A report as one HTML file: pictures inside, no scripts, nothing fetched; opens anywhere and can be sent as it is."""

from __future__ import annotations

import base64
import io
import numbers
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from threestudio_pgc.export.files import write_bytes

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --quiet: #63636b; --paper: #fff; --line: #d9d9de; --shade: #f4f4f6; --link: #0060a8 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8ea; --quiet: #a0a0a8; --paper: #161618; --line: #3a3a40; --shade: #222226; --link: #6db8ff }
}
* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100% }
body { margin: 0 auto; padding: 1rem clamp(.8rem, 3vw, 2.5rem) 4rem; max-width: 110rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0 1rem }
h2 { font-size: 1.2rem; line-height: 1.3; margin: 2.5rem 0 .5rem; padding-top: .8rem; border-top: 1px solid var(--line) }
p { max-width: 46rem; margin: .5rem 0; white-space: pre-line }
a { color: var(--link) }
nav ol { margin: .8rem 0; padding-left: 1.4rem }
pre { margin: .5rem 0; padding: .6rem .8rem; background: var(--shade); border-radius: .4rem; font-size: .85rem; white-space: pre-wrap }
summary { cursor: pointer; color: var(--quiet) }
figure { margin: 1rem 0 1.5rem }
figure > div, .table { overflow: auto; max-width: 100% }
img { display: block; max-width: none; height: auto; background: #fff }
img.small { image-rendering: pixelated }
figcaption { max-width: 46rem; margin-top: .4rem; color: var(--quiet); font-size: .9rem; white-space: pre-line }
.table { max-height: 80vh; width: fit-content; margin: .8rem 0; border: 1px solid var(--line); border-radius: .4rem }
table { border-collapse: separate; border-spacing: 0; font-size: .9rem; overflow-wrap: normal }
th, td { padding: .3rem .7rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line) }
tr:last-child > td, tbody tr:last-child > th { border-bottom: 0 }
thead th { position: sticky; top: 0; background: var(--shade); white-space: nowrap }
tbody th { font-weight: 400; color: var(--quiet); white-space: nowrap }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.quiet { color: var(--quiet) }
"""


@dataclass
class Section:
    """A part of a page: a heading and, in this order, text (blank lines part paragraphs), a table and images.

    Attributes:
        images: (PNG file, caption).
        table: rows, column -> value; a column missing from a row is empty there.
    """

    title: str
    text: str = ""
    images: list[tuple[Path, str]] = field(default_factory=list)
    table: list[dict[str, Any]] | None = None


def write_page(path: str | Path, title: str, command: str, settings: Mapping[str, Any], sections: Sequence[Section]) -> Path:
    """Write a report as one self-contained HTML file, atomically; all text is escaped.

    Args:
        command: the line that makes the page again.
        settings: name -> value of what it ran with.
    Raises:
        ExportError: the file cannot be written.
        ValueError: an image is missing or is not a PNG; nothing is written.
    """
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n',
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n",
        f"<pre><code>{escape(command)}</code></pre>\n" if command else "",
    ]
    if settings:
        lines = [f'<tr><th scope="row">{escape(str(name))}</th><td>{escape(_text(value))}</td></tr>' for name, value in settings.items()]
        parts += ['<details><summary>Settings</summary><div class="table"><table><tbody>', *lines, "</tbody></table></div></details>\n"]
    if len(sections) > 2:
        links = "".join(f'<li><a href="#s{k}">{escape(section.title)}</a></li>' for k, section in enumerate(sections, 1))
        parts.append(f"<nav><ol>{links}</ol></nav>\n")
    for k, section in enumerate(sections, 1):
        parts.append(f'<section id="s{k}">\n<h2>{escape(section.title)}</h2>\n')
        parts += [f"<p>{escape(paragraph.strip())}</p>\n" for paragraph in section.text.split("\n\n") if paragraph.strip()]
        if section.table is not None:
            parts.append(_table(section.table))
        parts += [_figure(Path(file), caption) for file, caption in section.images]
        parts.append("</section>\n")
    parts.append("</body>\n</html>\n")
    # A command line may hold bytes that are no text.
    return write_bytes(path, *(part.encode("utf-8", "replace") for part in parts))


def _figure(file: Path, caption: str) -> str:
    from PIL import Image

    if not file.is_file():
        raise ValueError(f"{file}: found no such image")
    data = file.read_bytes()
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            width, height = image.size
    except OSError as error:
        raise ValueError(f"{file}: found something else, wanted a PNG") from error
    # Tiny pictures are shown at a whole multiple, each of their pixels a square.
    factor, kind = max(1, 320 // width), ' class="small"' if width < 400 else ""
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    size = f'width="{width * factor}" height="{height * factor}"'
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><div><img{kind} {size} alt="{escape(caption or file.stem)}" src="{source}"></div>{below}</figure>\n'


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    if not columns:
        return '<p class="quiet">no rows</p>\n'
    numeric = {}
    for column in columns:
        values = [row[column] for row in rows if row.get(column) is not None]
        numeric[column] = bool(values) and all(map(_is_number, values))

    def cell(tag: str, column: str, text: str) -> str:
        kind = ' class="number"' if numeric[column] else ""
        return f"<{tag}{kind}>{escape(text)}</{tag.split()[0]}>"

    head = "".join(cell('th scope="col"', column, str(column)) for column in columns)
    body = "".join(f"<tr>{''.join(cell('td', column, _text(row.get(column))) for column in columns)}</tr>\n" for row in rows)
    return f'<div class="table"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table></div>\n'


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _text(value: Any) -> str:
    """A value as a reader wants it: four digits of a number, yes or no, the items of a list."""
    if value is None:
        return ""
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral):
        value = float(value)
        if value == 0 or 1e-3 <= abs(value) < 1e6:
            return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
        return re.sub(r"e([+-])0*", lambda match: "e" + match[1].strip("+"), f"{value:.3g}")
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={_text(item)}" for name, item in value.items())
    if isinstance(value, (list, tuple, np.ndarray)):
        return ", ".join(_text(item) for item in value)
    return str(value)
