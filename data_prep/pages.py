"""Pages of HTML for the whole project: one style, plots as inline SVG, tables. Nothing is loaded from elsewhere."""

import html
import io
from collections.abc import Container, Iterable, Sequence
from typing import Any

COLOURS = ("#0b6bcb", "#c2410c", "#15803d", "#7e22ce", "#a16207", "#0e7490")
GREY = "#8c959f"

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2328; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; }
h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #d8dee4; padding-bottom: .3rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #eaeef2; }
th:first-child, td:first-child { text-align: left; }
.marked td { background: #fff1e5; font-weight: 600; }
.note { color: #57606a; } svg { max-width: 100%; height: auto; } figure { margin: 0; }
.clips { display: grid; gap: .6rem; align-items: start; margin-bottom: 1.4rem; }
.clips video { width: 100%; image-rendering: pixelated; border-radius: 4px; background: #000; }
.clips figcaption { font-size: .85rem; }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .4em; }
"""


def new_figure(width: float, height: float, columns: int = 1, rows: int = 1) -> tuple[Any, Any]:
    """A matplotlib figure of this size in inches, and its axes [rows, columns]."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    # A dollar sign in a name must not start a formula.
    style = {"svg.fonttype": "none", "svg.hashsalt": "rf_train", "font.size": 9, "text.parse_math": False}
    matplotlib.rcParams.update({**style, "axes.spines.top": False, "axes.spines.right": False})
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(rows, columns, squeeze=False)


def svg(figure: Any) -> str:
    """A matplotlib figure as inline SVG. It uses the page's fonts and has no date, so equal figures give equal text."""
    text = io.StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def html_table(heads: list[str], rows: Sequence[Sequence[str]], marked: Container[int] = ()) -> str:
    """A table; every cell is escaped. `marked`: numbers of rows that stand out. Without heads if there are none."""

    def line(tag: str, cells: Iterable[str], style: str = "") -> str:
        return f"<tr{style}>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line("td", row, ' class="marked"' if n in marked else "") for n, row in enumerate(rows))
    return "<table>" + (line("th", heads) if heads else "") + body + "</table>"


def html_page(title: str, body: str, style: str = "") -> str:
    """A whole page. `title` is escaped, `body` is HTML, `style` is added to the common one."""
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}{style}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'
