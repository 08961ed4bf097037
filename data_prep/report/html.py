"""Self-contained HTML pages: the frame, building blocks, media and charts.

A page is one file. Images, audio clips and charts are embedded, so that it opens without a network.

    page = render_page("Title", subtitle="...", sections=[Section("Counts", [table(...)])])

All HTML is in Jinja templates, in the folder `templates` of the package that uses them:

    base.html     frame of a page: head, title, table of contents, sections
    blocks.html   macros; the functions below call them, and templates may import them
    style.css     colours and layout, light and dark, on screen and on paper

Templates in another package extend the frame and import the macros by these names. They fill the
blocks `head`, `content` and `scripts` as needed. Example, `eval/report/templates/curves.html`:

    {% extends "base.html" %}
    {% import "blocks.html" as blocks %}
    {% block content %}{{ blocks.table(header, rows, []) }}{% endblock %}

    render("eval.report", "curves.html", title=..., subtitle=..., header=..., rows=...)

Values are escaped unless they are `Markup`. An undefined variable in a template is an error.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

if TYPE_CHECKING:
    from jinja2 import Environment
    from matplotlib.figure import Figure

OWN_PACKAGE = "data_prep.report"
# matplotlib draws text in this color; svg_chart replaces it with the page's text color.
INK = "#010203"
SERIES_COLORS = ("#4c7fe0", "#e0803a", "#2fa37c", "#b667c9", "#d6596b", "#8a8f3c")
CHART_STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "svg.fonttype": "none",  # text is stored as text, in the page's font
    "svg.hashsalt": "isopair",  # equal charts have equal bytes
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
# All browsers play MP3, and it takes a tenth of WAV's bytes.
SOUND_FORMAT = "MP3"
WAVEFORM_COLUMNS = 80


@dataclass(frozen=True)
class Section:
    """A heading and the blocks below it."""

    title: str
    blocks: Sequence[Markup]
    note: str = ""


def render_page(title: str, *, subtitle: str, sections: Sequence[Section]) -> Markup:
    """Renders a whole page, with a table of contents if there are several sections."""
    return render(OWN_PACKAGE, "base.html", title=title, subtitle=subtitle, sections=sections)


def render(template_package: str, name: str, **values: Any) -> Markup:
    """Renders a template with the given values.

    Args:
        template_package: import name of the package whose folder `templates` holds the template.
            Missing templates are looked up in this package.
        name: file name of the template.
        values: variables of the template.

    Raises:
        jinja2.UndefinedError: if the template uses a variable that is missing from `values`.
    """
    return Markup(_environment(template_package).get_template(name).render(values))


@cache
def _environment(template_package: str) -> Environment:
    # Imported here, because most runs of a command do not render a page.
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    packages = dict.fromkeys((template_package, OWN_PACKAGE))
    return Environment(
        loader=ChoiceLoader([PackageLoader(package) for package in packages]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )


def macros(template_package: str, name: str) -> Any:
    """Returns the macros of a template as methods that take values and return `Markup`.

    Args:
        template_package: import name of the package, as in `render`.
        name: file name of the template.
    """
    return _environment(template_package).get_template(name).module


def _block(macro: str, *values: Any) -> Markup:
    return getattr(macros(OWN_PACKAGE, "blocks.html"), macro)(*values)


# ----------------------------------------------------------------------------- text and tables


def paragraph(text: str) -> Markup:
    """Builds a paragraph of plain text."""
    return _block("paragraph", text)


def heading(text: str) -> Markup:
    """Builds a heading inside a section."""
    return _block("heading", text)


def line(text: str) -> Markup:
    """Builds a line of text below or above other blocks."""
    return _block("line", text)


def preformatted(text: str) -> Markup:
    """Builds a block of text that keeps its line breaks and spaces."""
    return _block("preformatted", text)


def breakable(text: str) -> Markup:
    """Builds text of any language and direction that may wrap inside words."""
    return _block("breakable", text)


def code(text: str) -> Markup:
    """Builds text in a monospaced font, such as a checksum."""
    return _block("code", text)


def warning(title: str, text: str) -> Markup:
    """Builds a paragraph that stands out, with its title in bold."""
    return _block("warning", title, text)


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str | Markup]],
    *,
    numeric: Collection[int] = (),
) -> Markup:
    """Builds a table.

    Args:
        header: title of each column.
        rows: cells of each row, one per column.
        numeric: indices of the right-aligned columns.
    """
    return _block("table", header, rows, numeric)


def fact_list(facts: Mapping[str, object]) -> Markup:
    """Builds a two-column list of names and values."""
    return _block("fact_list", facts)


def badge(text: str, *, kind: str) -> Markup:
    """Builds a small label; `kind` is "good", "bad" or "plain"."""
    return _block("badge", text, kind)


def chips(texts: Sequence[str]) -> Markup:
    """Builds a row of small labels."""
    return _block("chips", texts)


# -------------------------------------------------------------------------------------- layout


def folded(summary: str, block: Markup) -> Markup:
    """Builds a block that opens when the reader clicks its summary."""
    return _block("folded", summary, block)


def columns(blocks: Sequence[Markup]) -> Markup:
    """Builds a row of blocks, which wraps in a narrow window."""
    return _block("columns", blocks)


def media_frame(media: Markup) -> Markup:
    """Builds a box that centers an image or player."""
    return _block("media_frame", media)


def narrow(block: Markup) -> Markup:
    """Limits the width of a block."""
    return _block("narrow", block)


# ------------------------------------------------------------------------------- bars and media


def fraction_bar(fraction: float) -> Markup:
    """Builds a bar from 0 to 1, filled up to `fraction`."""
    return _block("fraction_bar", _percent(_clamp(fraction)))


def interval_bar(
    value: float, *, low: float | None, high: float | None, reference: float
) -> Markup:
    """Builds a bar from 0 to 1, filled up to `value`, with an interval and a reference mark.

    Args:
        value: from 0 to 1.
        low: start of the interval; None: no interval.
        high: end of the interval; None: no interval.
        reference: position of the mark.
    """
    bounds = None
    if low is not None and high is not None:
        low, high = _clamp(low), _clamp(high)
        bounds = (_percent(low), _percent(high - low))
    return _block("interval_bar", _percent(_clamp(value)), bounds, _percent(_clamp(reference)))


def _clamp(fraction: float) -> float:
    return min(1.0, max(0.0, fraction))


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f}%"


def data_uri(content: bytes, *, media_type: str) -> str:
    """Returns a data URI that holds the bytes of a file."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"


def thumbnail(image: np.ndarray, *, max_side: int = 128, alt: str = "") -> Markup:
    """Builds a thumbnail; images smaller than half of `max_side` are enlarged.

    Args:
        image: uint8 [H, Wd, 3].
        max_side: width or height of the thumbnail in pixels, whichever is larger.
        alt: description for readers who cannot see the image.
    """
    from PIL import Image

    small = Image.fromarray(image)
    small.thumbnail((max_side, max_side))
    enlargement = max_side // max(small.size)
    if enlargement > 1:
        size = (small.width * enlargement, small.height * enlargement)
        small = small.resize(size, Image.Resampling.NEAREST)
    file = io.BytesIO()
    small.save(file, format="JPEG", quality=82)
    uri = data_uri(file.getvalue(), media_type="image/jpeg")
    return _block("thumbnail", uri, *small.size, alt)


def sound(waveform: np.ndarray, *, sample_rate_hz: int, max_seconds: float = 4.0) -> Markup:
    """Builds a player with the outline of a waveform.

    Args:
        waveform: float32 [samples], mono, in [-1, 1].
        sample_rate_hz: sample rate, which MP3 must support, such as 16000.
        max_seconds: length of the excerpt, from the start of the waveform.
    """
    import soundfile

    clip = waveform[: round(max_seconds * sample_rate_hz)]
    file = io.BytesIO()
    soundfile.write(file, clip, sample_rate_hz, format=SOUND_FORMAT)
    uri = data_uri(file.getvalue(), media_type="audio/mpeg")
    return _block("sound", waveform_outline(clip), uri)


def waveform_outline(waveform: np.ndarray) -> Markup:
    """Draws the outline of a waveform, float32 [samples], as wide as its container."""
    parts = np.array_split(np.abs(waveform), WAVEFORM_COLUMNS)
    peaks = np.array([part.max(initial=0.0) for part in parts])
    heights = 19 * peaks / max(float(peaks.max()), 1e-6)
    upper = [f"{x},{20 - height:.1f}" for x, height in enumerate(heights)]
    lower = [f"{x},{20 + height:.1f}" for x, height in enumerate(heights)]
    return _block("waveform", WAVEFORM_COLUMNS - 1, " ".join(upper + lower[::-1]))


# -------------------------------------------------------------------------------------- charts


@contextmanager
def chart(*, width: float, height: float) -> Iterator[Figure]:
    """Opens an empty figure in the page's style, to draw on and pass to `svg_chart`.

    Args:
        width: width in inches.
        height: height in inches.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(CHART_STYLE):
        yield Figure(figsize=(width, height), layout="constrained")


def svg_chart(figure: Figure, *, alt: str) -> Markup:
    """Builds inline SVG from a figure, with the page's text color and no background."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    file = io.StringIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with rc_context(CHART_STYLE):
        FigureCanvasSVG(figure).print_svg(file, metadata=no_metadata)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    # HTML needs no XML namespaces, and a check for external links would find them.
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    return _block("svg_chart", Markup(svg.replace(INK, "currentColor")), alt)
