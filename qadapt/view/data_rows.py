"""Rows of tokens on the screen: what is learned, what is context, what is special; see `data/pieces.py`.

Learned text has its own background, so it reads on light and on dark screens; without colour it stands
between brackets. The text of rows is a stranger's: it never reaches the terminal as anything but text, and
what the screen's encoding lacks is spelled out. Knows no file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rich.console import Console, ConsoleOptions, RenderResult
from rich.style import Style
from rich.text import Text

from qadapt.data.check import ShownRow
from qadapt.data.pieces import Gap, Piece
from qadapt.view.visible import PLAIN_SIGNS, SIGNS, Signs, one_line, visible
from qadapt.view.wrapping import Part, wrapped

LEARNED = Style.parse("black on green")
CONTEXT = Style()
SPECIAL = Style.parse("magenta")
LEARNED_SPECIAL = Style.parse("bold black on cyan")
QUIET = Style.parse("dim")
GAP = Style.parse("dim italic")
_LOW_DIGITS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


class Look(NamedTuple):
    """How rows are drawn here: with colours or brackets, in which encoding."""

    has_colours: bool
    signs: Signs
    encoding: str

    @staticmethod
    def of(console: Console, options: ConsoleOptions) -> Look:
        """That of a console."""
        has_colours = console.color_system is not None and not console.no_color
        return Look(has_colours, PLAIN_SIGNS if options.ascii_only else SIGNS, options.encoding)

    @property
    def brackets(self) -> tuple[str, str]:
        """Around what is learned."""
        return ("[[", "]]") if self.signs is PLAIN_SIGNS else ("⟦", "⟧")

    @property
    def special_brackets(self) -> tuple[str, str]:
        """Around a special token."""
        return ("{", "}") if self.signs is PLAIN_SIGNS else ("⟨", "⟩")

    def writable(self, text: str) -> str:
        """The text with what the encoding lacks spelled out."""
        return text.encode(self.encoding, "backslashreplace").decode(self.encoding)

    def line(self, text: str) -> str:
        """A stranger's text on one line."""
        return self.writable(one_line(text, signs=self.signs))


@dataclass(frozen=True)
class RowView:
    """One row: a line about it, then its tokens."""

    row: ShownRow
    shows_ids: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        look = Look.of(console, options)
        yield row_title(self.row, look)
        yield from wrapped(row_parts(self.row.pieces, look, shows_ids=self.shows_ids), options.max_width)


@dataclass(frozen=True)
class RowsView:
    """Several rows, a legend above them."""

    rows: Sequence[ShownRow]
    shows_ids: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield legend(Look.of(console, options))
        for row in self.rows:
            yield Text()
            yield RowView(row, self.shows_ids)


def row_title(row: ShownRow, look: Look) -> Text:
    """`row 17 · train.jsonl, line 18 · 132 tokens, 40 learned · whole`."""
    dot = " - " if look.signs is PLAIN_SIGNS else " · "
    amounts = f"{row.tokens:,} tokens, {row.supervised_tokens:,} learned"
    text = Text.assemble((f"row {row.number}", "bold"), dot, (look.line(row.place), "bold"), dot, amounts)
    if row.note:
        text.append(dot).append(look.line(row.note), style="yellow")
    return text


def legend(look: Look) -> Text:
    """What the colours or brackets mean, in themselves."""
    if not look.has_colours:
        first, last = look.brackets
        special, end = look.special_brackets
        words = f"{first}learned{last} context {special}special token{end}"
        return Text(f"{words} {look.signs.line_end} line end {look.signs.space} space", style=QUIET)
    return Text.assemble(
        *((" learned ", LEARNED), " ", (" learned, special ", LEARNED_SPECIAL), " "),
        *(("context", CONTEXT), "  ", ("special", SPECIAL), "  "),
        (f"{look.signs.line_end} line end  {look.signs.space} space", QUIET),
    )


def row_parts(pieces: Sequence[Piece | Gap], look: Look, *, shows_ids: bool = False) -> Iterator[Part]:
    """The tokens as styled text, with brackets around what is learned where there are no colours."""
    was_learned = False
    for place, piece in enumerate(pieces):
        is_learned = isinstance(piece, Piece) and piece.is_supervised
        if not look.has_colours and is_learned != was_learned:
            yield look.brackets[0] if is_learned else look.brackets[1], CONTEXT
        was_learned = is_learned
        if isinstance(piece, Gap):
            yield gap_words(piece, look.signs), GAP
        else:
            yield from _piece_parts(pieces, place, look, shows_ids=shows_ids)
    if was_learned and not look.has_colours:
        yield look.brackets[1], CONTEXT


def _piece_parts(pieces: Sequence[Piece | Gap], place: int, look: Look, *, shows_ids: bool) -> Iterator[Part]:
    """One piece; its ids stand behind it, but before its line end."""
    piece = pieces[place]
    assert isinstance(piece, Piece)
    style = _style(piece)
    quiet = QUIET if look.has_colours and not piece.is_supervised else style
    before, after = look.special_brackets if piece.is_special and not look.has_colours else ("", "")
    parts = [
        (look.writable(part), quiet if is_sign else style)
        for part, is_sign in piece_parts(pieces, place, look.signs)
    ]
    line_end = [parts.pop()] if parts and parts[-1][0] == "\n" else []
    yield before, style
    yield from parts
    yield after, style
    if shows_ids:
        yield _ids(piece, look), QUIET if look.has_colours else CONTEXT
    yield from line_end


def _style(piece: Piece) -> Style:
    if piece.is_special:
        return LEARNED_SPECIAL if piece.is_supervised else SPECIAL
    return LEARNED if piece.is_supervised else CONTEXT


def _ids(piece: Piece, look: Look) -> str:
    words = ",".join(map(str, piece.ids))
    return f"({words})" if look.signs is PLAIN_SIGNS else words.translate(_LOW_DIGITS)


def gap_words(gap: Gap, signs: Signs = SIGNS) -> str:
    """`… 1,024 tokens, 12 of them learned, not shown …`."""
    some = 0 < gap.supervised_tokens < gap.tokens
    learned = f", {gap.supervised_tokens:,} of them learned" if some else ""
    kind = " learned" if gap.supervised_tokens == gap.tokens else ""
    return f"{signs.gap} {gap.tokens:,}{kind} tokens{learned} not shown {signs.gap}"


def piece_parts(
    pieces: Sequence[Piece | Gap], place: int, signs: Signs = SIGNS
) -> Iterable[tuple[str, bool]]:
    """The visible parts of one piece, its spaces marked where something else stands beside them."""
    piece = pieces[place]
    assert isinstance(piece, Piece)
    if piece.is_broken:
        yield signs.named(piece.text), True
        return
    yield from visible(
        piece.text,
        starts=_is_edge(pieces, place, -1),
        ends=_is_edge(pieces, place, 1),
        signs=signs,
    )


def _is_edge(pieces: Sequence[Piece | Gap], place: int, side: int) -> bool:
    """Whether a space on that side of a piece decides: at an end, beside a special token or white space."""
    if not 0 <= place + side < len(pieces):
        return True
    piece, other = pieces[place], pieces[place + side]
    if isinstance(other, Gap) or isinstance(piece, Gap):
        return False
    if other.is_special or other.is_supervised != piece.is_supervised:
        return True
    return other.text[-1:].isspace() if side < 0 else other.text[:1].isspace()
