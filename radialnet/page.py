"""Pieces of a page of HTML that needs nothing but itself: no server, network or script. Plain text in, escaped."""

from collections.abc import Iterable, Sequence
from html import escape

from radialnet.routes import DOCUMENT, ShownToken

# What the colour of the deepest token covers of the background: text can be read on it in light and in dark mode.
_MOST = 0.65
# Letters of a cell that is not to be folded to the width of a word.
_LONG = 40

_LIGHT = """color-scheme: light; --page: #ffffff; --ink: #1b1e23; --faint: #5a616b; --line: #d3d7dd; --mark: #fff0c2;
  --warn: #a01c1c; --rgb: 26 95 180; --series-0: #1f77b4; --series-1: #c44f00; --series-2: #2a8c3f; --series-3: #b3369b;
  --series-4: #8c6d1f; --series-5: #6b6b6b;"""
_DARK = """color-scheme: dark; --page: #15181d; --ink: #e8eaed; --faint: #a7aeb8; --line: #3a4049; --mark: #4a3d12;
  --warn: #ff9c94; --rgb: 76 143 230; --series-0: #62b0ea; --series-1: #ff9447; --series-2: #63c978;
  --series-3: #e884d3; --series-4: #d8b45a; --series-5: #b0b0b0;"""
_STYLE = f""":root {{ {_LIGHT} --amount: rgb(var(--rgb)); }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}"""
_STYLE += """
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; } h2 { font-size: 1.25rem; margin: 2rem 0 .5rem;
  border-top: 1px solid var(--line); padding-top: 1rem; } h3 { font-size: 1rem; margin: 1rem 0 .25rem; }
p { margin: .5rem 0; max-width: 60rem; } .faint, figcaption { color: var(--faint); } .warn { color: var(--warn); }
.side-by-side { display: grid; gap: 1rem 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, var(--least)), 1fr)); }
.side-by-side > * { min-width: 0; }
figure { margin: .5rem 0; } figcaption { font-size: .9rem; }
svg { display: block; width: 100%; height: auto; max-width: calc(1.45 * var(--width)); }
svg * { stroke-linejoin: round; stroke-linecap: butt; } svg text { fill: currentColor; }
.missing { border-left: 3px solid var(--faint); padding-left: .75rem; color: var(--faint); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; margin: .5rem 0;
  font-variant-numeric: tabular-nums; } caption { text-align: left; color: var(--faint); }
th, td { text-align: left; vertical-align: top; padding: .2rem .75rem .2rem 0; border-bottom: 1px solid var(--line);
  min-width: 3rem; max-width: 30rem; overflow-wrap: break-word; }
td.long { min-width: 14rem; } th { font-weight: 600; } tr.marked { background: var(--mark); }
details { margin: .5rem 0; } summary { cursor: pointer; }
.tokens { font: .95rem/1.9 ui-monospace, monospace; white-space: pre-wrap; border: 1px solid var(--line);
  padding: .5rem .75rem; max-width: none; } .tokens span { border-radius: 2px; padding: .1em 0; margin-right: 1px; }
.tokens sub { display: none; font-size: .65em; line-height: 1; color: var(--ink); user-select: none; }
input.numbers:checked ~ .tokens sub { display: inline; }
.legend span { padding: .1em .6em; margin-right: .35em; border-radius: 2px; border: 1px solid var(--line); }
@media print { * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } figure, tr { break-inside: avoid; }
  .side-by-side { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .side-by-side > :only-child { grid-column: 1 / -1; } h2, h3 { break-after: avoid; } .tokens sub { display: inline; } }
"""


def page(title: str, body: Iterable[str], max_depth: int) -> str:
    """A whole page.

    Args:
        body: HTML.
        max_depth: the depth that is darkest in `tokens` and `depth_legend`.
    """
    depths = "".join(
        f".d{depth} {{ background: rgb(var(--rgb) / {_MOST * depth / max(max_depth, 1):.3f}); }}\n"
        for depth in range(max_depth + 1)
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}{depths}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{escape(title)}</h1>\n" + "\n".join(body) + "\n</main>\n</body>\n</html>\n"
    )


def heading(text: str, level: int = 2) -> str:
    return f"<h{level}>{escape(text)}</h{level}>"


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph; `kind` is empty, `faint`, `missing` or `warn`."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def side_by_side(parts: Iterable[str], least: float = 24) -> str:
    """Pieces beside each other, at least so many letters' heights wide, or below each other where there is no room."""
    return (
        f'<div class="side-by-side" style="--least: {least:g}rem">'
        + "".join(f"<div>{part}</div>" for part in parts)
        + "</div>"
    )


def details(summary: str, *parts: str) -> str:
    """What is shown when it is asked for."""
    return f"<details><summary>{escape(summary)}</summary>{''.join(parts)}</details>"


def table(header: Sequence[str], rows: Iterable[Sequence], marked: Iterable[int] = ()) -> str:
    """A table whose first column names its rows. None is told as a dash.

    Args:
        marked: numbers of rows to set off, by a sign before their name as well.
    """
    marked, lines = set(marked), []
    for number, row in enumerate(rows):
        name, *cells = ("–" if cell is None else escape(str(cell)) for cell in row)
        is_marked = number in marked
        lines.append(
            f'<tr{" class=marked" if is_marked else ""}><th scope="row">{"≠ " if is_marked else ""}{name}</th>'
            + "".join(f"<td{' class=long' if len(cell) > _LONG else ''}>{cell}</td>" for cell in cells)
            + "</tr>"
        )
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    # What is wider than a phone is scrolled by itself, by the keyboard too.
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="table"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def tokens(shown: Sequence[ShownToken], name: str) -> str:
    """A text whose tokens are coloured by their depth; a box is there to be ticked for the numbers.

    Args:
        name: of the box, unlike any other id of the page.
    """
    # A document begins on a line of its own.
    spans = (("\n" if number and token.text == DOCUMENT else "") + _span(token) for number, token in enumerate(shown))
    return (
        f'<div><input type="checkbox" class="numbers" id="{name}"> <label for="{name}">depth of each token as a number'
        f'</label><p class="tokens">{"".join(spans)}</p></div>'
    )


def _span(token: ShownToken) -> str:
    """A token, its ends of lines to be seen; its depth stands before the last of them, not on the next line."""
    before, end, after = token.text.rpartition("\n")
    if not end:
        before, after = after, ""
    before = escape(before).replace("\n", "↵\n") + ("↵" if end else "")
    title = escape(f"{_quoted(token.text)}: depth {token.depth}, layers {token.way}")
    return f'<span class="d{token.depth}" title="{title}">{before}<sub>{token.depth}</sub>{end}{escape(after)}</span>'


def depth_legend(max_depth: int) -> str:
    """What the colours of `tokens` mean."""
    steps = "".join(f'<span class="d{depth}">{depth}</span>' for depth in range(max_depth + 1))
    return f'<p class="legend">Executed layers: {steps}</p>'


def token_table(shown: Sequence[ShownToken]) -> str:
    rows = ((number, _quoted(token.text), token.depth, token.way) for number, token in enumerate(shown))
    return table(("number", "token", "depth", "layers taken"), rows)


def _quoted(text: str) -> str:
    return "‘" + text.replace("\n", "\\n").replace("\t", "\\t") + "’"
