"""The frame of a report page and its style: light and dark, on screen and on paper."""

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
.card .media:has(> img) { height: 104px; } .card .media > img { max-height: 104px; width: auto; }
.sound { width: 100%; } .sound img { width: 100%; display: block; }
.sound audio { width: 100%; height: 30px; display: block; }
.waveform { width: 100%; height: 40px; display: block; fill: var(--accent); }
ol.answers { margin: 0; padding-left: 24px; font-size: 14px; }
ol.answers li.good { color: var(--good); font-weight: 600; }
.cards.wide { grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); }
.card ul { margin: 4px 0; padding: 0; list-style: none; }
.card li + li { border-top: 1px solid var(--line); margin-top: 3px; padding-top: 3px; }
 .card .faint, td .faint { color: var(--faint); }
.columns .bar { width: 96px; } .histogram { max-width: 510px; }
.chips { display: flex; flex-wrap: wrap; gap: 4px; }
.chips > * { overflow-wrap: anywhere; white-space: normal; }
details { margin: 10px 0 0; } summary { cursor: pointer; color: var(--accent); font-size: 14px; }
pre { overflow-x: auto; font-size: 12px; line-height: 1.4; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.warning { border-left: 3px solid var(--bad); padding-left: 12px; }
.breaks { overflow-wrap: anywhere; }
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
