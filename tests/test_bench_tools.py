"""The pure parts of the benches: salvaging a file that is cut off, the table and its bars, the FLOPs."""

from __future__ import annotations

import json
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from conversations import usable, whole_rows
from foreign import Heard, drawn_texts
from gguf_foreign import Expected, is_enough
from packing_speed import drawn_rows, two_ways
from peer_table import MIB, Outcome, Outcomes, Side, faster, outcome_of, smaller, table, verdicts
from roofline import adapted_layers, documents_of, group_of
from side import Task
from side_llamafactory_rows import packed
from step_products import Product, attention_products, flops, head_products, linear_products
from torch.utils._python_dispatch import TorchDispatchMode

from qadapt.adapters.lora import Lora, attach_lora, trainable
from qadapt.data.batches import collate, micro_batches, packed_batches
from qadapt.data.prompt import load_contract
from qadapt.data.tokens import tokens_of
from qadapt.model.load import load_base
from qadapt.train.optimizer import make_optimizer
from qadapt.train.step import find_gradient

if TYPE_CHECKING:
    from conftest import TinyModel

# Salvaging

ROWS = [{"id": "a", "text": 'say "]," twice'}, {"id": "b", "text": "ä\n"}, {"id": "c", "text": "end"}]


@pytest.mark.parametrize("indent", [None, 2])
def test_a_file_cut_off_anywhere_gives_the_rows_that_are_whole(indent: int | None) -> None:
    text = json.dumps(ROWS, indent=indent, ensure_ascii=False)
    ends = [text.index(json.dumps(row["id"])) for row in ROWS]
    for cut in range(len(text) + 1):
        found = list(whole_rows(text[:cut]))
        assert found == ROWS[: len(found)]
        assert len(found) >= sum(cut > end for end in ends) - 1, "only the row that was cut is missing"
    assert list(whole_rows(text)) == ROWS


def turns(*speakers: str) -> dict[str, list[dict[str, str]]]:
    return {"conversations": [{"from": speaker, "value": "words"} for speaker in speakers]}


def test_a_conversation_is_a_person_and_a_model_in_turn() -> None:
    assert usable(turns("human", "gpt", "human", "gpt"))
    assert not usable(turns("gpt", "human"))
    assert not usable(turns("human"))
    assert not usable(turns("human", "gpt", "gpt"))
    assert not usable({"conversations": [{"from": "human", "value": "so"}, {"from": "gpt", "value": " "}]})


# The table


def lines(*steps: dict[str, object], **done: object) -> list[dict[str, object]]:
    facts = {"kind": "done", "dtype": "fp32", "recompute": "none", **done}
    return [
        {"kind": "imported", "level_bytes": 100 * MIB},
        *({"kind": "step", **step} for step in steps),
        facts,
    ]


def test_the_first_step_and_counted_ones_are_left_out_of_the_rate() -> None:
    first, counted = {"seconds": 60.0, "tokens": 10}, {"seconds": 9.0, "tokens": 10, "is_watched": True}
    steps = [first, {"seconds": 2.0, "tokens": 30}, counted, {"seconds": 3.0, "tokens": 20}]
    outcome = outcome_of(lines(*steps), top_bytes=350 * MIB, padding="filled")
    assert outcome == Outcome("fp32", "none", "filled", 10.0, 250 * MIB)


def test_tokens_that_a_peer_counts_at_the_end_are_those_of_its_steps() -> None:
    steps = [{"seconds": 60.0}, {"seconds": 2.0}, {"seconds": 2.0}]
    outcome = outcome_of(lines(*steps, tokens=[7, 30, 50]), top_bytes=0, padding="packed")
    assert outcome.tokens_per_second == 20.0


OURS, SMALL = Side("qadapt", "defaults"), Side("qadapt", "small memory")
TRL, BEST = Side("trl", "defaults"), Side("trl", "best", "fp32", False)
FACTORY, PLAIN = Side("llamafactory", "defaults"), Side("plain", "defaults")


def runs(*rates: float, mib: float) -> list[Outcome]:
    return [Outcome("fp32", "none", "filled", rate, int(mib * MIB)) for rate in rates]


def measured(*, small_mib: float = 300, best_rate: float = 140) -> Outcomes:
    return {
        OURS: runs(300, 330, 150, mib=900),
        SMALL: runs(200, 200, 200, mib=small_mib),
        TRL: runs(75, 80, 40, mib=6000),
        BEST: runs(best_rate, best_rate, best_rate, mib=2000),
        FACTORY: runs(100, 100, 50, mib=1000),
        PLAIN: runs(400, 400, 400, mib=100),
    }


def test_a_ratio_is_the_median_of_the_ratios_of_each_repeat() -> None:
    assert faster(measured(), OURS, FACTORY) == 3.0
    assert faster(measured(), OURS, TRL) == 4.0
    assert smaller(measured(), OURS, FACTORY) == pytest.approx(0.9)


def test_every_bar_is_about_the_peers_and_says_which() -> None:
    said = {verdict.claim: verdict for verdict in verdicts(measured())}
    assert len(said) == 1 + 1 + 3 + 2
    assert all(verdict.is_kept for verdict in said.values())
    assert said["speed, the faster peer at its defaults (llamafactory)"].measured == 3.0
    assert said["small memory: peak, the smaller peer's (llamafactory, defaults)"].measured == pytest.approx(
        0.3
    )


def test_a_missed_bar_is_said() -> None:
    said = verdicts(measured(small_mib=600, best_rate=200))
    missed = [verdict.line for verdict in said if not verdict.is_kept]
    assert len(missed) == 2
    assert missed[0].startswith("speed, trl at its best: 1.50 (bar >= 2.0): MISSED")
    assert missed[1].startswith("small memory: peak")


def test_every_row_of_the_table_names_type_and_recompute() -> None:
    head, _, *rows = table(measured())
    assert len(rows) == len(measured())
    assert all(row.count("|") == head.count("|") and "fp32 | none | filled" in row for row in rows)
    assert "3.00 x | 0.90 x" in next(row for row in rows if row.startswith("| llamafactory"))


def test_a_task_reads_back_as_it_was_written(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"input_ids": [n], "labels": [n]}) + "\n" for n in range(3)))
    task = Task("m", str(rows), "c", "r", "p", steps=2, micro_batch=2, rows_per_step=4)
    task.write(tmp_path / "task.json")
    assert Task.read(str(tmp_path / "task.json")) == task
    assert [row["input_ids"][0] for row in task.token_rows()] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert task.passes_per_step == 2


def test_packed_rows_of_the_peer_keep_every_token_and_number_the_documents() -> None:
    rows = [{"input_ids": [n] * n, "labels": [n] * n} for n in (5, 3, 4, 1, 2)]
    made = packed(rows, 6)
    assert all(len(values) == 7 for row in made for values in row.values())
    kept = sorted(token for row in made for token in row["input_ids"] if token)
    assert kept == sorted(token for row in rows for token in row["input_ids"])
    assert made[0]["attention_mask"] == [1, 1, 1, 1, 1, 2, 0]
    assert made[0]["position_ids"] == [0, 1, 2, 3, 4, 0, 0]


# Products and packing


def test_packing_loses_no_token_of_a_step() -> None:
    rows = drawn_rows(40, vocabulary=100, seed=1)
    assert 60 < sum(map(len, rows)) / len(rows) < 100
    filled_up, together = two_ways(rows, size=8)
    for way in (filled_up, together):
        assert sum(batch.tokens for batch in way) == sum(map(len, rows))
    assert len(filled_up) == 5
    assert sum(batch.input_ids.numel() for batch in together) == sum(map(len, rows))


def test_the_documents_of_micro_batches_are_found_packed_or_not() -> None:
    rows = [tokens_of(range(length), [True] * length, place="") for length in (7, 3, 9, 5)]
    assert documents_of(micro_batches(rows, size=3, pad_id=0), rows) == [[9, 7, 5], [3]]
    packed_lengths = documents_of(packed_batches(rows, capacity=12), rows)
    assert sorted(length for lengths in packed_lengths for length in lengths) == [3, 5, 7, 9]


class CountedProducts(TorchDispatchMode):
    """Counts the FLOPs of the products of two matrices that run meanwhile."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            (rows, inner), columns = args[-2].shape, args[-1].shape[1]
            self.flops += 2 * rows * inner * columns
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("length", [1, 33])
def test_needed_products_of_a_step_are_those_it_does(tiny_model: TinyModel, length: int) -> None:
    base = load_base(
        tiny_model("llama", layers=3),
        quantization="none",
        double_quant=False,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    model = attach_lora(base, Lora(rank=3, alpha=6), dtype=torch.float32, seed=0).train()
    optimizer = make_optimizer(trainable(model), kind="adamw", betas=(0.9, 0.99), weight_decay=0.0)
    row = tokens_of(range(3, 4 + length), [place > length // 2 for place in range(length + 1)], place="")
    batch = collate([row], pad_id=0)
    with CountedProducts() as counted:
        find_gradient(model, optimizer, [batch], clip_norm=None, scaler=None)
    needed = linear_products(adapted_layers(model), length + 1, rank=3)
    config = base.config
    head = head_products(batch.supervised_tokens, width=config.hidden_size, vocabulary=config.vocab_size)
    assert flops(needed + head) == counted.flops


def test_causal_attention_needs_half_of_its_products() -> None:
    needed = attention_products([6, 4], layers=5, heads=3, head_width=8)
    assert flops(needed) == 5 * 6 * (36 + 16) * 3 * 8  # six products, of half the scores each
    assert needed[Product(6, 8, 6, 3, is_causal=True)] == 10


@pytest.mark.parametrize(
    ("operation", "group"),
    [
        ("aten::addmm_", "products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("bitsandbytes::dequantize_4bit", "dequantize"),
        ("aten::_foreach_addcdiv_", "optimizer"),
        ("aten::silu", "elementwise and copies"),
        ("FusedLinearBackward", "Python and autograd"),
    ],
)
def test_an_operation_is_counted_to_one_group(operation: str, group: str) -> None:
    assert group_of(operation) == group


# A foreign program

RIGHT = Expected(prompts=[[1]] * 20, answers=[[1, 2]] * 20, texts=["a", "b"], tokens=[[5], [6]])
SAME = Heard(
    answers=[[1, 2]] * 20, tokens=[[5], [6]], adds_bos=False, ends_known=[True], release="", warnings=[]
)


@pytest.mark.parametrize(
    ("form", "heard", "expected"),
    [
        ("gguf-q8_0", SAME, True),
        ("gguf-q8_0", replace(SAME, answers=[*SAME.answers[:19], [1]]), True),
        ("gguf-q8_0", replace(SAME, answers=[*SAME.answers[:18], [1], [1]]), False),
        ("gguf-q4_0", replace(SAME, answers=[[1]] * 20), True),
        ("gguf-q4_0", replace(SAME, tokens=[[5], [7]]), False),
        ("gguf-f16", replace(SAME, adds_bos=True), False),
        ("gguf-f16", replace(SAME, ends_known=[False]), False),
    ],
)
def test_a_foreign_program_must_agree_in_answers_tokens_and_ends(
    tiny_model: TinyModel, form: str, heard: Heard, expected: bool
) -> None:
    assert is_enough(form, heard, RIGHT, contract=load_contract(tiny_model("smollm2"))) is expected


def test_texts_to_cut_are_in_the_form_that_the_tokenizer_asks_for(tiny_model: TinyModel) -> None:
    plain, composing = (
        drawn_texts(50, seed=3, tokenizer=load_contract(tiny_model(family)).tokenizer)
        for family in ("llama", "qwen2")
    )
    assert plain != composing
    assert [unicodedata.normalize("NFC", text) for text in plain] == composing
