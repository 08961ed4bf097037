"""Building blocks of a report: one HTML file that needs nothing besides itself.

Pictures, sounds and charts stand inside the file as data, so that it opens from a file share or a
mail without network. Every block is a `Markup`; text given to a block is escaped. Charts follow the
page's colours, light or dark.

    page = render_page("Title", subtitle="...", sections=[Section("Figures", [table(...)])])
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import jinja2
import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from PIL import Image

# Drawn by matplotlib, then replaced by the page's text colour.
INK = "#010203"
SERIES_COLORS = ("#4c7fe0", "#e0803a", "#2fa37c", "#b667c9", "#d6596b", "#8a8f3c")
CHART_STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "svg.fonttype": "none",  # text stays text, in the page's font
    "svg.hashsalt": "isopair",  # the same chart gives the same bytes
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#8888884d",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}
# Browsers everywhere play MP3, and it is a tenth of WAV.
SOUND_FORMAT = "MP3"
WAVEFORM_COLUMNS = 80


@dataclass(frozen=True)
class Section:
    """A heading with blocks under it."""

    title: str
    blocks: Sequence[Markup]
    note: str = ""


def render_page(title: str, *, subtitle: str, sections: Sequence[Section]) -> str:
    """A whole HTML page, with a table of contents where there are several sections."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(PAGE_TEMPLATE)
    return page.render(title=title, subtitle=subtitle, sections=sections, style=Markup(STYLE))


# ----------------------------------------------------------------------------- text and tables


def paragraph(text: str) -> Markup:
    """A paragraph of plain text."""
    return Markup("<p>{}</p>").format(text)


def heading(text: str) -> Markup:
    """A heading inside a section."""
    return Markup("<h3>{}</h3>").format(text)


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str | Markup]],
    *,
    numeric: Collection[int] = (),
) -> Markup:
    """A table.

    Args:
        header: title of each column.
        rows: their cells.
        numeric: places of the columns that are set flush right.
    """
    head = Markup("").join(
        _cell("th", text, number in numeric) for number, text in enumerate(header)
    )
    body = Markup("").join(
        Markup("<tr>{}</tr>").format(
            Markup("").join(_cell("td", cell, number in numeric) for number, cell in enumerate(row))
        )
        for row in rows
    )
    return Markup(
        '<div class="scroll"><table><thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>'
    ).format(head, body)


def _cell(tag: str, content: str | Markup, is_numeric: bool) -> Markup:
    kind = Markup(' class="number"') if is_numeric else ""
    return Markup("<{}{}>{}</{}>").format(Markup(tag), kind, content, Markup(tag))


def fact_list(facts: Mapping[str, object]) -> Markup:
    """Names and values in two columns."""
    entries = (Markup("<dt>{}</dt><dd>{}</dd>").format(name, facts[name]) for name in facts)
    return Markup('<dl class="facts">{}</dl>').format(Markup("").join(entries))


def badge(text: str, *, kind: str) -> Markup:
    """A small label: kind "good", "bad" or "plain"."""
    return Markup('<span class="badge {}">{}</span>').format(kind, text)


def interval_bar(value: float, *, low: float, high: float, reference: float) -> Markup:
    """A bar from 0 to 1: filled to `value`, with its interval, and a mark at `reference`."""
    numbers = [f"{100 * min(1.0, max(0.0, share)):.2f}%" for share in (value, low, reference)]
    width = f"{100 * (min(1.0, high) - max(0.0, low)):.2f}%"
    return Markup(
        '<div class="bar"><i class="fill" style="width:{}"></i>'
        '<i class="interval" style="left:{};width:{}"></i>'
        '<i class="reference" style="left:{}" title="chance"></i></div>'
    ).format(numbers[0], numbers[1], width, numbers[2])


def columns(blocks: Sequence[Markup]) -> Markup:
    """Blocks side by side where the window is wide enough."""
    cells = (Markup("<div>{}</div>").format(block) for block in blocks)
    return Markup('<div class="columns">{}</div>').format(Markup("").join(cells))


# --------------------------------------------------------------------------------------- media


def data_uri(content: bytes, *, media_type: str) -> str:
    """The bytes of a file as an address that holds them."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"


def picture(image: np.ndarray, *, max_side: int = 128, alt: str = "") -> Markup:
    """A thumbnail of a uint8 [H, Wd, 3] image; tiny images are shown with larger pixels."""
    small = Image.fromarray(image)
    small.thumbnail((max_side, max_side))
    enlargement = max_side // max(small.size)
    if enlargement > 1:
        size = (small.width * enlargement, small.height * enlargement)
        small = small.resize(size, Image.Resampling.NEAREST)
    file = io.BytesIO()
    small.save(file, format="JPEG", quality=82)
    uri = data_uri(file.getvalue(), media_type="image/jpeg")
    return Markup('<img src="{}" width="{}" height="{}" alt="{}">').format(uri, *small.size, alt)


def sound(waveform: np.ndarray, *, sample_rate_hz: int, max_seconds: float = 4.0) -> Markup:
    """A player and a picture of the first seconds of a float32 [samples] waveform.

    Args:
        waveform: mono, in [-1, 1].
        sample_rate_hz: one that MP3 knows, such as 16000.
        max_seconds: longer clips are cut.
    """
    import soundfile

    clip = waveform[: round(max_seconds * sample_rate_hz)]
    file = io.BytesIO()
    soundfile.write(file, clip, sample_rate_hz, format=SOUND_FORMAT)
    return Markup(
        '<div class="sound">{}<audio controls preload="none" src="{}"></audio></div>'
    ).format(waveform_picture(clip), data_uri(file.getvalue(), media_type="audio/mpeg"))


def waveform_picture(waveform: np.ndarray) -> Markup:
    """The outline of a float32 [samples] waveform, as wide as its place."""
    pieces = np.array_split(np.abs(waveform), WAVEFORM_COLUMNS)
    peaks = np.array([piece.max(initial=0.0) for piece in pieces])
    heights = 19 * peaks / max(float(peaks.max()), 1e-6)
    upper = [f"{place},{20 - height:.1f}" for place, height in enumerate(heights)]
    lower = [f"{place},{20 + height:.1f}" for place, height in enumerate(heights)]
    return Markup(
        '<svg class="waveform" viewBox="0 0 {} 40" preserveAspectRatio="none">'
        '<polygon points="{}"/></svg>'
    ).format(WAVEFORM_COLUMNS - 1, " ".join(upper + lower[::-1]))


# -------------------------------------------------------------------------------------- charts


@contextmanager
def chart(*, width: float, height: float) -> Iterator[Figure]:
    """An empty figure of `width` x `height` inches in the page's style; give it to `svg_chart`."""
    with rc_context(CHART_STYLE):
        yield Figure(figsize=(width, height), layout="constrained")


def svg_chart(figure: Figure, *, alt: str) -> Markup:
    """A figure as inline SVG, with a transparent background and the page's text colour."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with rc_context(CHART_STYLE):
        FigureCanvasSVG(figure).print_svg(file, metadata=nothing)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)  # HTML needs none, and they look like links
    svg = svg.replace(INK, "currentColor")
    return Markup('<figure class="chart" role="img" aria-label="{}">{}</figure>').format(
        alt, Markup(svg)
    )


# ---------------------------------------------------------------------------------------- page

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #ffffff; --text: #1c2330;
  --faint: #667085; --line: #e1e5ec; --accent: #3f72d8; --good: #16794f; --good-back: #dff3e8;
  --bad: #b3303f; --bad-back: #fbe4e6; --reference: #c2701c; }
@media (prefers-color-scheme: dark) { :root { --page: #12151b; --card: #1a1f28; --text: #e4e8ef;
  --faint: #98a2b3; --line: #2d3543; --accent: #6f9bf0; --good: #6fd6a3; --good-back: #173a2b;
  --bad: #f08a95; --bad-back: #43202a; --reference: #eba45a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; }
h2 { font-size: 18px; margin: 0 0 4px; }
h3 { font-size: 14px; margin: 20px 0 8px; }
.subtitle, .note { color: var(--faint); margin: 0 0 12px; overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 12px 0 20px; }
a { color: var(--accent); text-decoration: none; } a:hover { text-decoration: underline; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 18px 20px; margin: 0 0 16px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: left; font-weight: 600; color: var(--faint); font-size: 12px;
  white-space: nowrap; }
th, td { padding: 5px 12px 5px 0; border-bottom: 1px solid var(--line); vertical-align: middle; }
tbody tr:last-child td { border-bottom: 0; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: 3px 20px; margin: 0;
  font-size: 14px; }
.facts dt { color: var(--faint); } .facts dd { margin: 0; overflow-wrap: anywhere; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr));
  gap: 8px 28px; align-items: start; }
.columns > div { min-width: 0; }
.bar { position: relative; width: 200px; height: 12px; border-radius: 3px;
  background: var(--line); }
.bar i { position: absolute; display: block; }
.bar .fill { left: 0; top: 0; bottom: 0; border-radius: 3px; background: var(--accent);
  opacity: .75; }
.bar .interval { top: 5px; height: 2px; background: var(--text); }
.bar .reference { top: -3px; bottom: -3px; width: 2px; margin-left: -1px;
  background: var(--reference); }
.badge { display: inline-block; padding: 0 7px; border-radius: 9px; font-size: 12px;
  white-space: nowrap; background: var(--line); color: var(--text); }
.badge.good { background: var(--good-back); color: var(--good); }
.badge.bad { background: var(--bad-back); color: var(--bad); }
.chart { margin: 8px 0; color: var(--text); } .chart svg { width: 100%; height: auto; }
.chart text { font-family: inherit !important; }
.query { border-top: 1px solid var(--line); padding: 12px 0; }
.query.beside { display: grid; grid-template-columns: 150px 1fr; gap: 16px; align-items: start; }
.query p { margin: 0 0 8px; }
.cards { display: grid; grid-template-columns: repeat(6, minmax(0, 1fr)); gap: 10px; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: 6px; font-size: 12px;
  line-height: 1.35; overflow-wrap: anywhere; }
.card.good { border: 2px solid var(--good); padding: 5px; color: var(--good); font-weight: 600; }
.card.missed { border: 2px dashed var(--bad); padding: 5px; }
.card.missed, .query p.missed { color: var(--bad); }
.query p.missed { margin: 2px 0 0; padding-left: 24px; font-size: 14px; }
.card .media, .query .media { display: flex; align-items: center; justify-content: center;
  min-height: 60px; margin-bottom: 4px; }
.media img { max-width: 100%; height: auto; border-radius: 5px; }
.card .media:has(img) { height: 104px; } .card .media img { max-height: 104px; width: auto; }
.sound { width: 100%; } .sound audio { width: 100%; height: 30px; display: block; }
.waveform { width: 100%; height: 40px; display: block; fill: var(--accent); }
ol.answers { margin: 0; padding-left: 24px; font-size: 14px; }
ol.answers li.good { color: var(--good); font-weight: 600; }
@media print { body { background: none; } section { break-inside: avoid; border-color: #ccc; } }
"""

PAGE_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>{{ style }}</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
<p class="subtitle">{{ subtitle }}</p>
{% if sections | length > 1 %}
<nav>
{% for section in sections %}
<a href="#part-{{ loop.index }}">{{ section.title }}</a>
{% endfor %}
</nav>
{% endif %}
{% for section in sections %}
<section id="part-{{ loop.index }}">
<h2>{{ section.title }}</h2>
{% if section.note %}
<p class="note">{{ section.note }}</p>
{% endif %}
{% for block in section.blocks %}
{{ block }}
{% endfor %}
</section>
{% endfor %}
</main>
</body>
</html>
"""
