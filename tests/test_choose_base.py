"""Which base is merged on: what both merges measure, and when a difference is more than chance."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_model import make_tiny_model
from transformers import AutoModelForCausalLM

from qadapt.adapters.facts import AdapterFacts, write_facts
from qadapt.data.tokens import Tokens, tokens_of
from qadapt.errors import BadExport
from qadapt.events import BasesCompared, Event, StageAdvanced, Warned
from qadapt.export.card import comparison
from qadapt.export.choose_base import (
    BASES,
    DRAWS,
    MOST_ROWS,
    MOST_TOKENS,
    SEED,
    choose_base,
    compare,
    some_of,
)
from qadapt.export.merge import merge

CPU = torch.device("cpu")


# What is chance


def losses(
    count: int, *, difference: float, spread: float, seed: int = 1
) -> tuple[list[float], list[float], list[int]]:
    """Sums of rows on both bases: per token the original is `difference` higher, give or take `spread`."""
    draw = np.random.default_rng(seed)
    tokens = draw.integers(1, 90, count)
    dequantized = draw.uniform(0.5, 3, count)
    original = dequantized + difference + spread * draw.standard_normal(count)
    return list(dequantized * tokens), list(original * tokens), tokens.tolist()


@pytest.mark.parametrize(
    ("difference", "better"),
    [(-0.05, "original"), (0.05, "dequantized"), (0, "dequantized"), (-0.004, "dequantized")],
)
def test_lower_loss_wins_and_a_tie_goes_to_what_was_trained_on(difference, better):
    dequantized, original, tokens = losses(40, difference=difference, spread=0.05)
    found = compare(dequantized, original, tokens=tokens)
    assert found.base == better
    low, high = found.interval
    assert (low <= 0 <= high) == (abs(difference) < 0.05)
    assert low < found.losses[1] - found.losses[0] < high


def test_tie_is_no_rule_of_thumb_but_chance():
    """Without any true difference the original base is taken as often as the interval allows: 1 in 40."""
    taken = []
    for seed in range(200):
        dequantized, original, tokens = losses(40, difference=0, spread=0.1, seed=seed)
        taken.append(compare(dequantized, original, tokens=tokens))
    share = sum(found.base == "original" for found in taken) / len(taken)
    assert 0 < share < 0.07


def test_interval_is_that_of_a_plain_bootstrap():
    dequantized, original, tokens = losses(12, difference=-0.02, spread=0.05)
    draw, differences = np.random.default_rng(SEED), []
    for rows in draw.integers(12, size=(DRAWS, 12)):
        learned = sum(tokens[row] for row in rows)
        differences.append(sum(original[row] - dequantized[row] for row in rows) / learned)
    differences.sort()
    found = compare(dequantized, original, tokens=tokens)
    for bound, share in zip(found.interval, (0.025, 0.975), strict=True):
        assert (
            differences[math.floor(share * (DRAWS - 1))]
            <= bound
            <= differences[math.ceil(share * (DRAWS - 1))]
        )
    assert found == compare(dequantized, original, tokens=tokens), "the same draws every time"


def test_loss_is_of_tokens_not_of_rows():
    found = compare([10.0, 90.0], [20.0, 90.0], tokens=[10, 30])
    assert found.losses == (2.5, 2.75)
    assert (found.rows, found.tokens) == (2, 40)


def test_few_rows_decide_nothing():
    tokens = [10] * 9
    assert compare([20.0] * 9, [10.0] * 9, tokens=tokens).base == "dequantized"
    assert compare([20.0] * 10, [10.0] * 10, tokens=[10] * 10).base == "original"


@pytest.mark.parametrize(("count", "length"), [(3, 10), (1000, 10), (1000, 300), (5, 9000), (129, 64)])
def test_rows_are_thinned_evenly(count, length):
    rows = [tokens_of([number] * length, [True] * length, place="") for number in range(count)]
    numbers = [int(row.ids[0]) for row in some_of(rows)]
    assert numbers[0] == 0 and len(set(numbers)) == len(numbers) <= MOST_ROWS
    assert len(numbers) == 1 or len(numbers) * length <= MOST_TOKENS
    steps = np.diff(numbers)
    assert not len(steps) or steps.max() - steps.min() <= 1
    if count * length <= MOST_TOKENS and count <= MOST_ROWS:
        assert numbers == list(range(count))


# What is measured


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("parts")
    model = make_tiny_model(root / "model", "qwen2")
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model),
        LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
    )
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter.data, std=0.1)
    adapted.save_pretrained(str(root / "adapter"))
    write_facts(AdapterFacts("tiny", None, "f" * 64, "nf4", True, "fp32", "p" * 64), root / "adapter")
    return model, root / "adapter"


def merged_model(parts: tuple[Path, Path], folder: Path, base: str) -> torch.nn.Module:
    for _ in merge(
        model_folder=parts[0], adapter_folder=parts[1], target=folder / base, form="merged-fp32", base=base
    ):
        pass
    return AutoModelForCausalLM.from_pretrained(folder / base, dtype=torch.float32).eval()


def rows_written_by(model: torch.nn.Module, count: int) -> list[Tokens]:
    """Rows that a model thinks likeliest: three tokens are asked, what follows is learned."""
    rows = []
    for number in range(count):
        asked = torch.tensor([[5 + number, 40 + 3 * number, 9]])
        ids = model.generate(asked, max_new_tokens=5 + number % 7, do_sample=False, pad_token_id=0)[
            0
        ].tolist()
        rows.append(tokens_of(ids, [False] * 3 + [True] * (len(ids) - 3), place=f"row {number}"))
    return rows


def plain_loss(model: torch.nn.Module, rows: Sequence[Tokens]) -> float:
    total, learned = 0.0, 0
    for row in rows:
        ids = torch.tensor(row.ids, dtype=torch.long)[None]
        with torch.no_grad():
            chances = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        picked = -chances[torch.arange(len(row) - 1), ids[0, 1:]]
        total += picked[torch.tensor(row.supervised[1:])].sum().item()
        learned += row.supervised_count
    return total / learned


def chosen(
    parts: tuple[Path, Path], asked: str, rows: Sequence[Tokens], dtype: str = "F32"
) -> tuple[str, list[Event]]:
    events: list[Event] = []
    taken: list[str] = []

    def keep() -> Iterator[Event]:
        taken.append((yield from choose_base(*parts, asked=asked, dtype=dtype, rows=rows, device=CPU)))

    events.extend(keep())
    return taken[0], events


@pytest.mark.parametrize("better", BASES)
def test_auto_takes_the_base_whose_merge_has_written_the_rows(parts, tmp_path, better):
    models = {base: merged_model(parts, tmp_path, base) for base in BASES}
    rows = rows_written_by(models[better], 24)
    taken, events = chosen(parts, "auto", rows)
    assert taken == better
    [compared] = [event for event in events if isinstance(event, BasesCompared)]
    for base in BASES:
        assert compared.losses[base] == pytest.approx(plain_loss(models[base], rows), rel=1e-5)
    assert compared.better == compared.base == better
    assert (compared.low > 0) if better == "dequantized" else (compared.high < 0)
    assert compared.tokens == sum(row.supervised_count for row in rows)
    assert any(isinstance(event, StageAdvanced) for event in events)
    line = comparison(compared)
    assert all(f"{loss:.4f} on the {base} base" in line for base, loss in compared.losses.items())


def test_both_are_measured_whatever_was_asked(parts, tmp_path):
    rows = rows_written_by(merged_model(parts, tmp_path, "original"), 12)
    taken, events = chosen(parts, "dequantized", rows)
    [compared] = [event for event in events if isinstance(event, BasesCompared)]
    assert (taken, compared.base, compared.better) == ("dequantized", "dequantized", "original")


def test_losses_are_of_the_rounded_numbers(parts, tmp_path):
    rows = rows_written_by(merged_model(parts, tmp_path, "original"), 12)
    exact, rounded = (
        next(event for event in chosen(parts, "auto", rows, dtype)[1] if isinstance(event, BasesCompared))
        for dtype in ("F32", "BF16")
    )
    assert exact.losses != rounded.losses
    assert rounded.losses["original"] == pytest.approx(exact.losses["original"], rel=0.02)


def test_without_held_out_rows_auto_is_what_was_trained_on_and_says_so(parts):
    taken, events = chosen(parts, "auto", [])
    assert taken == "dequantized"
    assert isinstance(events[0], Warned) and "no held-out rows" in events[0].message
    assert chosen(parts, "original", []) == ("original", [])


def test_rows_that_learn_nothing_are_no_rows_to_compare_on(parts):
    nothing = [tokens_of(range(5, 15), [False] * 10, place="") for _ in range(12)]
    taken, [warned] = chosen(parts, "auto", nothing)
    assert taken == "dequantized" and "no held-out rows" in warned.message
    assert chosen(parts, "original", nothing) == ("original", [])


@pytest.mark.parametrize("asked", ["auto", "dequantized"])
def test_base_that_cannot_be_merged_on_is_not_taken(parts, tmp_path, asked):
    broken = too_large_on_the_original(parts, tmp_path)
    rows = [tokens_of(range(5, 15), [True] * 10, place="") for _ in range(12)]
    taken, events = chosen(broken, asked, rows, "F16")
    assert taken == "dequantized"
    [warned] = [event for event in events if isinstance(event, Warned)]
    assert "on the original base" in warned.message and "reaches 65504.5" in warned.message
    with pytest.raises(BadExport, match="reaches"):
        chosen(broken, "original", rows, "F16")


def too_large_on_the_original(parts: tuple[Path, Path], root: Path) -> tuple[Path, Path]:
    """Of a weight, 10 on the original and 9 in four bits, the update makes one that fp16 has, or not."""
    model, adapter = (Path(shutil.copytree(part, root / part.name)) for part in parts)
    weights = load_file(model / "model.safetensors")
    weight = weights["model.layers.0.self_attn.q_proj.weight"]
    weight[0, 5], weight[0, 6] = 10, 16
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    pairs = load_file(adapter / "adapter_model.safetensors")
    a, b = (
        pairs[f"base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight"].zero_() for side in "AB"
    )
    a[0, 5], b[0, 0] = 1, 65494.5 / 2
    save_file(pairs, adapter / "adapter_model.safetensors")
    write_facts(AdapterFacts("tiny", None, "f" * 64, "nf4", False, "fp32", "p" * 64), adapter)
    return model, adapter
