"""The prompt contract: how a conversation becomes tokens, and which of them are learned.

The model's own chat template renders; nothing is guessed from marker strings. What an assistant turn adds is
found by rendering the conversation up to that turn twice, without and with it, and must be a continuation of
the text before it; a template for which this does not hold is refused by name. The same contract serves
training, evaluation and generation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qadapt.data.conversation import Conversation
from qadapt.data.new_tokens import add_new_tokens
from qadapt.data.tokens import Tokens, tokens_of
from qadapt.errors import BadData, BadModel


class PromptContract:
    """Template, special tokens and mask rule of one model.

    Args:
        tokenizer: The model's fast tokenizer, with a chat template.
        end_ids: Tokens that end an answer (the tokenizer's end token and the model's own list).
        new_ids: Tokens that the recipe added to the tokenizer.

    Raises:
        BadModel: The tokenizer has no chat template.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, end_ids: frozenset[int], new_ids: tuple[int, ...] = ()
    ) -> None:
        if not tokenizer.chat_template:
            raise BadModel(
                "The model's tokenizer has no chat template, so a conversation has no form it knows.",
                cure="Train the instruct form of the model, or add a chat_template.jinja to its folder.",
            )
        self.tokenizer = tokenizer
        self.end_ids = end_ids
        self.new_ids = new_ids

    @property
    def fingerprint(self) -> str:
        """SHA-256 over what decides the tokens: template, end tokens and new ones."""
        facts: dict[str, object] = {
            "template": self.tokenizer.chat_template,
            "end_ids": sorted(self.end_ids),
        }
        if self.new_ids:
            facts["new_tokens"] = self.tokenizer.convert_ids_to_tokens(list(self.new_ids))
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @property
    def pad_id(self) -> int:
        """The token that fills rows up; it is never learned, so any will do."""
        pad = self.tokenizer.pad_token_id
        return pad if isinstance(pad, int) else min(self.end_ids)

    def encode(self, conversation: Conversation) -> Tokens:
        """The row as tokens; learned are the assistant's turns, each with its end token.

        Raises:
            BadData: The template refuses the conversation, or its turns cannot be told apart.
        """
        turns, place = conversation.turns, conversation.place
        text = self._render(turns, place=place)
        spans = [
            self._span(text, turns[: number + 1], place=place)
            for number, turn in enumerate(turns)
            if turn["role"] == "assistant"
        ]
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        supervised = [
            any(start <= first < last <= end for start, end in spans)
            for first, last in encoded["offset_mapping"]
        ]
        return tokens_of(encoded["input_ids"], supervised, place=place)

    def prompt_ids(self, turns: Sequence[dict[str, str]], *, place: str = "the prompt") -> list[int]:
        """The tokens that ask the model for the next assistant turn."""
        text = self._render(list(turns), place=place, asks=True)
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def text(self, ids: Sequence[int]) -> str:
        """The text of an answer's tokens, without special ones."""
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        assert isinstance(text, str)
        return text

    def ends_turns(self, row: Tokens) -> bool:
        """Whether the last learned token of a row is an end token, so that the model learns to stop."""
        learned = row.ids[row.supervised]
        return bool(len(learned)) and int(learned[-1]) in self.end_ids

    def _span(self, text: str, turns: list[dict[str, str]], *, place: str) -> tuple[int, int]:
        """Characters of the last of `turns`, an assistant's, in the text of the whole conversation."""
        before = self._render(turns[:-1], place=place, asks=True)
        until = self._render(turns, place=place)
        if text.startswith(before) and until.startswith(before):
            if text.startswith(until):
                return len(before), len(until.rstrip())
            # Earlier turns may lose a part (Qwen3's reasoning) or the text's end (Phi-3), but end alike.
            content = turns[-1]["content"].strip()
            answered = len(before) + len(content)
            ending = _common_start(text[answered:], until.rpartition(content)[2]).rstrip()
            if content and ending and text.startswith(content, len(before)):
                return len(before), answered + len(ending)
        raise BadData(
            f"{place}: the model's chat template does not render the answer in message {len(turns)} as a "
            "continuation of what stands before it, so what to learn cannot be told for sure.",
            cure="Keep one question and one answer per row for this model.",
        )

    def _render(self, turns: list[dict[str, str]], *, place: str, asks: bool = False) -> str:
        try:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=asks)
        except TemplateError as error:
            raise BadData(
                f"{place}: the model's chat template refuses the conversation: {error}",
                cure="Change the roles of the row to what the model knows.",
            ) from None
        assert isinstance(text, str)
        return text


def _common_start(left: str, right: str) -> str:
    same = takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False))
    return "".join(character for character, _ in same)


def load_contract(folder: Path, *, new_tokens: Sequence[str] = ()) -> PromptContract:
    """The contract of a model folder.

    Args:
        folder: A whole model folder.
        new_tokens: Special tokens to add to the tokenizer.

    Raises:
        BadModel: The tokenizer cannot be read, or has no chat template.
        BadRecipe: A new token is no new one.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise BadModel(
            f"The tokenizer in {folder} cannot be read: {reason}", cure="Get the model again."
        ) from None
    new_ids = add_new_tokens(tokenizer, new_tokens)
    end_ids = {tokenizer.eos_token_id} | _generation_ends(folder)
    known = frozenset(token for token in end_ids if token is not None)
    return PromptContract(tokenizer, end_ids=known, new_ids=new_ids)


def _generation_ends(folder: Path) -> set[int]:
    path = folder / "generation_config.json"
    if not path.is_file():
        return set()
    ends = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    return set(ends) if isinstance(ends, list) else {ends}
