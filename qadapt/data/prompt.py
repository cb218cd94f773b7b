"""The prompt contract: how a row becomes tokens, and which of them are learned. One object, hashed.

Template, day, special tokens, end tokens, BOS and EOS rule, mask rule and the tokenizer's own identity stand
in it, and it is saved beside the adapter: training, evaluation, chat and export use the same. Of what stands
in `rendering/`, `template.py` renders, `spans.py` and `layouts.py` show by marks which characters are whose,
and `encoding.py` makes tokens of them by where characters went (`places.py`). Knows no files of rows, no
length, no batches.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import date as day_of
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from qadapt.data.conversation import Conversation, Message, Row
from qadapt.data.rendering.encoding import Encoded, Encoder, Refused, Rules
from qadapt.data.rendering.layouts import Layouts, Learn
from qadapt.data.rendering.spans import find_layout, refusal
from qadapt.data.rendering.template import CHATML, CHATML_TOKENS, ChatTemplate, Turns
from qadapt.data.rendering.tokenizer import (
    add_tokens,
    declared_ends,
    embedding_rows,
    identity,
    read_tokenizer,
    special_texts,
    starts_with_bos,
)
from qadapt.errors import BadData, BadModel, BadRecipe, BadRun

CONTRACT_FILE = "prompt.json"
_CHATML_CURE = (
    "Train the instruct form of the model, or set data.template=chatml and "
    f"data.new_tokens=[{', '.join(CHATML_TOKENS)}]."
)


class PromptContract:
    """How rows of one model become tokens.

    Attributes:
        tokenizer: The model's, new tokens included.
        template: None if the model has no chat template: then only documents can be encoded.
        source: What the template is: `auto`, `chatml`, or `file`.
        learn: What is learned: `answers`, `last`, `all`, or roles.
        end_ids: Tokens that end an answer: those the model's files name, and what the template closes with.
        new_ids: Ids of the tokens that were added.
        embedding_rows: Of the model's table; rows with tokens beyond it are refused. No fact: it decides no
            token. None if the model's configuration does not say.

    Args:
        tokenizer: As the attribute.
        template: As the attribute.
        folder: The model's folder, for its own end tokens and the size of its embedding table.
        source: As the attribute.
        learn: As the attribute.
        new_ids: As the attribute.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        template: ChatTemplate | None,
        *,
        folder: Path,
        source: str,
        learn: Learn,
        new_ids: tuple[int, ...],
    ) -> None:
        self.tokenizer, self.template, self.source = tokenizer, template, source
        self.learn, self.new_ids = learn, new_ids
        self.embedding_rows = embedding_rows(folder)
        self._special = special_texts(tokenizer)
        declared = declared_ends(tokenizer, folder)
        ends = _names(tokenizer, declared)
        if template is not None and source != "auto":
            tokenizer.chat_template = template.texts["default"]  # where it is saved, it speaks so
        self._closing = None if template is None else _closing(template, ends, tuple(self._special))
        closing = () if not self._closing or self._closing in ends else (self._special[self._closing],)
        self.end_ids = declared.union(closing)

    @property
    def pad_id(self) -> int:
        """The token that fills rows up; it is never learned, so any will do."""
        pad = self.tokenizer.pad_token_id
        return pad if isinstance(pad, int) else min(self.end_ids, default=0)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the facts."""
        return hashlib.sha256(json.dumps(self.facts(), sort_keys=True).encode()).hexdigest()

    def facts(self) -> dict[str, Any]:
        """Everything that decides the tokens, for `prompt.json`; a day only where the template prints it."""
        template = self.template
        return {
            "version": 1,
            "template": None if template is None else template.texts,
            "source": self.source,
            "date": template.day.isoformat() if template is not None and template.prints_date else None,
            "special_tokens": dict(self.tokenizer.special_tokens_map),
            "starts_with_bos": starts_with_bos(self.tokenizer),
            "end_ids": sorted(self.end_ids),
            "learn": self.learn if isinstance(self.learn, str) else list(self.learn),
            "new_tokens": list(_names(self.tokenizer, self.new_ids)),
            "tokenizer": self._identity,
        }

    def encode(self, row: Row) -> Encoded:
        """The row as tokens, whole.

        Raises:
            BadData: The row cannot be trained on: see `find_layout`; or it begins with the first token twice,
            or has tokens beyond the model's embedding table.
            BadModel: The model has no chat template, or one that ends no answer.
        """
        [encoded] = self.encode_all([row])
        if isinstance(encoded, Refused):
            raise encoded.error
        return encoded

    def encode_all(self, rows: Iterable[Row]) -> Iterator[Encoded | Refused]:
        """The rows as tokens, one after another, each whole or refused.

        Raises:
            BadModel: As `encode`.
        """
        return self._encoder.encode(rows)

    def prompt_ids(
        self, turns: Turns, tools: Sequence[Mapping[str, Any]] = (), *, place: str = "the prompt"
    ) -> list[int]:
        """The tokens that ask the model for the next assistant turn.

        Raises:
            BadData: The template refuses the turns.
            BadModel: The model has no chat template.
        """
        try:
            text = self._chat_template().render(turns, tools=tools, asks=True)
        except TemplateError as error:
            raise refusal(place, error) from None
        ids: list[int] = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def text_ids(self, text: str) -> list[int]:
        """The tokens of a raw text that the model is to go on with, begun as the tokenizer begins one."""
        ids: list[int] = self.tokenizer.backend_tokenizer.encode(text).ids
        return ids

    def text(self, ids: Sequence[int]) -> str:
        """The text of an answer's tokens, without special ones."""
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        assert isinstance(text, str)
        return text

    def _chat_template(self) -> ChatTemplate:
        if self.template is None:
            raise BadModel(
                "The model has no chat template, so a conversation has no form it knows.", cure=_CHATML_CURE
            )
        return self.template

    @cached_property
    def _identity(self) -> str:
        return identity(self.tokenizer)

    @cached_property
    def _layouts(self) -> Layouts:
        template = self._chat_template()
        if self._closing == "":
            raise BadModel(
                "The chat template ends answers with no end token that this tokenizer knows: the model would "
                "never stop.",
                cure=_CHATML_CURE,
            )
        ends = _names(self.tokenizer, self.end_ids)
        return Layouts(template, learn=self.learn, ends=ends, control=tuple(self._control))

    @cached_property
    def _control(self) -> dict[str, int]:
        """Special tokens that no text should hold; a new one that no template writes is there for texts."""
        names, template = _names(self.tokenizer, self.new_ids), self.template
        meant = {name for name in names if template is None or not template.writes(name)}
        return {text: token for text, token in self._special.items() if text not in meant}

    @cached_property
    def _encoder(self) -> Encoder:
        control = {token: text for text, token in self._control.items()}
        rules = Rules(self.learn, self.end_ids, self.new_ids, control, self.embedding_rows)
        # documents need no template, so it is asked for when the first conversation comes
        return Encoder(self.tokenizer, lambda row: self._layouts.of(row), rules=rules)


def load_contract(
    folder: Path,
    *,
    learn: Learn = "answers",
    template: str = "auto",
    date: str | None = None,
    new_tokens: Sequence[str] = (),
) -> PromptContract:
    """The contract of a model folder.

    Args:
        folder: The model's files.
        learn: What is learned.
        template: `auto` (the model's own), `chatml`, or a Jinja file.
        date: The day for templates that print one, as 2026-01-31; None: today.
        new_tokens: Special tokens to add.

    Raises:
        BadModel: The tokenizer cannot be read, or its template is none.
        BadRecipe: A new token is not new, or the template file cannot be read.
    """
    tokenizer = read_tokenizer(folder)
    new_ids = add_tokens(tokenizer, new_tokens)
    return PromptContract(
        tokenizer,
        _compiled(_template_texts(tokenizer, template), tokenizer, date),
        folder=folder,
        source=template if template in ("auto", "chatml") else "file",
        learn=learn,
        new_ids=new_ids,
    )


def saved_contract(adapter: Path, folder: Path) -> PromptContract:
    """The contract an adapter was trained under, on its base as it is now.

    Args:
        adapter: The adapter's folder, with `prompt.json`.
        folder: The base's folder.

    Raises:
        BadRun: The file is missing or damaged, or the base's tokenizer is not what it was.
    """
    return _rebuilt(adapter / CONTRACT_FILE, folder, add_tokens)


def exported_contract(folder: Path) -> PromptContract:
    """The contract of an exported model: its run's, or one without `prompt.json` speaks for itself.

    Raises:
        BadRun: The file is damaged, or the tokenizer beside it is not what the run's was.
        BadModel: As `load_contract`.
    """
    path = folder / CONTRACT_FILE
    return _rebuilt(path, folder, _ids_of) if path.is_file() else load_contract(folder)


def _ids_of(tokenizer: PreTrainedTokenizerFast, names: Sequence[str]) -> tuple[int, ...]:
    """Ids of new tokens that are in a tokenizer already; one that lacks some is not the run's."""
    known = tokenizer.backend_tokenizer.get_vocab() if names else {}
    return tuple(known[name] for name in names if name in known)


def _rebuilt(
    path: Path, folder: Path, new_tokens: Callable[[PreTrainedTokenizerFast, Sequence[str]], tuple[int, ...]]
) -> PromptContract:
    """The contract of a `prompt.json`, with the tokenizer of a folder, against which it is held."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        tokenizer = read_tokenizer(folder)
        new_ids = new_tokens(tokenizer, facts["new_tokens"])
        learn: Any = facts["learn"]
        rule: Learn = learn if isinstance(learn, str) else tuple(learn)  # type: ignore[assignment]
        contract = PromptContract(
            tokenizer,
            _compiled(facts["template"], tokenizer, facts["date"]),
            folder=folder,
            source=facts["source"],
            learn=rule,
            new_ids=new_ids,
        )
        now = contract.facts()
        changed = [name for name in now if now[name] != facts[name]]
    except BadRecipe as error:
        raise BadRun(
            f"The model in {folder} is not what the adapter was trained on: {error.problem}",
            cure="Put the files of its tokenizer back as they were.",
        ) from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise BadRun(
            f"{path} does not tell how the adapter's prompts were made: {error}", cure="Train the run again."
        ) from None
    if changed:
        raise BadRun(
            f"The model in {folder} is not what the adapter was trained on: {', '.join(changed)} changed.",
            cure="Put the files of its tokenizer back as they were.",
        )
    return contract


def _compiled(
    texts: Mapping[str, str] | None, tokenizer: PreTrainedTokenizerFast, day: str | None
) -> ChatTemplate | None:
    if texts is None:
        return None
    date = day_of.today() if day is None else day_of.fromisoformat(day)
    try:
        return ChatTemplate(texts, variables=tokenizer.special_tokens_map, day=date)
    except TemplateError as error:
        raise BadModel(
            f"The chat template is no Jinja template: {error}.", cure="Give another with data.template."
        ) from None


def _template_texts(tokenizer: PreTrainedTokenizerFast, template: str) -> dict[str, str] | None:
    if template == "chatml":
        return {"default": ("{{ bos_token }}" if starts_with_bos(tokenizer) else "") + CHATML}
    if template != "auto":
        try:
            return {"default": Path(template).read_text(encoding="utf-8")}
        except (OSError, UnicodeDecodeError) as error:
            raise BadRecipe(
                f"data.template: {template} cannot be read: {error}",
                cure="Give auto, chatml, or a Jinja file.",
            ) from None
    own = tokenizer.chat_template
    if not own:
        return None
    texts = dict(own) if isinstance(own, dict) else {"default": own}
    if "default" not in texts:
        raise BadModel(
            f"The model has several chat templates ({', '.join(sorted(texts))}) and none for plain rows.",
            cure="Write the one you mean to a file and give it with data.template.",
        )
    return {name: texts[name] for name in ("default", "tool_use") if name in texts}


def _names(tokenizer: PreTrainedTokenizerFast, ids: Iterable[int]) -> tuple[str, ...]:
    return tuple(tokenizer.convert_ids_to_tokens(sorted(ids)))


def _closing(template: ChatTemplate, declared: Sequence[str], special: Sequence[str]) -> str | None:
    """The token that closes an answer, by what the template writes.

    Of the special tokens there, one that the model's files declare goes before one that they do not. Empty if
    none closes it, None if it does not show on a plain row.
    """
    for ends in (declared, special):
        found = [
            _closed_by(template, ends, roles=roles)
            for roles in (("user", "assistant", "user"), ("user", "assistant"))
        ]
        if any(found):
            return next(filter(None, found))
    return None if all(each is None for each in found) else ""


def _closed_by(template: ChatTemplate, ends: Sequence[str], *, roles: Sequence[str]) -> str | None:
    messages = tuple(Message(role, f"c{number}", is_learned=False) for number, role in enumerate(roles))
    try:
        layout, _ = find_layout(Conversation(messages, ""), template, wanted=(1,), ends=ends)
    except BadData:
        return None
    written = layout.text[: layout.spans[0].end]
    return next((end for end in ends if written.endswith(end)), "")
