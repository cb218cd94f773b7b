"""A model's tokenizer in a GGUF file: what llama.cpp needs to make the same tokens of a text.

llama.cpp knows two kinds here. Byte-level BPE, whose first cut is one of a list of patterns it has by name:
the name is found by comparing the tokenizer's own pattern, and one that is not in the list is refused,
because every other name would cut otherwise. And SentencePiece's BPE, which merges the pair whose result has
the best score: a `tokenizer.json` has merges instead of scores, and they are turned back, after a look that
they are a SentencePiece's. What llama.cpp cannot do (text stripped around a token, say) is refused, too.
https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp

One thing it does by the model's *name*: with `phi-3` in it, white space after special tokens is dropped, as
Phi-3's own tokenizer does. So the name in the file follows the tokenizer (`Vocabulary.title`).

Unicode normalization (NFC, in Qwen's tokenizers) is not done there; nothing in the format says it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from gguf import TokenType
from transformers import PreTrainedTokenizerFast

from qadapt.data.rendering.tokenizer import declared_ends, read_tokenizer, starts_with_bos
from qadapt.errors import BadExport, Unsupported
from qadapt.events import Warned
from qadapt.export.gguf_front import Value

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_CAPITALS = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_SLASH_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2, _DIGITS = "GPT-2's pattern", "single digits, "
_PRE_TOKENIZERS = {
    (_GPT2, False): "gpt-2",
    (_DIGITS + _GPT2, False): "smollm",
    (_WORDS + r"\p{N}{1,3}" + _REST, True): "llama-bpe",
    (_WORDS + r"\p{N}{1,3}" + _REST, False): "dbrx",
    (_WORDS + r"\p{N}" + _REST, False): "qwen2",
    (f"{_CASED}|{_CAPITALS}" + r"|\p{N}" + _SLASH_REST, True): "tekken",
    (f"{_CASED}{_SUFFIX}|{_CAPITALS}{_SUFFIX}" + r"|\p{N}{1,3}" + _SLASH_REST, False): "gpt-4o",
}
"""(first cut, whether a word of the vocabulary is taken before merging) → llama.cpp's name for it."""

KNOWN_ENDS = frozenset(
    {"<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<|end_of_text|>"}
)
"""Ends that llama.cpp knows by their text."""
_NOT_STRIPPING = frozenset({"<unk>", "<s>", "<|endoftext|>"})
"""What llama.cpp leaves out where it drops white space after Phi-3's special tokens."""
_PHI3 = re.compile(r"phi-?3", re.IGNORECASE)
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "\u2581"
_MOST_MISSING = 0.01
_SPACES_AS_MARKS = ({"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},)
_CURE = "Export with --form merged-fp16 and serve it with transformers or vLLM."


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer in GGUF's words.

    Attributes:
        values: The metadata.
        strips_like_phi3: Whether white space after special tokens is dropped.
        warnings: What llama.cpp will do otherwise.
    """

    values: Mapping[str, Value]
    strips_like_phi3: bool
    warnings: tuple[Warned, ...]

    def title(self, title: str) -> str:
        """The model's name, such that llama.cpp, which reads it, drops white space only where it must."""
        if self.strips_like_phi3:
            return title if _PHI3.search(title) else f"{title} (Phi-3)"
        return _PHI3.sub("Phi 3", title)


def read_vocabulary(folder: Path, *, rows: int, adds_bos: bool | None = None) -> Vocabulary:
    """The tokenizer of a model folder.

    Args:
        folder: It has the tokenizer, its template and the generation config.
        rows: Of the embedding; those without a token are filled up.
        adds_bos: Whether texts begin with the first token; None: as the tokenizer does it.

    Raises:
        BadExport: It has tokens beyond the embedding.
        BadModel: It cannot be read.
        Unsupported: llama.cpp would make other tokens of some texts.
    """
    tokenizer = read_tokenizer(folder)
    facts = json.loads(tokenizer.backend_tokenizer.to_str())
    _check_model(facts)
    tokens = _tokens(facts, rows=rows)
    is_pieces = bool(facts["model"].get("byte_fallback"))
    values: dict[str, Value] = {}
    values |= _pieces(facts, tokens) if is_pieces else _byte_level(facts)
    values["tokenizer.ggml.tokens"] = [
        token.replace(_SPACE, " ") if is_pieces and kind == TokenType.USER_DEFINED else token
        for token, kind in tokens
    ]
    values["tokenizer.ggml.token_type"] = [int(kind) for _, kind in tokens]
    ends, warnings = _ends(tokenizer, folder)
    values |= _special(tokenizer, ends)
    bos = starts_with_bos(tokenizer) if adds_bos is None else adds_bos
    values |= {"tokenizer.ggml.add_bos_token": bos, "tokenizer.ggml.add_eos_token": False}
    return Vocabulary(values | _templates(tokenizer), _strips(facts["added_tokens"]), warnings)


def _tokens(facts: Mapping[str, Any], *, rows: int) -> list[tuple[str, TokenType]]:
    """Every token by its id, and its kind."""
    vocabulary: dict[str, int] = facts["model"]["vocab"]
    texts = {index: text for text, index in vocabulary.items()}
    kinds: dict[int, TokenType] = {}
    if facts["model"].get("byte_fallback"):
        bytes_ = {index: text for text, index in vocabulary.items() if _BYTE.fullmatch(text)}
        texts |= bytes_  # Gemma's tab has the number of its byte, too
        kinds = dict.fromkeys(bytes_, TokenType.BYTE)
    for token in facts["added_tokens"]:
        texts[token["id"]] = token["content"]
        kinds[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    beyond = [text for index, text in texts.items() if index >= rows]
    if beyond:
        raise BadExport(
            f"The tokenizer has {beyond[0]!r} and {len(beyond) - 1} more beyond the embedding's {rows} rows.",
            cure="Take model and tokenizer from one run.",
        )
    return [
        (texts[index], kinds.get(index, TokenType.NORMAL))
        if index in texts
        else (f"[PAD{index}]", TokenType.UNUSED)
        for index in range(rows)
    ]


def _check_model(facts: Mapping[str, Any]) -> None:
    model = facts["model"]
    if model.get("type") != "BPE":
        raise Unsupported(
            f"The tokenizer is of the kind {model.get('type')!r}, which is not written to GGUF here.",
            cure=_CURE,
        )
    odd = [
        field for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(field)
    ]
    left = [token["content"] for token in facts["added_tokens"] if token["lstrip"] or token["single_word"]]
    if odd or left:
        what = f"{odd[0]} = {model[odd[0]]!r}" if odd else f"{left[0]!r}, which takes the text around it in"
        raise Unsupported(f"The tokenizer has {what}; llama.cpp does not do that.", cure=_CURE)


def _strips(added: Iterable[Mapping[str, Any]]) -> bool:
    """Whether white space is dropped after the tokens after which llama.cpp drops it for Phi-3.

    Raises:
        Unsupported: After others.
    """
    tokens = list(added)
    stripping = {token["content"] for token in tokens if token["rstrip"]}
    if not stripping:
        return False
    wanted = {token["content"] for token in tokens} - _NOT_STRIPPING
    has_all = {token["content"] for token in tokens} >= _NOT_STRIPPING | {"</s>"}
    if stripping != wanted or not has_all:
        raise Unsupported(
            f"The tokenizer drops white space after {min(stripping)!r}; llama.cpp does so for Phi-3's tokens "
            "alone.",
            cure=_CURE,
        )
    return True


def _byte_level(facts: Mapping[str, Any]) -> dict[str, Value]:
    cut = _first_cut(facts["pre_tokenizer"])
    normalizer = facts["normalizer"]
    if normalizer not in (None, {"type": "NFC"}, {"type": "Sequence", "normalizers": []}):
        cut = None
    pre = _PRE_TOKENIZERS.get((cut or "", bool(facts["model"].get("ignore_merges"))))
    if pre is None:
        raise Unsupported(
            "The tokenizer cuts text in a way that llama.cpp has no name for: "
            f"{json.dumps(facts['pre_tokenizer'], ensure_ascii=False)[:200]}.",
            cure=_CURE,
        )
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in facts["model"]["merges"]],
    }


def _first_cut(step: Mapping[str, Any] | None) -> str | None:
    """The pattern a text is cut by before merging; None if it is no plain pattern and bytes after it."""
    steps = list(step["pretokenizers"]) if step and step["type"] == "Sequence" else [step or {}]
    last = steps.pop()
    if last.get("type") != "ByteLevel" or last["add_prefix_space"] or len(steps) > 1:
        return None
    if not steps:
        return _GPT2 if last["use_regex"] else None
    first = steps[0]
    if first["type"] == "Digits" and first["individual_digits"] and last["use_regex"]:
        return _DIGITS + _GPT2
    is_split = first["type"] == "Split" and (first["behavior"], first["invert"]) in (
        ("Isolated", False), ("Removed", True),
    )  # fmt: skip
    if not is_split or last["use_regex"]:
        return None
    pattern = first["pattern"].get("Regex")
    return pattern if isinstance(pattern, str) else None


def _pieces(facts: Mapping[str, Any], tokens: Sequence[tuple[str, TokenType]]) -> dict[str, Value]:
    first, last = _ranks(facts["model"]["merges"])
    _check_pieces(facts, tokens, first=first, last=last)
    scores = [
        -float(first.get(text, 0)) if kind in (TokenType.NORMAL, TokenType.BYTE) else -1000.0
        for text, kind in tokens
    ]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": _adds_space(facts),
    }


def _ranks(merges: Sequence[Sequence[str]]) -> tuple[dict[str, int], dict[str, int]]:
    """Of each token the ranks of the first and of the last merge that makes it."""
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        text = "".join(pair)
        first.setdefault(text, rank)
        last[text] = rank
    return first, last


def _check_pieces(
    facts: Mapping[str, Any],
    tokens: Sequence[tuple[str, TokenType]],
    *,
    first: Mapping[str, int],
    last: Mapping[str, int],
) -> None:
    """Finds merges that no scores could give.

    With scores every pair whose result is a token may merge, and all pairs of one result rank alike. A few
    pairs are missing in published files, too.

    Raises:
        Unsupported: The merges are not a SentencePiece's.
    """
    order = sorted(first, key=first.__getitem__)
    mixed = any(last[one] > first[other] for one, other in pairwise(order))
    pairs = {tuple(pair) for pair in facts["model"]["merges"]}
    normal = {text for text, kind in tokens if kind == TokenType.NORMAL}
    missing = sum(
        any(
            text[:cut] in normal and text[cut:] in normal and (text[:cut], text[cut:]) not in pairs
            for cut in range(1, len(text))
        )
        for text in normal
    )
    if mixed or missing > _MOST_MISSING * len(normal):
        raise Unsupported(
            "The tokenizer's merges are not those of a SentencePiece model; llama.cpp needs one with pieces.",
            cure=_CURE,
        )


def _adds_space(facts: Mapping[str, Any]) -> bool:
    """Whether a text gets a space in front, also after a special token.

    A tokenizer that puts it at the very start alone never does in a prompt that begins with a special token:
    there llama.cpp's "no" is exact.

    Raises:
        Unsupported: The text is changed in another way.
    """
    normalizer, cut = facts["normalizer"], facts["pre_tokenizer"]
    steps = normalizer["normalizers"] if normalizer and normalizer["type"] == "Sequence" else [normalizer]
    prepends = [step for step in steps if step and step == {"type": "Prepend", "prepend": _SPACE}]
    others = [step for step in steps if step and step not in prepends and step not in _SPACES_AS_MARKS]
    if not others and cut is None:
        return bool(prepends)
    if not others and not prepends and cut["type"] == "Metaspace" and not cut.get("split", True):
        return bool(cut.get("prepend_scheme") == "always")
    is_idle = cut is not None and cut["type"] == "Split" and cut["pattern"] == {"String": " "}
    if not others and is_idle and normalizer is not None:
        return bool(prepends)  # there is no space left to cut at
    raise Unsupported(
        "The tokenizer changes text in a way that llama.cpp does not: "
        f"{json.dumps([normalizer, cut], ensure_ascii=False)[:200]}.",
        cure=_CURE,
    )


def _ends(tokenizer: PreTrainedTokenizerFast, folder: Path) -> tuple[list[int], tuple[Warned, ...]]:
    """Tokens that end an answer, the three first of which a file can name, and what is left over."""
    declared = declared_ends(tokenizer, folder)
    texts = {index: str(tokenizer.convert_ids_to_tokens(index)) for index in declared}
    own = tokenizer.eos_token_id
    ends = sorted(declared, key=lambda index: (index != own, texts[index] in KNOWN_ENDS, index))
    lost = [texts[index] for index in ends[3:] if texts[index] not in KNOWN_ENDS]
    if not lost:
        return ends[:3], ()
    warned = Warned(
        message=f"A GGUF file names three tokens that end an answer; {', '.join(lost)} will not end one.",
        cure="Give them as stop words where the file is served.",
    )
    return ends[:3], (warned,)


def _special(tokenizer: PreTrainedTokenizerFast, ends: Sequence[int]) -> dict[str, Value]:
    named: dict[str, object] = {
        **dict(zip(("eos", "eot", "eom"), ends, strict=False)),
        "bos": tokenizer.bos_token_id,
        "padding": tokenizer.pad_token_id,
        "unknown": tokenizer.unk_token_id,
    }
    return {
        f"tokenizer.ggml.{name}_token_id": index for name, index in named.items() if isinstance(index, int)
    }


def _templates(tokenizer: PreTrainedTokenizerFast) -> dict[str, Value]:
    template = tokenizer.chat_template
    if isinstance(template, str):
        return {"tokenizer.chat_template": template}
    if not isinstance(template, dict):
        return {}
    others = sorted(name for name in template if name != "default")
    values: dict[str, Value] = {f"tokenizer.chat_template.{name}": template[name] for name in others}
    if others:
        values["tokenizer.chat_templates"] = others
    if "default" in template:
        values["tokenizer.chat_template"] = template["default"]
    return values
