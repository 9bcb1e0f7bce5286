"""The page of a report: one HTML file with its style sheet, readable in light and dark, narrow and wide."""

from collections.abc import Iterable, Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --bg: #fff; --card: #f7f7f5; --text: #1d1d1b; --soft: #63635e; --rule: #dcdcd6;
  --accent: #0b62a8;
  --s0: #0072b2; --s1: #d55e00; --s2: #00855f;
  --s3: #a3457f; --s4: #a67c00; --s5: #3a8fc7; --s6: #6b4fa0; --s7: #5f6b6d; }
@media (prefers-color-scheme: dark) { :root { --bg: #16171a; --card: #1f2125; --text: #e8e8e4; --soft: #a4a49d; --rule: #373a40;
  --accent: #7db9ec; --s0: #56b4e9; --s1: #ff9450; --s2: #3ac79c;
  --s3: #e08bbd; --s4: #e6b933; --s5: #8fd0f5; --s6: #b49be6; --s7: #b3bcbf; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1360px; padding: 20px 16px 48px; background: var(--bg); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 22px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 32px 0 10px; }
h3 { font-size: 14px; margin: 0 0 4px; display: flex; justify-content: space-between; gap: 10px; flex-wrap: wrap; }
h3 small, p.soft, .soft { color: var(--soft); font-weight: normal; font-size: 13px; }
p { margin: 6px 0; max-width: 80ch; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 130px), 1fr)); gap: 10px; margin: 16px 0; }
.figures div { background: var(--card); border-radius: 8px; padding: 10px 12px; overflow-wrap: anywhere; }
.figures b { display: block; font-size: 19px; font-weight: 600; font-variant-numeric: tabular-nums; }
.figures span { color: var(--soft); font-size: 13px; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 350px), 1fr)); gap: 14px; }
.card { background: var(--card); border-radius: 8px; padding: 12px 12px 8px; min-width: 0; }
.wide { overflow-x: auto; }
.wide svg { min-width: 560px; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 11.5px; font-family: inherit; }
svg text.end { text-anchor: end; } svg text.middle { text-anchor: middle; } svg text.strong { fill: var(--text); }
a { color: var(--accent); }
.halo text { paint-order: stroke; stroke: var(--card); stroke-width: 4px; stroke-linejoin: round; }
.grid { stroke: var(--rule); stroke-width: 1; } .axis { stroke: var(--soft); stroke-width: 1; }
.mark { stroke: var(--soft); stroke-dasharray: 3 3; }
.line { fill: none; stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round; } .faint { opacity: .45; stroke-width: 1.3; }
.dot { fill: var(--c); } .band { fill: var(--c); opacity: .18; } .bar { fill: var(--c); }
.c0 { --c: var(--s0); } .c1 { --c: var(--s1); } .c2 { --c: var(--s2); } .c3 { --c: var(--s3); }
.c4 { --c: var(--s4); } .c5 { --c: var(--s5); } .c6 { --c: var(--s6); } .c7 { --c: var(--s7); }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; list-style: none; margin: 4px 0; padding: 0;
  font-size: 13px; color: var(--soft); }
.legend li { overflow-wrap: anywhere; }
.key { display: inline-block; width: 14px; height: 3px; margin: 0 6px 3px 0; background: var(--c); border-radius: 2px; }
.table { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: 14px; }
th, td { padding: 5px 14px 5px 0; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: top; }
th { font-weight: 600; color: var(--soft); white-space: nowrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.best td { font-weight: 600; }
pre { background: var(--card); border-radius: 8px; padding: 10px 12px; margin: 6px 0; overflow-x: auto; white-space: pre-wrap;
  overflow-wrap: anywhere; font: 13px/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre mark { background: none; color: var(--soft); }
details { margin: 6px 0; } summary { cursor: pointer; color: var(--accent); }
ul.notes { padding-left: 20px; margin: 6px 0; } ul.notes li { overflow-wrap: anywhere; }
@media print { body { max-width: none; } .card, pre { break-inside: avoid; } }
"""


def page(title: str, sections: Iterable[str]) -> str:
    """The whole file. sections: HTML; empty ones are left out."""
    body = "\n".join(section for section in sections if section)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def section(heading: str, *parts: str) -> str:
    """A section with its heading; "" if all parts are empty."""
    body = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{escape(heading)}</h2>\n{body}\n</section>" if body else ""


def card(heading: str, chart: str, *, note: str = "", below: str = "") -> str:
    """A chart with its heading; "" without a chart. note: a few words beside the heading."""
    if not chart:
        return ""
    return f'<div class="card"><h3>{escape(heading)}<small>{escape(note)}</small></h3>{chart}{below}</div>'


def charts(cards: Iterable[str]) -> str:
    """Cards side by side, as many as fit; "" without any."""
    found = [one for one in cards if one]
    return f'<div class="charts">{"".join(found)}</div>' if found else ""


def table(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    numbers: int = 0,
    best: int | None = None,
    links: Sequence[str] = (),
) -> str:
    """A table; "" without rows.

    numbers: columns from this one on are numbers. best: number of the row in bold. links: where the first cell of each
    row leads, "" for nowhere.
    """
    if not rows:
        return ""

    def cells(tag: str, row: Sequence[str], link: str = "") -> str:
        kinds = [' class="number"' if numbers and n >= numbers else "" for n in range(len(row))]
        texts = [escape(text) for text in row]
        if link:
            texts[0] = f'<a href="{escape(link)}">{texts[0]}</a>'
        return "".join(f"<{tag}{kind}>{text}</{tag}>" for kind, text in zip(kinds, texts, strict=True))

    body = ""
    for n, row in enumerate(rows):
        kind = " class=best" if n == best else ""
        body += f"<tr{kind}>{cells('td', row, links[n] if links else '')}</tr>"
    head = f"<thead><tr>{cells('th', heads)}</tr></thead>" if any(heads) else ""
    return f'<div class="table"><table>{head}<tbody>{body}</tbody></table></div>'


def figures(values: dict[str, str]) -> str:
    """Large numbers with what they are, side by side."""
    items = [f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in values.items()]
    return f'<div class="figures">{"".join(items)}</div>' if items else ""


def preformatted(text: str, *, soft: str = "") -> str:
    """Text as it is. soft: what stands before it in a weaker color, such as a prompt."""
    before = f"<mark>{escape(soft)}</mark>" if soft else ""
    return f"<pre>{before}{escape(text)}</pre>"
