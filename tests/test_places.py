"""Where characters went among tokens: counted and tracked say the same, and what cannot be counted is not."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from qadapt.data.rendering.places import Tracked, counted, token_widths, tokens_between

SENTENCES = ["the wheel turned, and the\n\nthe boats  lay still", "naïve café 日本語 🙂", "a b a b a b 12 34"]
END = "<|end|>"


@cache
def tokenizer(
    *, normalizer: str = "none", prefix_space: bool = False, unknown: str | None = None, rstrip: bool = False
) -> PreTrainedTokenizerFast:
    """A small byte-level BPE tokenizer with offsets as they are."""
    made = Tokenizer(models.BPE(unk_token=unknown))
    if normalizer != "none":
        made.normalizer = {"NFC": normalizers.NFC, "lower": normalizers.Lowercase}[normalizer]()
    digits = pre_tokenizers.Digits(individual_digits=True)
    level = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, trim_offsets=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([digits, level])
    made.decoder = decoders.ByteLevel()
    alphabet = [] if unknown else pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(SENTENCES * 20, trainer)
    made.add_special_tokens([AddedToken(END, special=True, normalized=False, rstrip=rstrip)])
    return PreTrainedTokenizerFast(tokenizer_object=made)


TEXTS = st.lists(
    st.sampled_from([*SENTENCES, END, " ", "\n", "é", "e\u0301", "日", "🙂", "the ", "x"])
    | st.text(max_size=4),
    max_size=8,
).map("".join)


@given(TEXTS, st.data())
def test_counted_places_are_the_tracked_ones(text: str, data: st.DataObject) -> None:
    model = tokenizer(normalizer="NFC")
    widths = token_widths(model)
    assert widths is not None
    slow = model.backend_tokenizer.encode(text, add_special_tokens=False)
    [fast] = model.backend_tokenizer.encode_batch_fast([text], add_special_tokens=False)
    assert fast.ids == slow.ids
    ids = np.array(slow.ids, np.int32)
    places = counted(text, ids, widths)
    if places is None:  # normalized on the way
        assert model.backend_tokenizer.normalizer.normalize_str(text) != text
        return
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    ends = {model.convert_tokens_to_ids(END)}
    expected = tokens_between(Tracked(slow, len(text)), start, end, ids=ids, ends=ends)
    assert tokens_between(places, start, end, ids=ids, ends=ends) == expected


def test_a_token_that_takes_the_white_space_behind_it_is_not_counted() -> None:
    model = tokenizer(rstrip=True)
    widths = token_widths(model)
    ids = np.array(model.backend_tokenizer.encode(f"a{END}  b").ids, np.int32)
    assert widths is not None
    assert counted(f"a{END}  b", ids, widths) is None


def test_a_text_that_is_normalized_is_not_counted() -> None:
    model = tokenizer(normalizer="NFC")
    widths = token_widths(model)
    text = "cafe\u0301"
    assert widths is not None
    assert counted(text, np.array(model.backend_tokenizer.encode(text).ids, np.int32), widths) is None


@pytest.mark.parametrize("kind", [{"prefix_space": True}, {"normalizer": "lower"}, {"unknown": "a"}])
def test_a_tokenizer_that_may_change_bytes_has_no_widths(kind: dict[str, str]) -> None:
    assert token_widths(tokenizer(**kind)) is None  # type: ignore[arg-type]
