"""The card of an export: what it was made from, how, and what was measured. Only what is known.

Written as Markdown with the front matter that model hubs read. It names files, never folders of this machine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from qadapt.adapters.facts import PEFT_FILES, SIDE_CAR_FILES, AdapterFacts, mends_base
from qadapt.events import BasesCompared, Evaluated, Event, MemoryMeasured, Planned, RunStarted, StepDone
from qadapt.export.llama_quantize import K_FORMS
from qadapt.units import format_bytes

_BASE_WORDS = {
    "dequantized": "the weights of the base as the adapter saw them in training, dequantized",
    "original": "the published weights of the base",
}


@dataclass(frozen=True)
class CardFacts:
    """What a card can tell about a run; what is empty is left out.

    Attributes:
        model: The base: a hub id, an alias, or the name of its folder or file.
        revision: Its commit on a hub.
        licence: Its licence.
        recipe: The recipe as text.
        data: Names of the training data.
        data_hash: Of the prepared rows.
        losses: Mean losses per supervised token, by what they were measured on.
        predicted_peak_bytes: Of a step, by the plan; 0: not known. So too the next.
        measured_peak_bytes: Of the whole run.
        device: What it ran on.
        parts: What the adapter was made of, if of others: the name of each, and its weight.
    """

    model: str = ""
    revision: str | None = None
    licence: str | None = None
    recipe: str = ""
    data: tuple[str, ...] = ()
    data_hash: str = ""
    losses: Mapping[str, float] = field(default_factory=dict)
    predicted_peak_bytes: int = 0
    measured_peak_bytes: int = 0
    device: str = ""
    parts: tuple[tuple[str, float], ...] = ()

    def with_licence_of(self, model_folder: Path) -> CardFacts:
        """The same with the licence that the base's own card names, unless one is given."""
        return replace(self, licence=self.licence or licence_of(model_folder))


@dataclass(frozen=True)
class Made:
    """What was made of a run, and what was found out about it.

    Attributes:
        form: The form, such as `merged-fp16`.
        base: Weights it was merged on, `dequantized` or `original`; empty for an adapter alone.
        file: Name of the one file to use, for forms that have one.
        findings: One sentence each: which base is better, what the proof compared.
        is_proven: Whether it was proven.
        method: How the adapter was trained.
        rank: Of an adapter alone that is plain LoRA (`served_rank`), else 0.
        mended: How the base was held that an adapter alone mends (`AdapterFacts.mends_base`), else empty.
        terms: Names of its files with terms of use.
    """

    form: str
    base: str = ""
    file: str = ""
    findings: Sequence[str] = ()
    is_proven: bool = True
    method: str = "low-rank adaptation"
    rank: int = 0
    mended: str = ""
    terms: Sequence[str] = ()


def card_facts(
    facts: AdapterFacts,
    events: Iterable[Event],
    *,
    recipe: str,
    data: tuple[str, ...] = (),
    data_hash: str = "",
) -> CardFacts:
    """What a card tells about a finished run.

    Args:
        facts: What the adapter was trained on.
        events: The run's events that count (`view.journal.effective`).
        recipe: The recipe as text.
        data: Names of the training data.
        data_hash: Of the prepared rows.
    """
    trained: dict[int, float] = {}
    held_out: dict[int, float] = {}
    card = CardFacts(facts.shown_base, facts.revision, recipe=recipe, data=data, data_hash=data_hash)
    for event in events:
        match event:
            case StepDone():
                trained[event.step] = event.loss
            case Evaluated():
                held_out[event.step] = event.loss
            case RunStarted():
                card = replace(card, device=event.device)
            case Planned():
                card = replace(card, predicted_peak_bytes=event.predicted_peak_bytes)
            case MemoryMeasured():
                card = replace(card, measured_peak_bytes=event.peak_bytes)
    losses = {}
    if trained:
        losses[f"training rows of step {max(trained)}"] = trained[max(trained)]
    if held_out:
        best = min(held_out, key=held_out.__getitem__)
        losses[f"held-out rows after step {best}, the best"] = held_out[best]
    return replace(card, losses=losses)


def comparison(found: BasesCompared) -> str:
    """How the merges on both bases compare, as a sentence."""
    first, second = (f"{found.losses[base]:.4f} on the {base} base" for base in ("dequantized", "original"))
    return (
        f"Held-out loss per learned token: {first}, {second}; the difference is between {found.low:+.4f} and "
        f"{found.high:+.4f} (95 %, {found.rows:,} rows, {found.tokens:,} tokens). Better: {found.better}; "
        f"merged on: {found.base}."
    )


def licence_of(model_folder: Path) -> str | None:
    """The licence in the front matter of a model folder's card; none if there is no such line."""
    path = model_folder / "README.md"
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8", errors="replace")
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    line = re.search(r"^license:[ \t]*(\S+)[ \t]*$", front[1], re.MULTILINE) if front else None
    return line[1] if line else None


def served_rank(folder: Path) -> int:
    """The rank of the adapter in a folder, if it is LoRA and nothing else, as servers know it; else 0."""
    path = folder / PEFT_FILES[1]
    if not path.is_file():
        return 0
    config = json.loads(path.read_text(encoding="utf-8"))
    is_plain = config["peft_type"] == "LORA" and not any(config.get(name) for name in _BESIDE_PAIRS)
    return int(config["r"]) if is_plain and not mends_base(folder) else 0


def card_text(facts: CardFacts, made: Made) -> str:
    """The card as Markdown.

    Args:
        facts: What is known of the run.
        made: What was made of it.
    """
    kind = _kind_of(made)
    front = ["---", f"library_name: {kind.library}", "pipeline_tag: text-generation"]
    if facts.revision:  # only what is on a hub can be linked to
        front += [f"base_model: {facts.model}", f"base_model_relation: {kind.relation}"]
    if facts.licence:
        front.append(f"license: {facts.licence}")
    front += ["tags:", "- qlora", "- qadapt", "---", ""]
    return "\n".join([*front, *_body(facts, made, kind)]) + "\n"


def _kind_of(made: Made) -> _Kind:
    form = made.form
    if form in K_FORMS:
        return replace(_KINDS["gguf"], numbers=_BY_LLAMA_QUANTIZE)
    if form == "adapter" and made.file in SIDE_CAR_FILES:
        return replace(_KINDS["adapter"], library="qadapt", use=_SIDE_CAR)
    if form == "adapter" and (limit := next((each for each in _SERVED_RANKS if 0 < made.rank <= each), 0)):
        served = f"vllm serve {{base}} --enable-lora --max-lora-rank {limit} --lora-modules tuned=."
        return replace(_KINDS["adapter"], use=f"{_PEFT}\n\nWith vLLM: `{served}`")
    if form == "adapter" and made.mended:
        return replace(_KINDS["adapter"], use=f"{_PEFT}\n\n{_MENDING.format(held=made.mended)}")
    return _KINDS[form if form in _KINDS else form.partition("-")[0]]


def _body(facts: CardFacts, made: Made, kind: _Kind) -> list[str]:
    name = f"`{facts.model}`" if facts.model else "a base model"
    at = f" at revision `{facts.revision}`" if facts.revision else ""
    lines = [
        f"# A fine-tuned {facts.model or 'model'}",
        "",
        f"Made from {name}{at} by {made.method}; {kind.what}.",
        "",
        f"* Form: {made.form}; {kind.numbers}.",
    ]
    if made.base:
        lines.append(f"* Merged on {_BASE_WORDS[made.base]}.")
    if facts.parts:
        parts = (f"`{name}` times {weight:g}" for name, weight in facts.parts)
        lines.append(f"* The adapter was made of others: {', '.join(parts)}.")
    lines += [f"* Trained on `{source}`." for source in facts.data]
    if facts.data_hash:
        lines.append(f"* The rows as tokens have the hash `{facts.data_hash}`.")
    lines += [f"* Loss per supervised token, {what}: {loss:.4f}." for what, loss in facts.losses.items()]
    lines += _memory(facts)
    if facts.licence:
        lines.append(f"* Licence of the base: {facts.licence}.")
    if made.terms:
        lines.append(f"* Terms of use: {', '.join(f'`{name}`' for name in made.terms)}.")
    lines += ["", "## Proof", "", *_proof(made)]
    lines += [
        "",
        "## Use",
        "",
        *kind.use.format(base=facts.model or "the base model", file=made.file).splitlines(),
    ]
    if facts.recipe:
        lines += ["", "## Recipe", "", "```yaml", *facts.recipe.strip().splitlines(), "```"]
    return lines


def _memory(facts: CardFacts) -> list[str]:
    known = {"predicted": facts.predicted_peak_bytes, "measured": facts.measured_peak_bytes}
    said = [f"{format_bytes(count)} {word}" for word, count in known.items() if count]
    where = f" on {facts.device}" if facts.device else ""
    return [f"* Memory of a step{where}: {', '.join(said)}."] if said else []


def _proof(made: Made) -> list[str]:
    found = [f"* {finding}" for finding in made.findings]
    return found if made.is_proven else [*found, "None: this export was made with `--no-proof`."]


@dataclass(frozen=True)
class _Kind:
    """What a card says of all exports of a kind."""

    library: str
    relation: str
    what: str
    numbers: str
    use: str


_TRANSFORMERS = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this card lies
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```"""
_BITSANDBYTES = f"{_TRANSFORMERS}\n\nIt needs `bitsandbytes`; the quantization stands in config.json."
_PEFT = """\
```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this card lies
base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, folder)
tokenizer = AutoTokenizer.from_pretrained("{base}")  # from the folder, if it holds one
```"""
_MENDING = """\
Load the base as it was held in training, by bitsandbytes: {held}. The adapter began as what that took from
the weights; on the published ones it would mend an error that is not there."""
_SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM can be told as the highest rank; it takes 16 by itself."""
_BESIDE_PAIRS = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices")
"""Settings of adapters that have more than low-rank pairs, which vLLM refuses."""
_SIDE_CAR = """\
With qadapt: `qadapt chat FOLDER`, FOLDER being where this card lies. What {file} holds works beside the
base's weights, so no other program reads it."""
_GGUF = """\
With llama.cpp: `llama-cli -m {file} -cnv`. With Ollama: `ollama create tuned -f Modelfile`, then
`ollama run tuned`."""
_GGUF_LORA = "With llama.cpp: `llama-cli -m BASE.gguf --lora {file} -cnv`, BASE.gguf being the base as GGUF."
_MERGED = "the adapter is merged into the weights"
_BY_LLAMA_QUANTIZE = (
    "every weight computed in fp32, rounded to fp16, and quantized by llama.cpp's llama-quantize"
)
_KINDS = {
    "merged": _Kind(
        "transformers", "finetune", _MERGED, "every weight computed in fp32 and rounded once", _TRANSFORMERS
    ),
    "bnb": _Kind(
        "transformers",
        "quantized",
        f"{_MERGED}, and these are quantized anew",
        "linear layers in NF4 with double quantization, all else in 16 bits",
        _BITSANDBYTES,
    ),
    "gguf": _Kind("gguf", "quantized", _MERGED, "every weight computed in fp32 and stored once", _GGUF),
    "gguf-lora": _Kind("gguf", "adapter", "this is the adapter alone", "the numbers of the run", _GGUF_LORA),
    "adapter": _Kind(
        "peft", "adapter", "this is the adapter alone", "the numbers of the run, unchanged", _PEFT
    ),
}
