"""The recipe: everything a run is made of, as nested frozen types.

A recipe says *what* to train; how it is placed in memory is the plan's decision unless `memory` overrules it.
Every number is in the unit its name says; bytes are texts such as `7.3GiB`. `recipe_file.py` reads and checks
the file; this module knows no file. Configuration stops in `running/`: below it, functions take flat
arguments.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from qadapt.errors import BadRecipe
from qadapt.methods import METHODS, Method, Nonlinearity, check_targets, dropped_layers, virtual_tokens
from qadapt.pause_rules import parse_pause_rules
from qadapt.shape import Part
from qadapt.stacking import check_on
from qadapt.units import parse_bytes

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Filled = Annotated[str, Field(min_length=1)]
LEAST_TOKENS = 8
"""Tokens of a row at the least."""
Column = Literal[
    "messages", "conversations", "system", "prompt", "completion", "instruction", "input", "output",
    "question", "answer", "query", "response", "text", "chosen", "rejected", "tools",
]  # fmt: skip
RowFormat = Literal[
    "auto", "messages", "sharegpt", "alpaca", "prompt-completion", "question-answer", "text", "preference",
]  # fmt: skip
Role = Literal["system", "user", "assistant", "tool"]
Form = Literal[
    "merged-fp16", "merged-bf16", "merged-fp32", "bnb-4bit", "adapter", "gguf-lora",
    "gguf-f16", "gguf-bf16", "gguf-q8_0", "gguf-q5_1", "gguf-q5_0", "gguf-q4_1", "gguf-q4_0",
    "gguf-q3_k_m", "gguf-q4_k_s", "gguf-q4_k_m", "gguf-q5_k_m", "gguf-q6_k",
]  # fmt: skip


class Section(BaseModel):
    """A part of a recipe: unknown keys are refused, nothing changes after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ModelSection(Section):
    """The frozen base."""

    source: Filled
    """A hub id, a folder, a `.gguf` file, or the quick-start name `smollm2-135m`."""
    revision: str | None = None
    """The hub revision (branch, tag or commit) to pin; the commit found is recorded in the run."""
    quantization: Literal["nf4", "int8", "none"] = "nf4"
    """How the base is held: 4-bit NormalFloat (QLoRA, arXiv:2305.14314), in rows of 8 bits, or 16-bit."""
    double_quant: bool = True
    """Quantize the quantization constants too (0.516 instead of 0.563 bytes per weight)."""


class AdapterSection(Section):
    """What is trained."""

    method: Method = "lora"
    """LoRA (arXiv:2106.09685), rsLoRA (2312.03732), LoRA+ (2402.12354), DoRA (2402.09353), PiSSA
    (2404.02948), LoftQ (2310.08659), AdaLoRA (2303.10512), VeRA (2310.11454), OFT (2306.07280), IA3
    (2205.05638), bottleneck adapters: houlsby (1902.00751), pfeiffer (2005.00247), parallel (2110.04366),
    compacter, compacterplus (2106.04647); attention over several such, trained before: fusion (2005.00247);
    or what stands in front of the text: prefix, prefix-flat (2101.00190), virtual tokens: prompt
    (2104.08691), ptuning (2103.10385)."""
    rank: Positive = 16
    """Inner width of the low-rank update, or of a bottleneck (the model's width over the reduction
    factor); the length of a prefix; the width of OFT's blocks; how many virtual tokens; of AdaLoRA what
    layers have on average in the end."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """Scale: the update is multiplied by alpha / rank, in rsLoRA by alpha / the root of rank."""
    dropout: Share = 0.0
    """Dropout on the adapter's input."""
    nonlinearity: Nonlinearity = "auto"
    """Of bottleneck adapters, with a layer norm on what enters (`layernorm-gelu`) or without; auto: silu in
    houlsby, gelu in compacter and compacterplus, relu in the others, without."""
    targets: Literal["all-linear"] | Annotated[tuple[Filled, ...], Field(min_length=1)] = "all-linear"
    """Names of the linear layers to adapt (`q_proj`, ...), or all of them but the head. Bottleneck
    adapters: `layers.12-`, for none below layer 12, counted from 0 (AdapterDrop, arXiv:2010.11918). Fusion:
    the trained adapters that are attended over, two or more: runs, names of the store, folders.
    Bottleneck adapters: `on:NAME`, on that trained bottleneck adapter, which stays as it is (a task on a
    language, MAD-X, arXiv:2005.00052)."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Stored type of the adapter; auto: bf16 with compensated updates where bf16 is fast, else fp32, as for
    IA3 and DoRA."""

    @model_validator(mode="after")
    def _has_no_idle_fields(self) -> AdapterSection:
        facts, given = METHODS[self.method], self.model_dump()
        for name in facts.unused:
            if given[name] != type(self).model_fields[name].default:
                raise ValueError(f"{name} = {given[name]} means nothing to {facts.title}; leave it out")
        try:
            dropped_layers(self.method, self.targets)
            check_on(self.method, self.targets)
            check_targets(self.method, self.targets)
        except BadRecipe as error:
            raise ValueError(f"{error.problem} {error.cure}") from None
        if self.rank % facts.size_step:
            raise ValueError(f"rank = {self.rank}; of {facts.title} it is a multiple of {facts.size_step}")
        return self


class SourceSection(Section):
    """Where rows come from."""

    path: Filled
    """A file or folder of rows (JSON, JSON lines, CSV, TSV, Parquet, Arrow, text), or `hub:owner/name`."""
    limit: Positive | None = None
    """Use only the first rows."""
    split: str = "train"
    """The split of a hub dataset, or of a folder that `datasets` saved with several."""
    subset: str | None = None
    """The subset (configuration) of a hub dataset that has several."""
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """How often a pass takes each row of this source: 2 twice, 0.5 a drawn half of them."""


class DataSection(Section):
    """Rows, and how they become tokens."""

    sources: Annotated[tuple[SourceSection, ...], Field(min_length=1)]
    """Files of training rows."""
    format: RowFormat = "auto"
    """What a row looks like; auto recognises it from the keys of each file's first row."""
    columns: dict[Column, Filled] = {}
    """Name of a column in the format → its name in the files, such as {prompt: question_text}."""
    malformed: Literal["error", "skip"] = "error"
    """A row that cannot be used: stop, or leave it out, counted, and listed in the run's folder."""
    held_out: str | None = None
    """Rows that are never trained on, for the evaluation loss: a path as above, or `split:test_sft`."""
    held_out_fraction: Share = 0.0
    """Without a `held_out` file: this share of the rows, drawn by `train.seed`."""
    length: Annotated[int, Field(ge=LEAST_TOKENS)] = 2048
    """The longest row in tokens; of longer ones whole turns at the end are left out, counted; virtual
    tokens are among them."""
    learn: Literal["answers", "last", "all"] | Annotated[tuple[Role, ...], Field(min_length=1)] = "answers"
    """What is learned: every answer, the last one, every token, or the turns of some roles."""
    template: str = "auto"
    """The chat template: the model's own (auto), `chatml`, or a Jinja file."""
    date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")] | None = None
    """The day that templates which print one are given; none: the day the run starts, kept in the run."""
    new_tokens: tuple[Filled, ...] = ()
    """Special tokens to add to the vocabulary, their embeddings trained beside the adapter."""
    packing: Literal["auto"] | bool = "auto"
    """Lay rows of a step one after another, isolated, instead of filling them up; auto: if that is faster."""
    order: Literal["shuffled", "by-length", "given"] = "shuffled"
    """The order of a pass: drawn by `train.seed`; so, but rows of like length together; as in the files."""

    @field_validator("learn", mode="before")
    @classmethod
    def _is_learn(cls, value: object) -> object:
        roles = get_args(Role)
        is_roles = isinstance(value, list | tuple) and value and all(each in roles for each in value)
        if value not in ("answers", "last", "all") and not is_roles:
            raise ValueError(f"give answers, last, all, or a list of roles ({', '.join(roles)})")
        return value

    @field_validator("packing", mode="before")
    @classmethod
    def _is_packing(cls, value: object) -> object:
        if value != "auto" and not isinstance(value, bool):
            raise ValueError("give auto, true or false")
        return value


class TrainSection(Section):
    """The optimization."""

    steps: Positive | None = None
    """Optimizer steps; without it, `epochs` decides."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the rows when `steps` is not given."""
    rows_per_step: Positive = 16
    """Rows whose gradient makes one optimizer step, in as many micro-batches as the memory asks for."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-4
    """The highest learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup_steps: Annotated[int, Field(ge=0)] = 5
    """Steps of linear rise from zero."""
    final_share: Share = 0.1
    """The last learning rate as a share of the highest (cosine and linear)."""
    optimizer: Literal["auto", "adamw", "adamw-8bit"] = "auto"
    """AdamW (arXiv:1711.05101) with fp32 or 8-bit states; auto: 8-bit paged on CUDA, fp32 elsewhere."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """Decay of the mean of the gradients, and of the mean of their squares."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay; it spares IA3's factors, DoRA's magnitudes, biases and norms."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest norm of a step's gradient; none: no clipping."""
    evaluate_every: Positive | None = None
    """Steps between evaluation losses; none: only at the end."""
    patience: Positive | None = None
    """Stop after this many evaluations without a better loss."""
    checkpoint_every: Positive | None = None
    """Steps between saved states; besides, one at evaluations, at the end, and after five minutes without."""
    keep_checkpoints: Positive = 2
    """Newest saved states to keep; the best one is kept besides."""
    keep_every: Positive | None = None
    """Keep for good those whose step is a multiple of this, too; none: no others."""
    sample_prompts: tuple[Filled, ...] = ()
    """What the model is asked at each evaluation and at the end, with the adapter and without it."""
    rehearse: bool = True
    """Put the rows that take the most memory through everything once before step 1; takes a step's time."""
    seed: int = 0
    """Seed of the row order, the held-out draw, the adapter's start and dropout."""

    @model_validator(mode="before")
    @classmethod
    def _betas_apart(cls, values: Any) -> Any:
        """Recipes that earlier releases stored have `beta1` and `beta2`."""
        if not isinstance(values, dict) or "betas" in values or not {"beta1", "beta2"} & values.keys():
            return values
        rest = {name: value for name, value in values.items() if name not in ("beta1", "beta2")}
        return {**rest, "betas": (values.get("beta1", 0.9), values.get("beta2", 0.999))}


class MemorySection(Section):
    """What the plan may use; `auto` leaves the choice to it."""

    budget: str | None = None
    """Bytes the run may take, such as `7.3GiB`; none: what is free on the device now."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto: CUDA if there is any."""
    compute_dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Type of activations and products; auto: by the card, on a CPU by measurement."""
    micro_batch: Literal["auto"] | Positive = "auto"
    """Rows in one forward pass."""
    recompute: Literal["auto", "all", "none"] | Positive = "auto"
    """Activation checkpointing (arXiv:1604.06174) of every layer, of none, or of so many of the first."""
    offload: Literal["auto", "none"] | tuple[Part, ...] = "auto"
    """What stays in the host's memory: input embeddings, head, inputs of recomputed layers, frozen layers.
    On a CPU only those inputs can lie elsewhere, in a temporary file."""

    @field_validator("budget")
    @classmethod
    def _is_amount(cls, value: str | None) -> str | None:
        if value is not None:
            parse_bytes(value)
        return value

    @field_validator("recompute", mode="before")
    @classmethod
    def _is_recompute(cls, value: object) -> object:
        is_count = type(value) is int and value > 0
        if value not in ("auto", "all", "none") and not is_count:
            raise ValueError("give auto, all, none, or how many of the first layers, 1 or more")
        return value

    @field_validator("offload", mode="before")
    @classmethod
    def _is_offload(cls, value: object) -> object:
        is_list = isinstance(value, list | tuple) and value and all(each in get_args(Part) for each in value)
        if value not in ("auto", "none") and not is_list:
            names = ", ".join(get_args(Part))
            raise ValueError(f"give auto, none, or a list such as [embeddings, layers], of {names}")
        if isinstance(value, list | tuple) and len(set(value)) < len(value):
            raise ValueError("name each part once")
        return value


class ExportSection(Section):
    """The model that comes out."""

    form: Form = "merged-fp16"
    """What is written: a merged model, one in 4 bits, a GGUF file, or the adapter alone."""
    base: Literal["dequantized", "original", "auto"] = "dequantized"
    """Merge onto the quantized weights as the adapter saw them, the original ones, or the better of both."""
    shard: str = "2GiB"
    """Largest size of one output file."""

    @field_validator("shard")
    @classmethod
    def _is_amount(cls, value: str) -> str:
        parse_bytes(value)
        return value


class RunSection(Section):
    """Where the run lives."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the run's folder."""
    folder: str = "runs"
    """Folder that holds the runs."""
    pause_when: dict[str, bool | int | float | str] = {}
    """Save and wait while a rule holds: `temperature: 85` (the card's, in °C), `hours: "18:00-23:00"`,
    `free_disk: 5GiB`, `battery: true`; save and leave when another program leaves less: `vram: 2GiB`."""

    @field_validator("pause_when", mode="before")
    @classmethod
    def _are_rules(cls, value: object) -> object:
        if isinstance(value, dict):
            parse_pause_rules(value)
        return value


class Recipe(Section):
    """A whole recipe."""

    version: Literal[1] = 1
    """Version of this schema."""
    model: ModelSection
    adapter: AdapterSection = AdapterSection()
    data: DataSection
    train: TrainSection = TrainSection()
    memory: MemorySection = MemorySection()
    export: ExportSection = ExportSection()
    run: RunSection

    @model_validator(mode="before")
    @classmethod
    def _short_model(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("model"), str):
            return {**values, "model": {"source": values["model"]}}
        return values

    @model_validator(mode="after")
    def _leaves_room_for_text(self) -> Recipe:
        front, length = virtual_tokens(self.adapter.method, self.adapter.rank), self.data.length
        if length - front < LEAST_TOKENS:
            raise ValueError(
                f"adapter.rank = {front} virtual tokens leave {length - front} of data.length = {length}, "
                f"which counts them; leave {LEAST_TOKENS} or more"
            )
        return self

    @model_validator(mode="after")
    def _sections_agree(self) -> Recipe:
        twice = [name for name in self.data.columns.values() if [*self.data.columns.values()].count(name) > 1]
        if twice:
            raise ValueError(f"data.columns gives {twice[0]!r} two meanings; keep one")
        if (self.data.held_out or "").startswith("split:") and len(self.data.sources) > 1:
            raise ValueError("data.held_out names a split, but there are several sources; give a whole path")
        if self.data.held_out is not None and self.data.held_out_fraction > 0:
            raise ValueError("data.held_out and data.held_out_fraction both ask for held-out rows; keep one")
        if self.train.patience is not None and self.train.evaluate_every is None:
            raise ValueError("train.patience counts evaluations; give train.evaluate_every too")
        facts = METHODS[self.adapter.method]
        if self.data.new_tokens and not facts.has_new_tokens:
            raise ValueError(
                f"data.new_tokens: with {facts.title} no rows of new tokens are trained; leave them out"
            )
        has_held_out = self.data.held_out is not None or self.data.held_out_fraction > 0
        if self.train.evaluate_every is not None and not has_held_out:
            raise ValueError("train.evaluate_every needs data.held_out or data.held_out_fraction")
        if self.memory.micro_batch != "auto" and self.memory.micro_batch > self.train.rows_per_step:
            raise ValueError("memory.micro_batch is larger than train.rows_per_step; lower it")
        return self
