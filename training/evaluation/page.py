"""One HTML file out of titled sections: the frame of the report. It loads nothing and runs nothing."""

from collections.abc import Iterable, Sequence
from html import escape

_CSS = """
:root { color-scheme: light dark; --ink: #1d2733; --soft: #5d6b7c; --line: #d9dfe7; --card: #ffffff; --page: #f4f6f9;
  --accent: #b85f0c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e9f0; --soft: #9aa8b8; --line: #344050; --card: #1b232d;
  --page: #12181f; --accent: #f0a04f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 0 0 .6rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 1rem 1.2rem;
  margin-top: 1rem; }
p { margin: .4rem 0; } .soft { color: var(--soft); font-size: .87rem; }
.notice { border-left: 4px solid var(--accent); padding-left: .8rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: .8rem; margin: 1rem 0; }
.tile { border: 1px solid var(--line); border-radius: 6px; padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.5rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .83rem; display: block; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .25rem .5rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; } th:first-child, td:first-child { text-align: left; }
td small { color: var(--soft); } .text th, .text td { text-align: left; }
.text td { white-space: normal; overflow-wrap: anywhere; }
svg { display: block; width: 100%; max-width: 54rem; height: auto; margin: .4rem auto; font-family: inherit; }
svg.narrow { max-width: 32rem; }
details { margin-top: .5rem; } summary { cursor: pointer; color: var(--soft); }
ul { margin: .3rem 0; padding-left: 1.2rem; } code { font-size: .85em; overflow-wrap: anywhere; }
@page { margin: 14mm; }
@media print { body { background: none; font-size: 10pt; } main { max-width: none; padding: 0; }
  svg { max-width: 36rem; }
  section { border: none; padding: .4rem 0; } svg, tr, .tile, h2, h3 { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .wide { overflow: visible; } table { font-size: 8pt; } th, td { padding: .15rem .3rem; } }
@media print and (prefers-color-scheme: dark) {
  :root { color-scheme: light; --ink: #1d2733; --soft: #5d6b7c; --line: #d9dfe7; --card: #fff; } }
"""


def page(title: str, subtitle: str, sections: Iterable[str]) -> str:
    """The whole document; title and subtitle are text, sections are HTML."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_CSS}</style></head>\n<body><main>"
        f'<h1>{escape(title)}</h1><p class="soft">{escape(subtitle)}</p>\n'
        + "\n".join(sections)
        + "\n</main></body></html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A titled section of HTML parts."""
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def paragraph(text: str, kind: str = "soft") -> str:
    """Text, escaped; kind: a class of the style sheet."""
    return f'<p class="{kind}">{escape(text)}</p>'


def subtitle(text: str) -> str:
    """A heading inside a section."""
    return f"<h3>{escape(text)}</h3>"


def tiles(values: Iterable[tuple[str, str, str]]) -> str:
    """Label, figure and what it is to be seen beside, of a few numbers that matter most."""
    inner = "".join(
        f'<div class="tile"><span>{escape(label)}</span><b>{escape(figure)}</b><span>{escape(beside)}</span></div>'
        for label, figure, beside in values
    )
    return f'<div class="tiles">{inner}</div>'


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, is_text: bool = False) -> str:
    """Cells are text; what follows a newline in a cell is set small. is_text: cells are sentences, not numbers."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header) if any(header) else ""
    body = "".join(f"<tr>{''.join(_cell(cell) for cell in row)}</tr>" for row in rows)
    kind = ' class="text"' if is_text else ""
    return f'<div class="wide"><table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(text: str) -> str:
    figure, _, small = text.partition("\n")
    more = f"<br><small>{escape(small)}</small>" if small else ""
    return f"<td>{escape(figure)}{more}</td>"


def folded(summary: str, items: Sequence[str]) -> str:
    """A list to unfold; open if it is short."""
    if not items:
        return paragraph(f"{summary}: none.")
    inner = "".join(f"<li><code>{escape(item)}</code></li>" for item in items)
    is_open = " open" if len(items) <= 10 else ""
    return f"<details{is_open}><summary>{escape(summary)}: {len(items)}</summary><ul>{inner}</ul></details>"
