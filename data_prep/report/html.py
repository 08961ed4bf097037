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

from data_prep.report.style import PAGE_TEMPLATE, STYLE

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


def share_bar(share: float) -> Markup:
    """A bar from 0 to 1, filled to `share`."""
    width = f"{100 * min(1.0, max(0.0, share)):.2f}%"
    return Markup('<div class="bar"><i class="fill" style="width:{}"></i></div>').format(width)


def chips(texts: Sequence[str]) -> Markup:
    """Small labels, one after the other."""
    labels = (badge(text, kind="plain") for text in texts)
    return Markup('<div class="chips">{}</div>').format(Markup("").join(labels))


def folded(summary: str, block: Markup) -> Markup:
    """A block that is shown when its summary is clicked."""
    return Markup("<details><summary>{}</summary>{}</details>").format(summary, block)


def preformatted(text: str) -> Markup:
    """Text whose lines and spaces stay as they are."""
    return Markup("<pre>{}</pre>").format(text)


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
