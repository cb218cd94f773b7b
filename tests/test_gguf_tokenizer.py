"""Tokenizers in GGUF's words: names of pre-tokenizers, scores from merges, special tokens; refusals by name.

`llama_cpp_ids` states what llama.cpp does with a vocabulary of pieces; the ids must be the tokenizer's own.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from conftest import TinyModel
from demo_task import make_rows
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qadapt.errors import BadExport, QadaptError, Unsupported
from qadapt.export.gguf_tokenizer import Vocabulary, read_vocabulary

SPACE = "\u2581"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = [turn["content"] for row in make_rows(30, 0, held_out=False) for turn in row["messages"]]
PROBES = [
    *TEXTS[:12],
    "", " ", "  two  spaces ", "tabs\tand\nlines\n\n", "日本 und Ümläute 🚀", "12 apples, 345.6 x",
    "<s>[INST] Hello there [/INST] yes</s>", "<s>a<s> b",
]  # fmt: skip


def byte_level(folder: Path, step: Any, *, ignore_merges: bool = False, normalizer: Any = None) -> Path:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer, tokenizer.normalizer = step, normalizer or normalizers.Sequence([])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXTS[:5], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)
    return folder


def split(pattern: str) -> Any:
    cut = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def bytes_only(**options: Any) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, **options)


def pieces_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary and merges as a SentencePiece's BPE model becomes a `tokenizer.json`."""
    counts: Counter[str] = Counter()
    for text in TEXTS:
        marked = SPACE + text.replace(" ", SPACE)
        counts.update(marked[at : at + size] for size in (2, 3, 4, 6) for at in range(len(marked) - size + 1))
    chosen = [SPACE * 2, *(piece for piece, _ in counts.most_common(260) if SPACE not in piece[1:])]
    letters = sorted({letter for text in TEXTS for letter in text if letter != " "} | {SPACE})
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *chosen, *letters]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in chosen
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    return vocabulary, merges


def pieces(folder: Path, *, kind: str = "legacy", **changed: Any) -> Path:
    vocabulary, merges = pieces_vocabulary()
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary, changed.get("merges", merges), byte_fallback=True, fuse_unk=True, unk_token="<unk>"
        )
    )
    marks = normalizers.Replace(" ", SPACE)
    if kind == "legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), marks])
    elif kind == "gemma":
        tokenizer.normalizer = marks
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=kind, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<unk>", "<s>", "</s>")])
    if kind == "gemma":
        tokenizer.add_tokens([AddedToken(SPACE * 2, special=False, normalized=False)])
    if changed.get("added"):
        tokenizer.add_tokens(changed["added"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


def llama_cpp_ids(text: str, values: Mapping[str, Any]) -> list[int]:
    """What llama.cpp makes of a text with a vocabulary of pieces, special tokens understood."""
    tokens, kinds = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    ids = {token: index for index, token in enumerate(tokens)}
    special = sorted((token for token, kind in zip(tokens, kinds, strict=True) if kind in (3, 4)), key=len)[
        ::-1
    ]
    found: list[int] = []
    after_special = True
    for part in re.split("(" + "|".join(map(re.escape, special)) + ")", text):
        if part in special:
            found.append(ids[part])
            after_special = True
        elif part:
            prefix = " " if values["tokenizer.ggml.add_space_prefix"] and after_special else ""
            found += merged_pieces((prefix + part).replace(" ", SPACE), ids, values["tokenizer.ggml.scores"])
            after_special = False
    return found


def merged_pieces(text: str, ids: Mapping[str, int], scores: list[float]) -> list[int]:
    symbols = list(text)
    while True:
        pairs = [
            (-scores[ids[one + other]], at)
            for at, (one, other) in enumerate(pairwise(symbols))
            if one + other in ids
        ]
        if not pairs:
            break
        _, at = min(pairs)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    found: list[int] = []
    for symbol in symbols:
        found += [ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return found


def read(folder: Path, *, rows: int | None = None) -> Vocabulary:
    size = len(AutoTokenizer.from_pretrained(folder))
    return read_vocabulary(folder, rows=size if rows is None else rows)


def refused(folder: Path) -> QadaptError:
    with pytest.raises(Unsupported) as caught:
        read(folder)
    assert "merged-fp16" in caught.value.cure
    return caught.value


@pytest.mark.parametrize(
    ("name", "step", "ignore_merges"),
    [
        ("gpt-2", bytes_only(), False),
        (
            "smollm",
            pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_only()]),
            False,
        ),
        ("llama-bpe", split(LLAMA3), True),
        ("dbrx", split(LLAMA3), False),
        ("qwen2", split(LLAMA3.replace("{1,3}", "")), False),
        ("tekken", split(TEKKEN), True),
        ("gpt-4o", split(GPT4O), False),
    ],
)
def test_pre_tokenizer_has_llama_cpps_name(name, step, ignore_merges, tmp_path):
    values = read(byte_level(tmp_path, step, ignore_merges=ignore_merges)).values
    assert values["tokenizer.ggml.pre"] == name and values["tokenizer.ggml.model"] == "gpt2"
    facts = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    assert values["tokenizer.ggml.merges"] == [" ".join(pair) for pair in facts["model"]["merges"]]
    assert values["tokenizer.ggml.tokens"][: len(facts["model"]["vocab"])] == sorted(
        facts["model"]["vocab"], key=facts["model"]["vocab"].__getitem__
    )


@pytest.mark.parametrize(
    ("step", "options"),
    [
        (split(LLAMA3 + "|x"), {}),
        (split(LLAMA3.replace("{1,3}", "")), {"ignore_merges": True}),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), {}),
        (bytes_only(use_regex=False), {}),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), bytes_only()]), {}),
        (bytes_only(), {"normalizer": normalizers.Lowercase()}),
    ],
    ids=["pattern", "merges", "prefix", "none", "digits", "normalizer"],
)
def test_pre_tokenizer_without_a_name_is_refused_not_guessed(step, options, tmp_path):
    assert "llama.cpp has no name for" in refused(byte_level(tmp_path, step, **options)).problem


@pytest.mark.parametrize("kind", ["legacy", "always", "first", "gemma"])
def test_pieces_with_scores_give_the_tokens_of_the_merges(kind, tmp_path):
    folder = pieces(tmp_path, kind=kind)
    values, tokenizer = read(folder).values, AutoTokenizer.from_pretrained(folder)
    assert values["tokenizer.ggml.model"] == "llama" and values["tokenizer.ggml.add_bos_token"] is True
    compared = 0
    for text in PROBES:
        if kind == "first" and not text.startswith("<s>"):
            text = f"<s>{text}"  # its space stands at the very start alone, which a prompt never is
        if kind == "always" and text.startswith((" ", "<s>a<s> ", "<s>[INST] ")):
            continue  # it puts no second space, llama.cpp does
        wanted = tokenizer.encode(text, add_special_tokens=False)
        assert llama_cpp_ids(text, values) == wanted, text
        compared += len(wanted)
    assert compared > 300


def test_kinds_of_pieces_are_told_apart(tmp_path):
    values = read(pieces(tmp_path, kind="gemma"), rows=700).values
    kinds = dict(zip(values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"], strict=True))
    assert kinds["<s>"] == 3 and kinds["<0x0A>"] == 6 and kinds["e"] == 1 and kinds["[PAD699]"] == 5
    assert kinds["  "] == 4, "what users defined has spaces, not marks"
    assert (
        values["tokenizer.ggml.unknown_token_id"] == 0 and values["tokenizer.ggml.add_space_prefix"] is False
    )


def test_merges_that_no_scores_give_are_refused(tmp_path):
    _, merges = pieces_vocabulary()
    once = list({"".join(pair): pair for pair in merges}.values())  # as a trainer of merges leaves them
    assert "not those of a SentencePiece" in refused(pieces(tmp_path / "once", merges=once)).problem
    mixed = [*merges[len(merges) // 2 :], *merges[: len(merges) // 2]]
    read(pieces(tmp_path / "shifted", merges=mixed))
    mixed = sorted(merges, key=lambda pair: len(pair[0]))
    assert "not those of a SentencePiece" in refused(pieces(tmp_path / "mixed", merges=mixed)).problem


def test_tokenizer_of_another_kind_is_refused(tmp_path):
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.0)], unk_id=0))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="a").save_pretrained(tmp_path)
    assert "'Unigram'" in refused(tmp_path).problem


def test_text_that_is_taken_into_a_token_is_refused(tmp_path):
    added = [AddedToken("<mask>", lstrip=True)]
    assert "'<mask>', which takes the text around it in" in refused(pieces(tmp_path, added=added)).problem
    added = [AddedToken("<turn>", rstrip=True, special=True)]
    assert "drops white space after '<turn>'" in refused(pieces(tmp_path / "r", added=added)).problem


def test_name_follows_the_tokenizer_where_llama_cpp_reads_it(tiny_model: TinyModel, tmp_path):
    plain = read(tiny_model("phi3"))
    assert plain.title("Phi-3-orders") == "Phi 3-orders" and plain.title("orders") == "orders"
    folder = tmp_path / "phi3"
    vocabulary, merges = pieces_vocabulary()
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.add_tokens(
        [
            *(AddedToken(text, special=True, normalized=False) for text in ("<unk>", "<s>", "<|endoftext|>")),
            AddedToken("</s>", rstrip=True, normalized=False),
            *(
                AddedToken(text, special=True, rstrip=True)
                for text in ("<|user|>", "<|assistant|>", "<|end|>")
            ),
        ]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|endoftext|>"
    ).save_pretrained(folder)
    strips = read(folder)
    assert strips.title("orders") == "orders (Phi-3)" and strips.title("my-phi-3") == "my-phi-3"


def test_all_ends_of_an_answer_are_named(tiny_model: TinyModel, tmp_path):
    values = read(tiny_model("llama")).values
    tokens = values["tokenizer.ggml.tokens"]
    assert tokens[values["tokenizer.ggml.eos_token_id"]] == "<|eot_id|>"
    assert tokens[values["tokenizer.ggml.eot_token_id"]] == "<|end_of_text|>"
    AutoTokenizer.from_pretrained(tiny_model("phi3")).save_pretrained(tmp_path)
    ends = {"eos_token_id": [3, 6, 4, 5, 7]}
    (tmp_path / "generation_config.json").write_text(json.dumps(ends), encoding="utf-8")
    read_back = read(tmp_path)
    named = {
        read_back.values["tokenizer.ggml.tokens"][read_back.values[f"tokenizer.ggml.{name}_token_id"]]
        for name in ("eos", "eot", "eom")
    }
    assert named == {"<|endoftext|>", "<|assistant|>", "<|system|>"}, "those whose text it knows need no name"
    [warned] = read_back.warnings
    assert warned.message.endswith("<|user|> will not end one.")


def test_tokens_beyond_the_embedding_are_refused(tiny_model: TinyModel):
    with pytest.raises(BadExport, match=r"beyond the embedding's 200 rows"):
        read_vocabulary(tiny_model("llama"), rows=200)


def test_templates_by_name_are_all_kept(tiny_model: TinyModel, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("qwen2"))
    tokenizer.chat_template = {"default": "DEFAULT", "tool_use": "TOOLS"}
    tokenizer.save_pretrained(tmp_path)
    values = read(tmp_path).values
    assert values["tokenizer.chat_template"] == "DEFAULT"
    assert values["tokenizer.chat_template.tool_use"] == "TOOLS" and values["tokenizer.chat_templates"] == [
        "tool_use"
    ]
