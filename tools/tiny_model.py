"""Tiny random models of the real architectures, whole folders, made in a blink: what tests train and export.

Each family has the structure of its published chat template (written anew for plain turns, without the
parts for tools), its special tokens, and the habits that trip code up: Llama puts a date into every
system turn, Mistral has no padding token, Mistral and Gemma refuse a system turn, Gemma's turns end with
a token that is not its end token, Qwen3 writes an empty thought into the last answer, Phi-3 closes a
conversation with a second end token, vocabularies are padded beyond the tokenizer. The tokenizer is byte-
level BPE learned from the demo's task, so every text can be written. Knows nothing of qadapt.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from demo_task import make_rows
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

LLAMA = """{{ bos_token }}<|start_header_id|>system<|end_header_id|>

Cutting Knowledge Date: December 2023
Today Date: 26 Jul 2024

{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}\
{% set messages = messages[1:] %}{% endif %}\
<|eot_id|>{% for turn in messages %}<|start_header_id|>{{ turn.role }}<|end_header_id|>

{{ turn.content | trim }}<|eot_id|>{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
MISTRAL = """{{ bos_token }}{% for turn in messages %}\
{% if turn.role != ['user', 'assistant'][loop.index0 % 2] %}\
{{ raise_exception('Only user and assistant turns are supported, and they must alternate') }}{% endif %}\
{% if turn.role == 'user' %}[INST] {{ turn.content }}[/INST]\
{% else %}{{ ' ' + turn.content + eos_token }}{% endif %}{% endfor %}"""
CHATML = """{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nDEFAULT<|im_end|>\n' }}{% endif %}\
{% for turn in messages %}{{ '<|im_start|>' + turn.role + '\n' + turn.content + '<|im_end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
QWEN3 = """{% for turn in messages %}{{ '<|im_start|>' + turn.role + '\n' }}\
{% if turn.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}\
{{ turn.content + '<|im_end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}\
{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}\
{% endif %}"""
GEMMA = """{{ bos_token }}{% for turn in messages %}\
{% if turn.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}\
{{ '<start_of_turn>' + ('model' if turn.role == 'assistant' else turn.role) + '\n' }}\
{{ turn.content | trim }}{{ '<end_of_turn>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
PHI3 = """{% for turn in messages %}{{ '<|' + turn.role + '|>\n' + turn.content + '<|end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""


@dataclass(frozen=True)
class Family:
    """What is particular to an architecture's published instruct models."""

    model_type: str
    specials: tuple[str, ...]
    eos: str
    template: str
    bos: str | None = None
    pad: str | None = None
    stops: tuple[str, ...] = ()
    """Tokens besides `eos` that end an answer, as in the generation config."""
    starts_with_bos: bool = False
    """Whether plain encoding puts `bos` first (twice, then, for text that a template has already opened)."""
    plain: tuple[str, ...] = ()
    """Added tokens that decoding does not skip."""
    tied: bool = False


CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
FAMILIES = {
    "llama": Family(
        "llama",
        (
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
            "<|finetune_right_pad_id|>",
        ),
        eos="<|eot_id|>",
        bos="<|begin_of_text|>",
        pad="<|finetune_right_pad_id|>",
        stops=("<|end_of_text|>",),
        starts_with_bos=True,
        template=LLAMA,
    ),
    "mistral": Family(
        "mistral",
        ("<unk>", "<s>", "</s>", "[INST]", "[/INST]"),
        eos="</s>",
        bos="<s>",
        starts_with_bos=True,
        template=MISTRAL,
    ),
    "qwen2": Family(
        "qwen2",
        CHATML_TOKENS,
        eos="<|im_end|>",
        pad="<|endoftext|>",
        stops=("<|endoftext|>",),
        template=CHATML.replace(
            "DEFAULT", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
        ),
    ),
    "qwen3": Family(
        "qwen3",
        CHATML_TOKENS,
        eos="<|im_end|>",
        pad="<|endoftext|>",
        stops=("<|endoftext|>",),
        plain=("<think>", "</think>"),
        template=QWEN3,
    ),
    "gemma2": Family(
        "gemma2",
        ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        eos="<eos>",
        bos="<bos>",
        pad="<pad>",
        stops=("<end_of_turn>",),
        starts_with_bos=True,
        template=GEMMA,
        tied=True,
    ),
    "phi3": Family(
        "phi3",
        ("<unk>", "<s>", "</s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"),
        eos="<|endoftext|>",
        bos="<s>",
        pad="<|endoftext|>",
        stops=("<|end|>", "<|assistant|>"),
        template=PHI3,
    ),
    "smollm2": Family(
        "llama",
        CHATML_TOKENS,
        eos="<|im_end|>",
        bos="<|im_start|>",
        pad="<|im_end|>",
        template=CHATML.replace(
            "DEFAULT", "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
        ),
        tied=True,
    ),
}


def make_tiny_model(
    folder: Path,
    family: str,
    *,
    layers: int = 2,
    width: int = 64,
    vocabulary: int = 448,
    context: int = 512,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Path:
    """Writes a random model: config, safetensors, tokenizer with chat template, generation config.

    Args:
        folder: Made if missing.
        family: A key of `FAMILIES`.
        layers: Decoder layers.
        width: Hidden width, a multiple of 64 (a block of NF4); the feed-forward layer is twice as wide.
        vocabulary: Rows of the embedding, at least 320; the tokenizer takes up to 16 fewer.
        context: The longest sequence.
        dtype: What the weights are stored as.
        seed: The same seed gives the same weights.
    """
    facts = FAMILIES[family]
    tokenizer = make_tokenizer(family, vocabulary=vocabulary - 16)
    values: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 16,
        "num_key_value_heads": width // 32,
        "head_dim": 16,
        "max_position_embeddings": context,
        "initializer_range": 0.08,  # wide enough for answers that differ from prompt to prompt
        "tie_word_embeddings": facts.tied,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if facts.model_type == "gemma2":
        values |= {"query_pre_attn_scalar": 16, "sliding_window": 64}
    config = AutoConfig.for_model(facts.model_type, **values)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    stops = tokenizer.convert_tokens_to_ids([facts.eos, *facts.stops])
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=stops, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_tokenizer(family: str, *, vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most so many entries, with the family's tokens and template."""
    facts = FAMILIES[family]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(facts.plain),
        special_tokens=list(facts.specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rows = make_rows(40, 0, held_out=False)
    tokenizer.train_from_iterator((turn["content"] for row in rows for turn in row["messages"]), trainer)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in facts.plain])
    if facts.starts_with_bos and facts.bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{facts.bos} $A", special_tokens=[(facts.bos, tokenizer.token_to_id(facts.bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=facts.bos,
        eos_token=facts.eos,
        pad_token=facts.pad,
        unk_token="<unk>" if "<unk>" in facts.specials else None,
        chat_template=facts.template,
        clean_up_tokenization_spaces=False,
        model_max_length=1_000_000,
    )
