"""A frozen head on the host, which comes in slices: the logits, losses and gradients of one on the card."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pytest
import torch
from test_loss import IGNORED, error, gradient, naive, tokens
from test_placement import adapted, base_of, gradients
from torch import Tensor, nn

from qadapt.adapters.lora import trainable
from qadapt.engine.documents import documents_of, isolating
from qadapt.engine.head import Head
from qadapt.engine.host_head import HostHead
from qadapt.engine.loss import Terms, loss_sum, summed_loss
from qadapt.engine.recompute import set_recompute
from qadapt.errors import BadRecipe, Unsupported
from qadapt.hardware.cards import find_card
from qadapt.model.generate import generate
from qadapt.plan import host
from qadapt.plan.estimate import estimate_step
from qadapt.plan.fit import fit
from qadapt.plan.host import pinned_bytes
from qadapt.plan.knobs import KNOBS, PLANNED
from qadapt.plan.room import Room
from qadapt.plan.setting import Setting
from qadapt.shape import find_config, find_shape
from qadapt.train.dryrun import dry_run
from qadapt.units import GIB, MIB

if TYPE_CHECKING:
    from conftest import TinyModel

CPU = torch.device("cpu")
WIDTH, VOCABULARY, TOKENS = 24, 201, 33
ENDS = ("embeddings", "head")
OFFLOAD = next(knob for knob in KNOBS if knob.name == "offload")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Slices of 64 rows and blocks of 10 tokens."""
    monkeypatch.setattr(host, "SLICE_BYTES", 1)
    monkeypatch.setattr("qadapt.engine.loss.BLOCK_TOKENS", 10)
    yield


def linear(dtype: torch.dtype = torch.float32, *, size: float = 3.0, bias: bool = False) -> nn.Linear:
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCABULARY, bias=bias, dtype=dtype).requires_grad_(False)
    head.weight.mul_(size)
    return head


def wanted(count: int = TOKENS) -> Tensor:
    """Targets all over the vocabulary, the first and the last token of slices among them."""
    torch.manual_seed(1)
    targets = torch.randint(0, VOCABULARY, (count,))
    targets[1:5] = torch.tensor([63, 64, VOCABULARY - 1, 0])
    targets[::5] = IGNORED
    return targets


@pytest.mark.parametrize("chunk", [0, 1, 7, 1000])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.3, None), (1.0, 4.0), (2.0, 4.0)])
def test_loss_and_gradient_are_those_of_all_logits_at_once(
    chunk: int, scale: float, softcap: float | None, small: None
) -> None:
    plain = linear(bias=chunk == 7)
    head, all_at_once = Head(HostHead(plain, CPU), scale, softcap), Head(plain, scale, softcap)
    for smoothing, z_weight, is_weighted in itertools.product((0.0, 0.1), (0.0, 1e-2), (False, True)):
        (hidden, _), targets, terms = tokens(), wanted(), Terms(smoothing, z_weight)
        weights = torch.rand(TOKENS) if is_weighted else None
        found = summed_loss(hidden, targets, head=head, chunk=chunk, weights=weights, terms=terms)
        expected = naive(hidden, targets, all_at_once, weights, terms)
        assert found.item() == pytest.approx(expected.item(), rel=1e-6)
        assert error(gradient(found, hidden, 0.37), gradient(expected, hidden, 0.37)) < 1e-5
        with torch.no_grad():
            again = summed_loss(hidden, targets, head=head, chunk=chunk, weights=weights, terms=terms)
        assert again.item() == pytest.approx(expected.item(), rel=1e-6)


def test_logits_are_the_heads(small: None) -> None:
    head = linear(bias=True)
    hosted, hidden = HostHead(head, CPU), torch.randn(2, 3, WIDTH)
    assert [len(part) for part in hosted.slices] == [64, 64, 64, 9]
    torch.testing.assert_close(hosted(hidden), head(hidden), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("count", [0, 1])
def test_one_token_or_none(count: int, small: None) -> None:
    hidden, targets = tokens(count=count)
    targets[:] = 5
    loss = summed_loss(hidden, targets, head=Head(HostHead(linear(), CPU)), chunk=4)
    expected = naive(hidden, targets, Head(linear()), None, Terms())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert gradient(loss, hidden).shape == (count, WIDTH)


def test_tokens_that_do_not_count_give_no_gradient(small: None) -> None:
    hidden, targets = tokens()
    targets[:] = IGNORED
    loss = summed_loss(hidden, targets, head=Head(HostHead(linear(), CPU)), chunk=4)
    assert loss.item() == 0
    assert not gradient(loss, hidden).any()


def test_logits_far_apart_in_different_slices_overflow_nothing(small: None) -> None:
    """The first slice's are so small that their sum is nothing beside the last one's, and the other way."""
    head, (hidden, _), targets = linear(), tokens(), wanted()
    for first, last in ((-80.0, 90.0), (90.0, -80.0)):
        head.bias = nn.Parameter(torch.linspace(first, last, VOCABULARY), requires_grad=False)
        found = summed_loss(hidden, targets, head=Head(HostHead(head, CPU)), chunk=4)
        expected = naive(hidden, targets, Head(head), None, Terms())
        assert found.item() == pytest.approx(expected.item(), rel=1e-6)
        assert error(gradient(found, hidden), gradient(expected, hidden)) < 1e-5


def test_in_bf16_the_gradient_is_as_near_to_fp32_as_the_naive_one(small: None) -> None:
    exact, _ = tokens()
    targets, plain = wanted(), linear(torch.bfloat16)
    expected = gradient(naive(exact, targets, Head(plain.float()), None, Terms()), exact, 0.37)
    hidden, plain = exact.detach().bfloat16().requires_grad_(), linear(torch.bfloat16)
    mine = summed_loss(hidden, targets, head=Head(HostHead(plain, CPU)), chunk=7)
    theirs = naive(hidden, targets, Head(plain), None, Terms())
    assert mine.item() == pytest.approx(theirs.item(), rel=1e-5)
    mine_off, theirs_off = (error(gradient(each, hidden, 0.37), expected) for each in (mine, theirs))
    assert mine_off < 1.5 * theirs_off, (
        "a part of each slice is rounded, where the naive one rounds their sum"
    )


@pytest.mark.parametrize("factor", [65536 / 1000, 1.0, 1e-3])
def test_in_fp16_a_loss_scale_that_comes_later_loses_nothing(factor: float, small: None) -> None:
    exact, _ = tokens()
    targets, plain = wanted(), linear(torch.float16, size=12.0)
    hidden = exact.detach().half().requires_grad_()
    full = hidden.detach().float().requires_grad_()
    wide = linear(torch.float16, size=12.0).float()
    expected = gradient(naive(full, targets, Head(wide), None, Terms()), full, factor)
    found = gradient(summed_loss(hidden, targets, head=Head(HostHead(plain, CPU)), chunk=7), hidden, factor)
    assert error(found, expected) < 2e-3


# --- in a base --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
@pytest.mark.parametrize(
    ("family", "offload"),
    [
        ("llama", ("head",)),
        ("llama", (*ENDS, "layers")),
        ("phi3", ENDS),
        ("gemma2", ENDS),  # tied, scaled embeddings, capped logits
        ("smollm2", ENDS),  # tied
    ],
)
def test_gradients_are_the_same_wherever_the_head_lies(
    family: str, offload: tuple[str, ...], quantization: str, tiny_model: TinyModel, small: None
) -> None:
    if quantization == "int8":
        offload = tuple(part for part in offload if part != "layers")
    folder = tiny_model(family, layers=2)
    plain = list(gradients(adapted(base_of(folder, (), quantization))))
    assert any(value.abs().max() > 0 for value in plain[0].values())
    base = base_of(folder, offload, quantization)
    assert isinstance(base.get_output_embeddings(), HostHead)
    for before, after in zip(plain, gradients(adapted(base)), strict=True):
        assert before.keys() == after.keys()
        assert all(error(after[name], before[name]) < 1e-5 for name in before)


@pytest.mark.parametrize("recompute", ["none", 1, "all"])
@pytest.mark.parametrize("packed", [False, True])
def test_so_are_those_of_packed_rows_whatever_is_recomputed(
    recompute: Any, packed: bool, tiny_model: TinyModel, small: None
) -> None:
    folder = tiny_model("llama", layers=2)
    documents = documents_of((19, 26)) if packed else None
    torch.manual_seed(3)
    ids, positions = torch.randint(3, 400, (1 if packed else 3, 45)), torch.arange(45)
    found = []
    for offload in ((), ENDS):
        base = base_of(folder, offload)
        set_recompute(base, recompute)
        model = adapted(base)
        with isolating(model) if packed else nullcontext():
            named: Any = {"positions": positions, "targets": ids.roll(-1, 1), "documents": documents}
            loss_sum(model, input_ids=ids, **named, chunk=4).backward()
        found.append({name: each.grad for name, each in trainable(model).items()})
    for name, expected in found[0].items():
        assert error(found[1][name], expected) < 1e-5  # type: ignore[arg-type]


def test_a_base_whose_head_is_away_answers_like_another_one(tiny_model: TinyModel, small: None) -> None:
    prompts = [[5, 6, 7], [8, 9], [4, 5, 11, 12]]
    for family in ("llama", "gemma2"):
        answers = [
            generate(adapted(base_of(tiny_model(family, layers=2), offload)), prompts, max_new_tokens=6,
                     end_ids=frozenset(), pad_id=0)
            for offload in ((), ENDS)
        ]  # fmt: skip
        assert len(answers[0][0]) == 6
        assert answers[1] == answers[0]


def test_neither_end_of_a_tied_model_goes_alone(tiny_model: TinyModel) -> None:
    shape = find_shape(str(tiny_model("gemma2")))
    for part in ENDS:
        with pytest.raises(Unsupported, match="the head of this model is tied to the embeddings"):
            base_of(tiny_model("gemma2"), (part,))
        with pytest.raises(BadRecipe, match="is tied to the embeddings: one table") as caught:
            estimate_step(shape, Setting(length=64, offload=(part,)))  # type: ignore[arg-type]
        assert caught.value.cure == "Name both embeddings and head in memory.offload, or neither."
    values: Any = OFFLOAD.values(shape, Setting(), 1)
    assert all(("embeddings" in value) == ("head" in value) for value in values)
    assert any("layers" in value and "head" not in value for value in values)


def test_a_head_that_is_trained_stays_on_the_card(tiny_model: TinyModel) -> None:
    shape, setting = find_shape("Llama-3.1-8B"), Setting(length=64, new_tokens=2)
    with pytest.raises(BadRecipe, match="head, with new tokens, whose rows of the head are trained"):
        estimate_step(shape, dataclasses.replace(setting, offload=("head",)))
    assert not any("head" in value for value in OFFLOAD.values(shape, setting, 1))  # type: ignore[operator]
    with pytest.raises(Unsupported, match=r"need a plain embedding and a plain head; .* HostHead"):
        adapted(base_of(tiny_model("llama"), ENDS), (440, 441))


def test_a_head_that_nobody_knows_stays_on_the_card(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qadapt.model.placement.head_of", lambda _: None)
    with pytest.raises(Unsupported, match="the head of this model is of an unknown kind, Linear of llama"):
        base_of(tiny_model("llama"), ("head",))


def test_a_cpu_has_nowhere_to_put_a_head() -> None:
    shape, setting = find_shape("Llama-3.1-8B"), Setting(length=64, device="cpu")
    with pytest.raises(BadRecipe, match=r"\['head'\]: a CPU's step lies on the host as it is"):
        estimate_step(shape, dataclasses.replace(setting, offload=("head",)))
    assert not any("head" in value for value in OFFLOAD.values(shape, setting, 1))  # type: ignore[operator]


# --- what it takes ----------------------------------------------------------------------------------------

SIZES = {"layers": 2, "width": 256, "vocabulary": 16_384}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"compute_dtype": "fp32", "adapter_dtype": "fp32", "loss_chunk": 64}),
        ("llama", {"compute_dtype": "fp16", "adapter_dtype": "fp32"}),
        ("gemma2", {"loss_chunk": 64}),
        ("smollm2", {"supervised_share": 0.1, "accumulates": False}),  # tied
    ],
)
def test_the_dry_run_and_the_closed_form_agree_on_every_byte_that_matters(
    family: str, changes: dict[str, Any], tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "SLICE_BYTES", MIB)
    folder = tiny_model(family, **SIZES)
    values, shape = find_config(str(folder)).values, find_shape(str(folder))
    offload = ENDS if shape.tied else ("head",)
    base = Setting(length=128, rank=8, optimizer="adamw", **changes)
    setting = dataclasses.replace(base, offload=offload)
    plain, dry = dry_run(values, base), dry_run(values, setting)
    closed = estimate_step(shape, setting)
    table = shape.embedding_weights * setting.compute_bytes
    assert plain.static["unquantized"] - dry.static["unquantized"] == table
    assert closed.categories["unquantized"] == dry.static["unquantized"]
    assert closed.phase_bytes["loss"] == pytest.approx(dry.phase_bytes["loss"], rel=0.01)
    assert dry.phase_bytes["loss"] < plain.phase_bytes["loss"] - 0.8 * table
    taken = table * len({"embeddings", "head"} & set(offload))
    assert taken <= dry.host_bytes <= taken * 1.05
    assert table <= closed.pinned_bytes <= 1.1 * table


def test_pinned_memory_is_hardly_more_than_the_head() -> None:
    for name in ("Qwen2.5-7B", "Llama-3.1-8B", "Mistral-7B-v0.3"):
        shape = find_shape(name)
        head = shape.embedding_weights * 2
        assert head <= pinned_bytes(shape, Setting(offload=("head",))) <= 1.05 * head


def test_a_plan_puts_the_head_away_only_where_nothing_cheaper_fits() -> None:
    shape, card = find_shape("Qwen2.5-7B"), find_card("RTX 3060")
    chosen = []
    for budget in (20.0, 6.4, 5.4):
        room = Room(round(budget * GIB))
        plan = fit(shape, Setting(length=1024), room=room, rows_per_step=4, free=PLANNED, card=card)
        chosen.append(plan.setting.offload)
    assert chosen[0] == () and "head" not in chosen[1]
    assert chosen[2] == ("embeddings", "head", "boundaries")
    said = next(reason for reason in plan.reasons if "head" in reason)
    assert re.search(r"embeddings, head, boundaries in the memory of the host: .* more; it costs", said)


def test_its_way_over_the_bus_costs_time_for_every_block_of_tokens() -> None:
    shape, card = find_shape("Qwen2.5-7B"), find_card("RTX 4090")

    def seconds(length: int, offload: Any, share: float = 1.0) -> float:
        setting = Setting(length=length, offload=offload, supervised_share=share)
        found = estimate_step(shape, setting, card=card).seconds_per_step
        assert found is not None
        return found

    trip = 2 * shape.embedding_weights * 2 / 12e9
    for length, blocks in ((4096, 1), (8192, 2)):
        assert trip * blocks < seconds(length, ("head",)) - seconds(length, ()) < 1.5 * trip * blocks
    assert seconds(2048, ("head",), 0.0) == pytest.approx(seconds(2048, (), 0.0))
