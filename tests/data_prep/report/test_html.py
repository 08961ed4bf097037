import re
from pathlib import Path

import jinja2
import numpy as np
import pytest
from markupsafe import Markup

import data_prep.report
from data_prep.report.html import (
    Section,
    chart,
    fact_list,
    interval_bar,
    render,
    render_page,
    sound,
    svg_chart,
    table,
    thumbnail,
)


def test_text_is_escaped_and_blocks_are_not():
    page = render_page(
        "<title>",
        subtitle="a & b",
        sections=[Section("One <1>", [table(["h"], [["<td>"], [Markup("<b>kept</b>")]])])],
    )
    assert "&lt;title&gt;" in page
    assert "a &amp; b" in page
    assert "One &lt;1&gt;" in page
    assert "<td>&lt;td&gt;</td>" in page
    assert "<td><b>kept</b></td>" in page
    assert "&lt;b&gt;" in fact_list({"<b>": 1})


def test_page_with_one_section_has_no_table_of_contents():
    one = [Section("One", [])]
    assert "<nav>" not in render_page("t", subtitle="", sections=one)
    assert '<a href="#part-2">' in render_page("t", subtitle="", sections=one * 2)


def test_chart_is_inline_follows_the_text_colour_and_repeats_itself():
    svgs = []
    for _ in range(2):
        with chart(width=3, height=2) as figure:
            axes = figure.subplots()
            axes.plot([0, 1], [2, 3])
            axes.set_title("a title")
        svgs.append(svg_chart(figure, alt="two points"))
    assert svgs[0] == svgs[1]
    assert "currentColor" in svgs[0]
    assert "a title" in svgs[0]
    assert "http" not in svgs[0]
    assert "#ffffff" not in svgs[0]


def test_picture_keeps_its_shape():
    html = thumbnail(np.zeros((100, 400, 3), dtype=np.uint8), max_side=64, alt='"quoted"')
    assert 'width="64" height="16"' in html
    assert 'src="data:image/jpeg;base64,' in html
    assert "&#34;quoted&#34;" in html


@pytest.mark.parametrize("num_samples", [16_000 * 10, 16_000, 7])
def test_sound_is_cut_and_playable(num_samples):
    waveform = np.sin(np.arange(num_samples) / 20).astype(np.float32)
    html = sound(waveform, sample_rate_hz=16_000, max_seconds=2)
    assert 'src="data:audio/mpeg;base64,' in html
    assert len(html) < 40_000
    assert "nan" not in html


@pytest.mark.parametrize(
    ("value", "low", "high", "expected"),
    [(0.5, 0.4, 0.7, ["50.00%", "40.00%", "30.00%"]), (1.0, 0.9, 1.2, ["100.00%", "90.00%"])],
)
def test_interval_bar_stays_inside_its_frame(value, low, high, expected):
    html = interval_bar(value, low=low, high=high, reference=0.1)
    found = [float(number) for number in re.findall(r"([\d.]+)%", html)]
    assert all(0 <= number <= 100 for number in found)
    for number in expected:
        assert number in html


def test_interval_bar_without_an_interval_has_no_line():
    with_line, without = (
        interval_bar(0.5, low=low, high=high, reference=0.1)
        for low, high in ((0.5, 0.5), (None, None))
    )
    line = '<i class="interval" style="left:50.00%;width:0.00%"></i>'
    assert line in with_line
    assert with_line.replace(line, "") == without


def test_a_package_extends_the_frame_with_templates_of_its_own(tmp_path, monkeypatch):
    templates = tmp_path / "toy_package/templates"
    templates.mkdir(parents=True)
    (tmp_path / "toy_package/__init__.py").touch()
    (templates / "toy.html").write_text(
        '{% extends "base.html" %}{% import "blocks.html" as blocks %}'
        "{% block content %}{{ blocks.paragraph(text) }}{% endblock %}"
    )
    monkeypatch.syspath_prepend(tmp_path)
    page = render("toy_package", "toy.html", title="<t>", subtitle="s", text="<script>")
    assert page.startswith("<!doctype html>")
    assert "<h1>&lt;t&gt;</h1>" in page
    assert "<p>&lt;script&gt;</p>" in page
    with pytest.raises(jinja2.UndefinedError, match="text"):
        render("toy_package", "toy.html", title="t", subtitle="s")


def test_html_stands_in_templates_only():
    for path in Path(data_prep.report.__file__).parent.glob("*.py"):
        assert not re.search(r"</\w+>", path.read_text()), path
