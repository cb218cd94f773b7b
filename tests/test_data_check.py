"""What `qadapt data` shows of rows: whole characters, honest numbers, and nothing that steers a screen."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from template_families import family_tokenizer
from transformers import PreTrainedTokenizerFast

from qadapt.cli.output_file import check_place, write_whole
from qadapt.data.batches import micro_batches
from qadapt.data.check import (
    DataReport,
    Finding,
    Forecast,
    Histogram,
    ShownRow,
    histogram,
    length_facts,
    occurrences,
    step_layout,
)
from qadapt.data.order import Order
from qadapt.data.pieces import Alphabet, Gap, Piece, byte_names, row_pieces
from qadapt.data.rows import RowSet
from qadapt.data.step_sample import StepSample
from qadapt.data.tokens import Tokens, tokens_of
from qadapt.errors import BadOutput, BadRecipe
from qadapt.hardware.cards import find_card
from qadapt.plan import speed
from qadapt.plan.setting import Setting
from qadapt.running.data_check import step_seconds
from qadapt.shape import find_shape
from qadapt.view.data_page import data_page
from qadapt.view.data_report import DataReportView, limit_place
from qadapt.view.data_rows import RowsView
from qadapt.view.visible import PLAIN_SIGNS, one_line, visible

STRANGE = "Hé 👩‍👩‍👧 日本語の文章\t x  y\r\n漢 ‏ok \x1b[31m"
FAMILIES = ("llama2", "llama3_1", "gemma2")
"""The three structures of tokenizers: pieces with a blank before, bytes, pieces as the text stands."""


def alphabet(tokenizer: PreTrainedTokenizerFast) -> Alphabet:
    backend = tokenizer.backend_tokenizer
    return Alphabet(
        lambda ids: backend.decode(list(ids), skip_special_tokens=False),
        frozenset(tokenizer.added_tokens_decoder),
        lambda token: str(backend.id_to_token(token)),
    )


def row_of(tokenizer: PreTrainedTokenizerFast, text: str, learned_from: int = 0) -> Tokens:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokens_of(ids, [place >= learned_from for place in range(len(ids))], place="rows.jsonl, line 1")


def texts(pieces: Sequence[Piece | Gap]) -> str:
    """All text but that of Llama 2's first token, a blank that decoding takes off again."""
    return "".join(piece.text for piece in pieces if isinstance(piece, Piece)).removeprefix("▁")


def ids_of(pieces: Sequence[Piece | Gap]) -> list[int]:
    return [token for piece in pieces if isinstance(piece, Piece) for token in piece.ids]


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_are_whole_characters_and_every_token_is_in_one(family: str) -> None:
    tokenizer = family_tokenizer(family)
    row = row_of(tokenizer, STRANGE)
    pieces = row_pieces(row, alphabet(tokenizer))
    assert texts(pieces).strip() == STRANGE.strip()
    assert ids_of(pieces) == row.ids.tolist()
    assert "�" not in texts(pieces)
    assert any(len(piece.ids) > 1 for piece in pieces if isinstance(piece, Piece)), "no character was split"


@given(text=st.text(max_size=60), learned_from=st.integers(0, 40))
def test_any_text_comes_back_from_its_pieces(text: str, learned_from: int) -> None:
    tokenizer = family_tokenizer("llama3_1")
    row = row_of(tokenizer, text, learned_from)
    pieces = row_pieces(row, alphabet(tokenizer))
    assert ids_of(pieces) == row.ids.tolist()
    if not any(isinstance(piece, Gap) or piece.is_broken for piece in pieces):
        assert texts(pieces) == text


def test_bytes_that_are_no_character_are_named() -> None:
    tokenizer = family_tokenizer("llama3_1")
    ids = row_of(tokenizer, "漢").ids.tolist()
    assert len(ids) == 3
    (letter,) = row_of(tokenizer, "a").ids.tolist()
    row = tokens_of([*ids[:2], letter, ids[0]], [False] * 4, place="")
    broken = row_pieces(row, alphabet(tokenizer))
    assert [(piece.text, piece.is_broken) for piece in broken if isinstance(piece, Piece)] == [
        ("e6", True), ("bc", True), ("a", False), ("e6", True),
    ]  # fmt: skip


def test_a_character_that_is_learned_in_part_is_named_by_its_bytes() -> None:
    tokenizer = family_tokenizer("llama3_1")
    pieces = row_pieces(row_of(tokenizer, "漢", learned_from=1), alphabet(tokenizer))
    assert [piece.is_supervised for piece in pieces if isinstance(piece, Piece)] == [False, True, True]


def test_both_spellings_of_bytes_are_read() -> None:
    assert byte_names("<0xE2>") == "e2"
    assert byte_names("âľ") == "e2 9c"
    assert byte_names("▁日") == "▁日"


def test_special_tokens_are_told_from_text_that_looks_like_them() -> None:
    tokenizer = family_tokenizer("llama3_1")
    special = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    ids = [*row_of(tokenizer, "a").ids.tolist(), special]
    pieces = row_pieces(tokens_of(ids, [True, True], place=""), alphabet(tokenizer))
    assert [(piece.text, piece.is_special) for piece in pieces if isinstance(piece, Piece)] == [
        ("a", False), ("<|eot_id|>", True),
    ]  # fmt: skip


def test_the_first_token_is_never_shown_as_learned() -> None:
    tokenizer = family_tokenizer("llama3_1")
    first, *_, last = row_pieces(row_of(tokenizer, "some words here"), alphabet(tokenizer))
    assert isinstance(first, Piece)
    assert isinstance(last, Piece)
    assert (first.is_supervised, last.is_supervised) == (False, True)


@pytest.mark.parametrize("turns", [1, 3, 60])
def test_a_long_row_keeps_the_edges_of_every_turn_and_counts_the_rest(turns: int) -> None:
    tokenizer = family_tokenizer("llama3_1")
    ids = row_of(tokenizer, "漢字 and words " * 40 * turns).ids
    supervised = np.arange(len(ids)) * 2 * turns // len(ids) % 2 == 1
    pieces = row_pieces(Tokens(ids, supervised, ""), alphabet(tokenizer), most=100)
    shown, gaps = ids_of(pieces), [piece for piece in pieces if isinstance(piece, Gap)]
    assert len(shown) + sum(gap.tokens for gap in gaps) == len(ids)
    learned = sum(len(piece.ids) for piece in pieces if isinstance(piece, Piece) and piece.is_supervised)
    assert learned + sum(gap.supervised_tokens for gap in gaps) == supervised[1:].sum()
    assert len(shown) <= 220
    assert shown[0] == ids[0]
    assert shown[-1] == ids[-1]
    hidden = [place for place, piece in enumerate(pieces) if isinstance(piece, Gap)]
    beside = [pieces[place + side] for place in hidden for side in (-1, 1)]
    assert not any(isinstance(piece, Piece) and piece.is_broken for piece in beside), "a gap cuts a character"


def test_a_histogram_counts_every_row_once() -> None:
    lengths = np.array([1, 1, 8, 9, 100, 3000])
    drawn = histogram(lengths)
    assert drawn.width == 256
    assert drawn.ranges[0] == (1, 256)
    assert drawn.counts[0] == 5
    assert sum(drawn.counts) == 6
    assert drawn.ranges[-1][1] >= 3000
    assert histogram(np.array([5, 6])).counts == (0, 0, 0, 0, 1, 1)


def test_lengths_are_said_by_values_that_occur() -> None:
    facts = length_facts(np.array([2, 4, 10]))
    assert (facts.shortest, facts.median, facts.longest) == (2, 4, 10)
    assert facts.mean == pytest.approx(16 / 3)
    assert facts.ninety_fifth == 10


def test_occurrences_are_counted_in_every_row() -> None:
    rows = [tokens_of([1, 7, 7], [0, 0, 1], place=""), tokens_of([9, 7], [0, 1], place="")]
    assert occurrences(rows, [7, 9, 3]) == {7: 3, 9: 1, 3: 0}


def sample_of(lengths: Sequence[int], *, rows_per_step: int) -> StepSample:
    rows = RowSet([tokens_of([1] * length, [1] * length, place="") for length in lengths])
    order = Order(rows.lengths, rows_per_step=rows_per_step, kind="given")
    return StepSample(rows, order, steps=len(lengths) // rows_per_step)


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (5, 2), (7, 7), (6, 3)])
def test_padding_is_what_micro_batches_would_have(rows: int, size: int) -> None:
    lengths = np.random.default_rng(0).integers(2, 50, 4 * rows).tolist()
    layout = step_layout(sample_of(lengths, rows_per_step=rows), micro_batch=size, longest=max(lengths))
    computed = tokens = passes = 0
    for first in range(0, len(lengths), rows):
        step = [tokens_of([1] * length, [1] * length, place="") for length in lengths[first : first + rows]]
        made = micro_batches(step, size=size, pad_id=0)
        passes += len(made)
        computed += sum(each.input_ids.numel() for each in made)
        tokens += sum(each.tokens for each in made)
    assert layout.steps == 4
    assert layout.padded_passes == passes / 4
    assert layout.padding_share == pytest.approx(1 - tokens / computed, abs=1e-12)
    assert layout.packed_passes <= layout.padded_passes
    room = layout.packed_passes * 4 * layout.capacity_tokens
    assert layout.packed_share == pytest.approx(tokens / room, abs=1e-12)


def test_the_time_of_rows_of_one_length_is_what_the_plan_says_of_such_rows() -> None:
    shape, card = find_shape("Llama-3.1-8B"), find_card("RTX 4090")
    setting = Setting(rows=3, length=64, supervised_share=63 / 64)
    sample = sample_of([64] * 16, rows_per_step=8)
    expected = speed.step_seconds(shape, setting, rows_per_step=8, card=card)
    assert step_seconds(shape, setting, sample, card=card) == pytest.approx(expected, rel=0.02)
    assert step_seconds(shape, setting, sample, card=None) is None
    packed = step_seconds(shape, replace(setting, packed=True), sample, card=card)
    assert packed is not None
    assert expected is not None
    assert packed <= expected * 1.02


def test_a_known_time_is_said_for_the_whole_run() -> None:
    forecast = Forecast("RTX 4090", 2**30, 2**33, 30.0)
    said = " ".join(printed(DataReportView(replace(report(), forecast=forecast)), width=200).split())
    assert "about 16 min 00 s, 30 s a step" in said


def test_what_prints_nothing_or_steers_is_named() -> None:
    said = one_line("a\x1b[31m\x07\u202e\u200b\x9b\ufeff\U000e0041\x7f")
    assert said == "a‹1b›[31m‹07›‹202e›‹200b›‹9b›‹feff›‹e0041›‹7f›"
    assert one_line("👩‍👩‍👧 é") == "👩‍👩‍👧 é"


def test_white_space_is_seen_where_it_decides() -> None:
    parts = [part for part, is_sign in visible("a b  c \n\td\r\n", signs=PLAIN_SIGNS) if is_sign]
    assert parts == ["__", "_", "\\n", "\\t", "<0d>", "\\n"]
    assert [part for part, is_sign in visible(" a ", starts=True) if is_sign] == ["·"]


@given(text=st.text(alphabet=st.characters(), max_size=80))
def test_nothing_in_a_text_reaches_the_terminal_as_a_command(text: str) -> None:
    said = "".join(part for part, _ in visible(text))
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]", said)
    assert said.count("\n") == text.count("\n")


EVIL = "[bold]x[/bold] <script>alert(1)</script> &amp; \x1b]0;title\x07 \"'"


def shown_row(*, note: str = "") -> ShownRow:
    pieces = (
        Piece("<|user|>", (5,), is_special=True),
        Piece(EVIL, (6, 7)),
        Piece("\n", (8,)),
        Piece(" yes", (9,), is_supervised=True),
        Gap(1024, 1024),
        Piece("e2", (10,), is_supervised=True, is_broken=True),
        Piece("<|end|>", (11,), is_supervised=True, is_special=True),
    )
    return ShownRow(17, f"train{EVIL}.jsonl, line 18", 1031, 1027, pieces, note)


def report(*, length: int = 128, findings: tuple[Finding, ...] = (), packed: bool = False) -> DataReport:
    lengths = np.arange(1, 129)
    return DataReport(
        name="mine",
        model="smollm2-135m",
        length=length,
        rows=128,
        held_out_rows=2,
        tokens=int(lengths.sum()),
        supervised_tokens=2000,
        lengths=length_facts(lengths),
        histogram=histogram(lengths),
        layout=step_layout(sample_of(lengths.tolist(), rows_per_step=8), micro_batch=2, longest=128),
        pass_rows=128,
        pass_tokens=int(lengths.sum()),
        rows_per_step=8,
        steps=32,
        forecast=Forecast("this CPU", 2**30, 2**33, None, "nobody has measured this device"),
        is_packed=packed,
        duplicates=3,
        formats={"messages": 130},
        cut={"turns": 4, "inside": 1},
        left_out={"truncated": 2},
        prompt=(("template", "the model's own"),),
        notes={"control tokens": 2},
        new_tokens={"<call>": 12, "<never>": 0},
        findings=findings,
        examples=(shown_row(note="cut after a whole turn"),),
    )


def printed(
    thing: object, *, width: int = 80, colours: bool = False, encoding: str = "utf-8", **options: bool
) -> str:
    binary = io.BytesIO()
    file = io.TextIOWrapper(binary, encoding=encoding, newline="\n")
    console = Console(
        file=file, width=width, force_terminal=colours, color_system="standard" if colours else None,
        highlight=False, legacy_windows=False, **options,
    )  # fmt: skip
    console.print(thing)
    file.flush()
    return binary.getvalue().decode(encoding)


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252"])
def test_the_report_fits_any_screen_and_any_encoding(width: int, encoding: str) -> None:
    finding = Finding("Something with 日本語 is off.", "Do this.")
    said = printed(
        DataReportView(report(findings=(finding,)), shows_ids=True), width=width, encoding=encoding
    )
    assert max(len(line) for line in said.splitlines()) <= width
    assert "1 problem" in said
    assert "Do this." in said
    assert "\x1b" not in said
    assert "\x07" not in said


def test_without_colour_brackets_say_what_is_learned() -> None:
    said = printed(RowsView([shown_row()]), width=200)
    assert "⟨<|user|>⟩" in said
    assert "⟦·yes⟧… 1,024 learned tokens not shown …⟦‹e2›⟨<|end|>⟩⟧" in said
    assert "[bold]x[/bold]" in said, "text of rows is no markup"
    assert "‹1b›]0;title‹07›" in said
    plain = printed(RowsView([shown_row()]), width=200, encoding="ascii")
    assert "[[_yes" in plain
    assert "{<|end|>}]]" in plain


def test_a_terminal_that_wants_no_colours_gets_brackets() -> None:
    assert "⟦·yes⟧" in printed(RowsView([shown_row()]), width=200, colours=True, no_color=True)


def test_with_colour_only_styles_are_escape_sequences() -> None:
    said = printed(RowsView([shown_row()], shows_ids=True), width=200, colours=True)
    assert re.findall("\x1b[^[]", said) == []
    assert "30;42m·\x1b" in said
    assert re.sub("\x1b\\[[0-9;]*m", "", said).isprintable() is False  # line ends remain
    assert not re.search("[\x00-\x09\x0b-\x1f]", re.sub("\x1b\\[[0-9;]*m", "", said))


@given(
    text=st.text(alphabet="a é漢👩\u200d👧🏽\ufe0f\n", max_size=60),
    width=st.integers(10, 30),
    every=st.integers(1, 3),
)
def test_no_character_is_lost_where_lines_end(text: str, width: int, every: int) -> None:
    parts = [text[start : start + every] for start in range(0, len(text), every)]
    pieces = tuple(Piece(part, (1,), is_supervised=place % 2 == 1) for place, part in enumerate(parts))
    said = printed(RowsView([ShownRow(1, "p", 1, 1, pieces)]), width=width, colours=True)
    shown = re.sub("\x1b\\[[0-9;]*m", "", said.partition("learned")[2].partition("learned")[2])
    drawn = shown.partition("\n")[2].replace("·", "").replace("↵", "")
    assert "".join(drawn.split()).endswith("".join(text.split()))


def test_ids_stand_behind_their_tokens_and_before_the_line_end() -> None:
    said = printed(RowsView([shown_row()], shows_ids=True), width=200)
    assert "<|user|>⟩₅" in said
    assert "↵₈\n" in said
    assert "yes₉" in said
    assert "yes(9)" in printed(RowsView([shown_row()], shows_ids=True), width=200, encoding="ascii")


def test_the_report_says_every_number() -> None:
    said = " ".join(printed(DataReportView(report()), width=200).split())
    for words in (
        "128 to train on; 2 held out", "messages 130 rows",
        "8,256 in the training rows, 2,000 of them (24.2%)",
        "5 rows (3.8%): 4 whole turns left out, 1 cut inside a turn",
        "2 rows (1.5%): 2 nothing to learn within data.length",
        "3 rows (2.3%)", "<call> 12 times, <never> never", "32 steps of 8 rows each",
        "about 1.00 GiB of 8.00 GiB", "unknown: nobody has measured this device",
        "2 rows (1.5%): contents hold the text of control tokens",
        "No problems",
    ):  # fmt: skip
        assert words in said, words


def test_the_line_of_data_length_stands_where_rows_are_cut() -> None:
    assert limit_place(report(length=128)) == len(report().histogram.counts)
    assert limit_place(report(length=64)) == 4
    assert limit_place(report(length=4096)) is None
    lines = printed(DataReportView(report(length=64))).splitlines()
    assert any("─ data.length 64 ─" in line for line in lines)
    assert "beyond the longest row" in printed(DataReportView(report(length=4096)))
    assert report().histogram == Histogram(16, (16,) * 8)


def test_packing_and_padding_are_each_compared_with_the_other() -> None:
    assert "unpacked, padding would be" in " ".join(printed(DataReportView(report(packed=True))).split())
    assert "; packed: " in " ".join(printed(DataReportView(report())).split())


class Page(HTMLParser):
    """What a browser would see: tags, texts, attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: dict[str, list[str]] = {}
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "input", "br"):
            self.open.append(tag)
        for name, value in attrs:
            self.attributes.setdefault(name, []).append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_stands_alone_and_escapes_everything() -> None:
    text = data_page(report(findings=(Finding(EVIL, EVIL),)))
    page = Page(text)
    assert page.open == []
    assert set(page.tags) <= {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "input", "label", "main", "p",
        "b", "br", "dl", "dt", "dd", "div", "span", "i",
    }  # fmt: skip
    assert set(page.attributes) <= {
        "lang", "charset", "http-equiv", "content", "name", "type", "id", "for", "class", "style", "title",
        "data-id",
    }  # fmt: skip
    assert "default-src 'none'" in page.attributes["content"][0]
    assert "http" not in text.replace("http-equiv", "")
    assert "<script>" in "".join(page.texts), "the row's own text is there, as text"
    assert "\x1b" not in text
    assert "prefers-color-scheme:dark" in text
    assert {"9", "6 7"} <= set(page.attributes["data-id"])


def test_the_page_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "rows.html"
    write_whole(path, data_page(report()))
    first = path.read_text(encoding="utf-8")
    write_whole(path, data_page(report(length=64)))
    assert path.read_text(encoding="utf-8") != first
    assert [each.name for each in tmp_path.iterdir()] == ["rows.html"]


@pytest.mark.parametrize(
    ("name", "error", "problem"),
    [
        ("rows.txt", BadRecipe, "the page is HTML"),
        ("none/rows.html", BadOutput, "there is no folder"),
        ("folder.html", BadOutput, "which is a folder"),
    ],
)
def test_a_page_that_cannot_be_is_refused_before_any_work(
    tmp_path: Path, name: str, error: type[Exception], problem: str
) -> None:
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(error, match=problem):
        check_place(
            tmp_path / name,
            "--html",
            what="the page is HTML",
            suffixes=(".html",),
            example="rows.html",
        )
