"""The loss without logits against the naive one: all logits at once, `F.cross_entropy`, autograd."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bitsandbytes as bnb
import pytest
import torch
from test_train import make_recipe, only
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qadapt.engine.head import PLAIN, SCALED, Head, head_of
from qadapt.engine.ledger import Ledger
from qadapt.engine.loss import IGNORED, Terms, loss_sum, summed_loss
from qadapt.events import StepDone, Warned
from qadapt.run import train

if TYPE_CHECKING:
    from conftest import TinyModel

WIDTH, VOCABULARY, TOKENS = 24, 101, 33


def plain_head(dtype: torch.dtype = torch.float32, *, size: float = 3.0) -> nn.Linear:
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCABULARY, bias=False, dtype=dtype).requires_grad_(False)
    head.weight.mul_(size)
    return head


def tokens(dtype: torch.dtype = torch.float32, *, count: int = TOKENS) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    hidden = torch.randn(count, WIDTH).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCABULARY, (count,))
    targets[::5] = IGNORED
    return hidden, targets


def naive(hidden: Tensor, targets: Tensor, head: Head, weights: Tensor | None, terms: Terms) -> Tensor:
    logits = head.module(hidden).float() * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    losses = functional.cross_entropy(
        logits, targets, reduction="none", label_smoothing=terms.smoothing, ignore_index=IGNORED
    )
    losses = losses + terms.z_weight * logits.logsumexp(-1).square() * (targets != IGNORED)
    return (losses if weights is None else losses * weights).sum()


def gradient(loss: Tensor, hidden: Tensor, factor: float = 1.0) -> Tensor:
    (found,) = torch.autograd.grad(loss * factor, hidden)
    return found


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("chunk", [0, 1, 7, 33, 1000])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.3, None), (1.0, 4.0), (2.0, 4.0)])
def test_loss_and_gradient_are_those_of_all_logits_at_once(
    chunk: int, scale: float, softcap: float | None
) -> None:
    head = Head(plain_head(), scale, softcap)
    for smoothing, z_weight, is_weighted in itertools.product((0.0, 0.1), (0.0, 1e-2), (False, True)):
        (hidden, targets), terms = tokens(), Terms(smoothing, z_weight)
        weights = torch.rand(TOKENS) if is_weighted else None
        found = summed_loss(hidden, targets, head=head, chunk=chunk, weights=weights, terms=terms)
        expected = naive(hidden, targets, head, weights, terms)
        assert found.item() == pytest.approx(expected.item(), rel=1e-6)
        assert error(gradient(found, hidden, 0.37), gradient(expected, hidden, 0.37)) < 1e-5
        with torch.no_grad():
            again = summed_loss(hidden, targets, head=head, chunk=chunk, weights=weights, terms=terms)
        assert again.item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_comparison_sees_a_gradient_that_forgets_the_cap() -> None:
    hidden, targets = tokens()
    found = summed_loss(hidden, targets, head=Head(plain_head()), chunk=7)
    expected = naive(hidden, targets, Head(plain_head(), softcap=4.0), None, Terms())
    assert error(gradient(found, hidden), gradient(expected, hidden)) > 0.01


@pytest.mark.parametrize("count", [0, 1])
def test_one_token_or_none(count: int) -> None:
    hidden, targets = tokens(count=count)
    targets[:] = 5
    loss = summed_loss(hidden, targets, head=Head(plain_head()), chunk=4)
    expected = functional.cross_entropy(plain_head()(hidden), targets, reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert gradient(loss, hidden).shape == (count, WIDTH)


def test_tokens_that_do_not_count_give_no_gradient() -> None:
    hidden, targets = tokens()
    targets[:] = IGNORED
    loss = summed_loss(hidden, targets, head=Head(plain_head()), chunk=4)
    assert loss.item() == 0
    assert not gradient(loss, hidden).any()


def test_in_bf16_the_gradient_is_as_near_to_fp32_as_the_naive_one() -> None:
    exact, targets = tokens()
    expected = gradient(naive(exact, targets, Head(plain_head()), None, Terms()), exact, 0.37)
    hidden, head = exact.detach().bfloat16().requires_grad_(), Head(plain_head(torch.bfloat16))
    mine = summed_loss(hidden, targets, head=head, chunk=7)
    theirs = naive(hidden, targets, head, None, Terms())
    assert mine.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert error(gradient(mine, hidden, 0.37), expected) < 1.1 * error(
        gradient(theirs, hidden, 0.37), expected
    )


@pytest.mark.parametrize("factor", [65536 / 1000, 1.0, 1e-3])
def test_in_fp16_a_loss_scale_that_comes_later_loses_nothing(factor: float) -> None:
    """Most tokens are far less probable than fp16 can say; where the naive gradient dies, this one rounds."""
    exact, targets = tokens()
    head = Head(plain_head(torch.float16, size=12.0))
    wide = Head(nn.Linear(WIDTH, VOCABULARY, bias=False))
    wide.module.load_state_dict({"weight": head.module.weight.float()})  # type: ignore[dict-item]
    hidden = exact.detach().half().requires_grad_()
    full = hidden.detach().float().requires_grad_()
    expected = gradient(naive(full, targets, wide, None, Terms()), full, factor)
    found = gradient(summed_loss(hidden, targets, head=head, chunk=7), hidden, factor)
    assert error(found, expected) < 2e-3


def test_an_overflow_by_the_loss_scale_is_seen() -> None:
    hidden, targets = tokens(torch.float16)
    loss = summed_loss(hidden, targets, head=Head(plain_head(torch.float16)), chunk=7)
    assert not gradient(loss, hidden, 1e6).isfinite().all()
    assert (
        gradient(summed_loss(hidden, targets, head=Head(plain_head(torch.float16))), hidden).isfinite().all()
    )


def quantized(kind: str) -> nn.Module:
    weight = plain_head().weight
    if kind == "nf4":
        four = bnb.nn.Linear4bit(WIDTH, VOCABULARY, bias=False, quant_type="nf4", compute_dtype=torch.float32)
        four.load_state_dict({"weight": weight})
        return four.to("cpu").requires_grad_(False)
    eight = bnb.nn.Linear8bitLt(WIDTH, VOCABULARY, bias=False, has_fp16_weights=False)
    eight.load_state_dict({"weight": weight})
    return eight.to("cpu").requires_grad_(False)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantized_head_is_gone_through_as_it_is(kind: str) -> None:
    head, (hidden, targets) = Head(quantized(kind)), tokens()
    mine = summed_loss(hidden, targets, head=head, chunk=7)
    theirs = naive(hidden, targets, head, None, Terms())
    assert mine.item() == pytest.approx(theirs.item(), rel=1e-4)
    assert error(gradient(mine, hidden), gradient(theirs, hidden)) < (1e-5 if kind == "nf4" else 2e-2)


def test_what_the_head_trains_gets_its_gradient() -> None:
    module = plain_head().requires_grad_()
    (hidden, targets), trained = tokens(), (module.weight,)
    mine = summed_loss(hidden, targets, head=Head(module, trained=trained), chunk=7)
    theirs = naive(hidden, targets, Head(module), None, Terms())
    for found, expected in zip(
        torch.autograd.grad(mine, (hidden, *trained)),
        torch.autograd.grad(theirs, (hidden, *trained)),
        strict=True,
    ):
        assert error(found, expected) < 1e-5


def test_one_chunk_of_logits_is_the_most_there_is() -> None:
    torch.manual_seed(0)
    head = Head(nn.Linear(WIDTH, 5000, bias=False).requires_grad_(False))
    for chunk, expected in ((10, 10), (0, 90)):
        hidden, targets = torch.randn(90, WIDTH, requires_grad=True), torch.randint(0, 5000, (90,))
        ledger = Ledger()
        ledger.hold("unquantized", [head.module.weight, hidden, targets])  # type: ignore[list-item]
        before = ledger.live_bytes
        with ledger:
            summed_loss(hidden, targets, head=head, chunk=chunk).backward()
        assert ledger.peak.bytes - before == pytest.approx(expected * 5000 * 4, rel=0.06)


SIZES: dict[str, Any] = {
    "hidden_size": 64, "n_embd": 64, "num_hidden_layers": 2, "n_layer": 2, "num_attention_heads": 4,
    "n_head": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96, "ffn_dim": 96,
    "vocab_size": 131, "max_position_embeddings": 64, "n_positions": 64, "num_experts": 4,
    "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "word_embed_proj_dim": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "final_logit_softcapping": 5.0, "logits_scaling": 3.0, "logit_scale": 0.25,
}  # fmt: skip


def tiny(kind: str) -> PreTrainedModel:
    known = AutoConfig.for_model(kind)
    config = AutoConfig.for_model(
        kind, **{n: v for n, v in SIZES.items() if n in known.to_dict() or n in known.attribute_map}
    )
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.get_output_embeddings().weight.data.mul_(8)
    return model


@pytest.mark.parametrize("kind", [*sorted(PLAIN), *SCALED])
def test_the_head_of_every_known_architecture_is_what_its_own_forward_pass_does(kind: str) -> None:
    model = tiny(kind)
    torch.manual_seed(2)
    ids, positions = torch.randint(3, 131, (2, 9)), torch.tensor([1, 2, 5, 7])
    targets = ids[:, positions + 1]
    with torch.no_grad():
        found = loss_sum(model, input_ids=ids, positions=positions, targets=targets, chunk=3)
        logits = model(input_ids=ids, use_cache=False).logits[:, positions].float()
    expected = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_an_architecture_that_is_not_known_makes_all_its_logits() -> None:
    model = tiny("llama")
    ids = torch.randint(3, 131, (2, 9))
    named: dict[str, Any] = {"input_ids": ids, "positions": torch.arange(8), "targets": ids[:, 1:]}
    expected = loss_sum(model, **named, chunk=3)
    model.config.model_type = "nobody-knows"
    assert head_of(model) is None
    assert loss_sum(model, **named, chunk=3).item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_run_says_that_all_logits_are_made(
    tmp_path: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qadapt.running.model.head_of", lambda _: None)
    monkeypatch.setattr("qadapt.engine.loss.head_of", lambda _: None)
    recipe = make_recipe(tmp_path, tiny_model("llama"), steps=1, evaluate_every=None, rehearse=False)
    events = list(train(recipe))
    messages = [event.message for event in only(Warned, events)]
    assert "What llama does with its logits is not known: all of a micro-batch are made at once." in messages
    assert only(StepDone, events)
