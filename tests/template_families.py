"""Published chat templates on small tokenizers: what the tests of the prompt contract render with.

`templates/` holds the texts as their makers published them, `families.json` what belongs to each: its special
tokens, those that end an answer, whether plain encoding puts the first token before, and how it cuts words. A
tokenizer is learned anew from a few lines, in one of three structures, for offsets differ between them: bytes
(GPT-2, Llama 3, Qwen), pieces with a blank put before each text (Llama 2), pieces as the text stands (Gemma).
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

FOLDER = Path(__file__).parent / "templates"
LINES = (
    "The answer is in the second line.\n\nUser: what is it? Assistant: it is the answer, and the rest of it.",
    "def two(a):\n    return {'a': a}\n\n### User:\nwhat? ASSISTANT: that. USER: when? <think>\nah\n</think>",
    '{"name": "weather", "arguments": {"city": "Oslo"}}\n[INST] what is the weather? [/INST] It rains there.',
    "You are a helpful assistant.\n\nToday Date: Cutting Knowledge Date: December\n<|user|>\n<|assistant|>\n",
)


@dataclass(frozen=True)
class TemplateFamily:
    """One family: its template and the facts of its tokenizer.

    `ends` are the tokens that end an answer, `strips_right` those that swallow blanks after them; `can` says
    what the template renders besides plain turns: `system`, `tools`, `calls`, `reasoning`. A `dated` template
    prints the day it is rendered, one that `alternates` refuses two turns of one role in a row.
    """

    name: str
    template: str
    sha256: str
    model: str
    pieces: str
    bos: str | None
    eos: str
    specials: tuple[str, ...]
    plain: tuple[str, ...]
    strips_right: tuple[str, ...]
    ends: tuple[str, ...]
    starts_with_bos: bool
    alternates: bool
    dated: bool
    can: tuple[str, ...]

    @property
    def text(self) -> str:
        """The template as published; a changed file is an error."""
        content = (FOLDER / self.template).read_bytes()
        assert hashlib.sha256(content).hexdigest() == self.sha256, f"{self.template} is not as published"
        return content.decode("utf-8")


def _families() -> dict[str, TemplateFamily]:
    table = json.loads((FOLDER / "families.json").read_text(encoding="utf-8"))
    lists = ("specials", "plain", "strips_right", "ends", "can")
    return {
        name: TemplateFamily(name=name, **{**facts, **{key: tuple(facts[key]) for key in lists}})
        for name, facts in table.items()
    }


FAMILIES = _families()


@functools.cache
def family_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The family's tokenizer with its template; made once, not to be changed."""
    family = FAMILIES[name]
    tokenizer = _learn(family.pieces)
    tokenizer.add_special_tokens([_added(family, token) for token in _specials(family)])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in family.plain])
    if family.starts_with_bos and family.bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[(family.bos, tokenizer.token_to_id(family.bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=family.bos,
        eos_token=family.eos,
        chat_template=family.text,
        clean_up_tokenization_spaces=False,
        model_max_length=1_000_000,
    )


def write_family(name: str, folder: Path) -> Path:
    """A model folder without weights: what `load_contract` reads."""
    tokenizer = family_tokenizer(name)
    tokenizer.save_pretrained(folder)
    ends = tokenizer.convert_tokens_to_ids(list(FAMILIES[name].ends))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}), encoding="utf-8")
    return folder


def _specials(family: TemplateFamily) -> list[str]:
    tokens = [token for token in (family.bos, family.eos) if token is not None]
    return list(dict.fromkeys([*tokens, *family.specials]))


def _added(family: TemplateFamily, token: str) -> AddedToken:
    return AddedToken(token, special=True, normalized=False, rstrip=token in family.strips_right)


def _learn(pieces: str) -> Tokenizer:
    """Byte-pair encoding of a few hundred entries; `bytes`, `llama` or `gemma` structure."""
    if pieces == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        tokenizer.train_from_iterator(LINES * 3, trainer)
        return tokenizer
    fallback = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    blanks = normalizers.Replace(" ", "▁")
    prefixed = normalizers.Sequence([normalizers.Prepend("▁"), blanks])
    tokenizer.normalizer = prefixed if pieces == "llama" else blanks
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    # a vocabulary without digits, braces and most letters outside ASCII: those fall back to bytes
    trainer = trainers.BpeTrainer(
        vocab_size=560, special_tokens=fallback, limit_alphabet=60, show_progress=False
    )
    tokenizer.train_from_iterator(LINES * 3, trainer)
    state = json.loads(tokenizer.to_str())
    # the byte tokens are ordinary entries, found by fallback and never by their names in a text
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] == "<unk>"]
    state["pre_tokenizer"] = None
    tokenizer = Tokenizer.from_str(json.dumps(state))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if pieces == "llama" else []))
    return tokenizer
