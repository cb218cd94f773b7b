"""What `qadapt data check` says, as one HTML page that stands alone: no script, nothing fetched.

Every word that is not ours is escaped, and what would steer a screen is named (`visible.py`); the page's own
policy forbids whatever might slip through. Each token shows its id under the pointer, or all of them by the
box on top. Knows no command and no file.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from qadapt.data.check import DataReport, ShownRow
from qadapt.data.pieces import Gap, Piece
from qadapt.view.data_report import bin_names, headline, limit_place, report_lines, verdict
from qadapt.view.data_rows import gap_words, piece_parts
from qadapt.view.visible import one_line

_STYLE = """
:root{color-scheme:light dark;--back:#fff;--ink:#1f2937;--soft:#6b7280;--line:#d1d5db;--panel:#f9fafb;
--learn:#bbf7d0;--learn2:#86efac;--special:#a21caf;--ends:#67e8f9;--bar:#0891b2;--limit:#b91c1c;--warn:#92400e}
@media (prefers-color-scheme:dark){:root{--back:#111827;--ink:#f3f4f6;--soft:#9ca3af;--line:#374151;
--panel:#1f2937;--learn:#14532d;--learn2:#166534;--special:#f0abfc;--ends:#155e75;--bar:#22d3ee;
--limit:#f87171;--warn:#fcd34d}}
body{background:var(--back);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif;
max-width:70rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}h3{font-size:1rem;margin:1.5rem 0 .3rem}
h3 span{font-weight:400;color:var(--soft)}.soft,dt{color:var(--soft)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem 1rem;margin:0}
dd{margin:0;overflow-wrap:anywhere}
.bars{display:grid;grid-template-columns:max-content max-content 1fr;gap:.1rem .8rem;align-items:center}
.bars .n{text-align:right;font-variant-numeric:tabular-nums}.bars .b{background:var(--bar);height:.9rem;
min-width:1px}.bars .o{background:var(--warn)}.limit{grid-column:1/-1;border-top:2px dashed var(--limit);
color:var(--limit);font-size:.85rem}
.row{white-space:pre-wrap;overflow-wrap:anywhere;font:13px/1.7 ui-monospace,Menlo,Consolas,monospace;
background:var(--panel);border:1px solid var(--line);border-radius:.4rem;padding:.6rem .8rem;margin:0}
.l{background:var(--learn)}.l:nth-child(even){background:var(--learn2)}.x{color:var(--special)}
.l.x{background:var(--ends);color:var(--ink);font-weight:600}.row span:hover{outline:1px solid var(--ink)}
.row i{font-style:normal;opacity:.55}.gap{color:var(--soft);font-style:italic}
#ids:checked~main .row span[data-id]::after{content:attr(data-id);font-size:.65em;vertical-align:sub;
opacity:.7;margin:0 .15em}
.finding{border-left:3px solid var(--warn);padding-left:.7rem;margin:.5rem 0}.finding b{font-weight:600}
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def data_page(report: DataReport) -> str:
    """The report as one page."""
    title = _safe(headline(report))
    return "\n".join(
        (
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width,initial-scale=1">',
            f"<title>{title}</title><style>{_STYLE}</style></head><body>",
            f"<h1>{title}</h1>",
            '<input type="checkbox" id="ids"><label for="ids"> show the id of every token</label>',
            "<main>",
            *_findings(report),
            "<h2>The rows in numbers</h2><dl>",
            *(f"<dt>{_safe(name)}</dt><dd>{_safe(words)}</dd>" for name, words in report_lines(report)),
            "</dl>",
            "<h2>Lengths in tokens</h2>",
            *_bars(report),
            "<h2>Rows as the model sees them</h2>",
            '<p class="row"><span class="l">learned</span> <span class="l x">learned, special token</span> '
            'context <span class="x">special token</span> <i>↵</i> line end <i>·</i> space</p>',
            *(line for row in report.examples for line in _row(row)),
            "</main></body></html>\n",
        )
    )


def _safe(text: str) -> str:
    return escape(one_line(text))


def _findings(report: DataReport) -> Iterator[str]:
    yield f"<p><b>{_safe(verdict(report.findings).plain.replace('see above', 'see'))}</b></p>"
    for finding in report.findings:
        yield f'<p class="finding"><b>{_safe(finding.message)}</b><br>{_safe(finding.cure)}</p>'


def _bars(report: DataReport) -> Iterator[str]:
    drawn = report.histogram
    most = max(drawn.counts) or 1
    place = limit_place(report)
    yield '<div class="bars">'
    for number, (name, count) in enumerate(zip(bin_names(drawn), drawn.counts, strict=True)):
        over = " o" if place is not None and number >= place else ""
        stroke = f'<div class="b{over}" style="width:{count / most:.1%}"></div>' if count else "<div></div>"
        yield f'<div class="n">{name}</div><div class="n soft">{count:,}</div>{stroke}'
        if place is not None and number + 1 == place:
            yield f'<div class="limit">data.length {report.length:,}</div>'
    yield "</div>"
    if place is None:
        yield f'<p class="soft">data.length {report.length:,} is beyond the longest row.</p>'


def _row(row: ShownRow) -> Iterator[str]:
    note = f" · {_safe(row.note)}" if row.note else ""
    amounts = f"{row.tokens:,} tokens, {row.supervised_tokens:,} learned{note}"
    yield f"<h3>row {row.number} · {_safe(row.place)} <span>· {amounts}</span></h3>"
    spans = (_span(row, place, piece) for place, piece in enumerate(row.pieces))
    yield f'<p class="row">{"".join(spans)}</p>'


def _span(row: ShownRow, place: int, piece: Piece | Gap) -> str:
    if isinstance(piece, Gap):
        return f'<span class="gap">{escape(gap_words(piece))}</span>'
    kinds = " ".join(("l",) * piece.is_supervised + ("x",) * piece.is_special)
    ids = " ".join(map(str, piece.ids))
    inside = "".join(
        f"<i>{escape(part)}</i>" if is_sign else escape(part)
        for part, is_sign in piece_parts(row.pieces, place)
    )
    words = inside.removesuffix("\n")  # the id stands before the line end
    named = f' class="{kinds}"' if kinds else ""
    return f'<span{named} data-id="{ids}" title="{ids}">{words}</span>{inside[len(words) :]}'
