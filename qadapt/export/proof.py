"""The proof of an export: what was measured of the files as written, whether it holds, and `proof.json`.

`proof.json` holds numbers and hashes only, never a text of a row, no time and no path: the same export has
the same proof. What must hold is decided here, each bound with its reason; who measures is `tensor_proof.py`,
`prompt_proof.py` and `behaviour.py`. Knows no run folder.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qadapt.errors import BadExport, BadRun
from qadapt.export.activations import FP16_LIMIT
from qadapt.export.behaviour import TIE_NATS, Behaviour
from qadapt.export.gguf_lora import FORM as GGUF_LORA
from qadapt.export.gguf_types import GGUF_FORMS
from qadapt.export.llama_quantize import K_FORMS
from qadapt.export.merge import BASES as MERGED_BASES
from qadapt.export.merge import FORMS as MERGED_FORMS
from qadapt.export.peft_folder import FORM as ADAPTER
from qadapt.export.prompt_proof import PromptProof
from qadapt.export.quantized import FORM as QUANTIZED
from qadapt.export.tensor_proof import TensorProof
from qadapt.train.environment import environment

PROOF_FILE = "proof.json"
NOT_HASHED = (PROOF_FILE, "README.md")
"""The proof itself, and the card, which people edit."""

LEAST_SAME_CHOICE = 0.99
"""Share of the tokens at which live and exported model find the same token most likely, ties aside: merged on
what was trained on they differ by rounding only."""
MOST_DIVERGENCE = 0.02
"""Nats per token, in the mean. Rounding the weights once and activations in bf16 cost less (measured: see
`tests/test_proof.py`); an adapter that is left out or doubled costs more, if it learned anything."""
MOST_LOST = 1.0
"""Nats per token, in the mean, of any form on any base: what few bits, or the original base, may cost.
Beyond it is another model, whatever was asked for."""
MOST_PLAIN_DIFFERENCE = 1e-3
"""Of the largest logit, for merged forms: the same fp32 sums in another order."""
_BUG = "Export again; if it is so every time, it is a bug of qadapt. `--no-proof` exports without a proof."
_NO_NUMBERS = (
    "Look at the run with `qadapt evaluate`: if its loss is no number either, train again with a lower "
    "train.learning_rate. Otherwise export again."
)
_TOO_LOSSY = (
    "Choose a form with more bits, or --base dequantized, which is what was trained on. `--no-proof` exports "
    "without a proof."
)
_READ_BYTES = 1 << 20
_OF_A_MODEL = frozenset((*MERGED_FORMS, QUANTIZED, *GGUF_FORMS, *K_FORMS))
_OF_AN_ADAPTER = frozenset((ADAPTER, GGUF_LORA))


@dataclass(frozen=True)
class MadeOf:
    """What was exported.

    Attributes:
        run: Name of the run or of the adapter's folder, or the beginning of the id of a version of the store.
        form: Form of the export, such as `merged-fp16`.
        base: Weights it is merged on, `dequantized` or `original`.
        model: The base's name.
        revision: Its revision.
        fingerprint: That of its files.
        adapter: SHA-256 over the adapter's files.
    """

    run: str
    form: str
    base: str
    model: str
    revision: str | None
    fingerprint: str
    adapter: str

    @property
    def must_behave_alike(self) -> bool:
        """Whether the weights are those that were trained on, so that only rounding may differ."""
        return self.form.startswith("merged-") and self.base == "dequantized"


@dataclass(frozen=True)
class Proof:
    """What was measured of an export.

    Attributes:
        made_of: What was exported.
        tensors: Every tensor against its own computation.
        prompt: Tokenizer, template and end tokens against the run's.
        behaviour: Losses, divergence and answers against the live model's.
        left_out: What is not proven, with the reason, in sentences.
        files: Size and SHA-256 of each file by name.
    """

    made_of: MadeOf
    tensors: TensorProof | None = None
    prompt: PromptProof | None = None
    behaviour: Behaviour | None = None
    left_out: tuple[str, ...] = ()
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def faults(self) -> tuple[str, ...]:
        """What does not hold, in sentences."""
        return tuple(sentence for sentence, _ in self._faults())

    def check(self) -> None:
        """Passes if all holds.

        Raises:
            BadExport: Something does not; says what.
        """
        found = list(self._faults())
        if found:
            said = "; ".join(sentence for sentence, _ in found)
            raise BadExport(f"The export is not the model that was trained: {said}.", cure=found[0][1])

    @property
    def deviation(self) -> str | None:
        """What a form that rounds to fewer bits lost of what was trained, in a sentence; None if little.

        An adapter's update may be smaller than the steps that 4 bits have: then rounding takes it back.
        """
        found = self.behaviour
        if (
            found is None
            or self.made_of.form.startswith("merged-")
            or found.mean_divergence <= MOST_DIVERGENCE
        ):
            return None
        return (
            f"Rounded to {self.made_of.form}, the model diverges from the live one by "
            f"{found.mean_divergence:.3f} nats per token and chooses as it does at {found.same_choice:.1%} "
            "of them: a part of what was trained is lost."
        )

    def sentences(self) -> tuple[str, ...]:
        """What was found, for people: one sentence each."""
        said = []
        if self.tensors is not None:
            said.append(self._told_of_tensors(self.tensors))
        if self.prompt is not None:
            said.append(_told_of_prompt(self.prompt))
        if self.behaviour is not None:
            said += _told(self.behaviour)
        return (*said, *(f"Not proven: {reason.rstrip('.')}." for reason in self.left_out))

    def _told_of_tensors(self, found: TensorProof) -> str:
        count, form = f"All {found.tensors:,} tensors as written are", self.made_of.form
        if form == ADAPTER:
            return f"{count} the run's own, byte for byte."
        held = "to one rounding" if form.startswith("merged-") else "as near as the type of each can hold"
        if form in K_FORMS:
            held = "on the nearest of the steps that llama-quantize found for its block"
        return f"{count} what base and adapter make, {held}, computed a second time in another way."

    def values(self) -> dict[str, Any]:
        """The proof as plain values for JSON; a number that is not finite is null."""
        values = {
            "version": 1,
            "holds": not self.faults,
            "faults": list(self.faults),
            "made_of": asdict(self.made_of),
            "tensors": self.tensors and self.tensors.values(),
            "prompt": self.prompt and asdict(self.prompt),
            "behaviour": self.behaviour and asdict(self.behaviour),
            "left_out": list(self.left_out),
            "bounds": {
                "same_choice_or_tie": LEAST_SAME_CHOICE,
                "tie_nats": TIE_NATS,
                "mean_divergence": MOST_DIVERGENCE,
                "mean_divergence_of_any": MOST_LOST,
                "plain_difference": MOST_PLAIN_DIFFERENCE,
                "fp16": FP16_LIMIT,
            },
            "files": {name: dict(facts) for name, facts in self.files.items()},
            "packages": environment()["packages"],
        }
        plain: dict[str, Any] = _finite(values)
        return plain

    def _faults(self) -> Iterator[tuple[str, str]]:
        """Sentences with their cures."""
        if self.tensors is not None and not self.tensors.holds:
            yield self.tensors.sentence(), _BUG
        for fault in () if self.prompt is None else self.prompt.faults:
            yield fault, _BUG
        if self.behaviour is not None:
            yield from _behaviour_faults(self.behaviour, self.made_of)


def _behaviour_faults(found: Behaviour, made_of: MadeOf) -> Iterator[tuple[str, str]]:
    if made_of.form == "merged-fp16" and found.beyond_fp16:
        module, reach = next(iter(found.beyond_fp16.items()))
        yield (
            f"its activations do not fit fp16: {module} reaches {reach:.6g}, fp16 ends at {FP16_LIMIT:.6g}",
            "Export with --form merged-bf16, which has the range of fp32.",
        )
    plain, is_merged = found.plain, made_of.form.startswith("merged-")
    if is_merged and plain is not None and not plain.difference <= MOST_PLAIN_DIFFERENCE:
        yield (
            f"plain transformers gives other logits, by {plain.difference:.2g} of the largest",
            _BUG,
        )
    yield from _divergence_faults(found, made_of)
    if not made_of.must_behave_alike:
        return
    differing = round((1 - found.same_choice_or_tie) * found.tokens)
    if differing > max(1, found.tokens * (1 - LEAST_SAME_CHOICE)):  # one token of a few rows says nothing
        yield f"it chooses as the live model at {found.same_choice_or_tie:.1%} of the tokens only", _BUG


def _divergence_faults(found: Behaviour, made_of: MadeOf) -> Iterator[tuple[str, str]]:
    if math.isnan(found.mean_divergence):
        yield "its answers, or those of the live model, are no numbers (NaN)", _NO_NUMBERS
    elif made_of.must_behave_alike and found.mean_divergence > MOST_DIVERGENCE:
        yield f"it diverges from the live model by {found.mean_divergence:.4f} nats per token", _BUG
    elif found.mean_divergence > MOST_LOST:
        yield f"it diverges from the live model by {found.mean_divergence:.4f} nats per token", _TOO_LOSSY


def _told_of_prompt(found: PromptProof) -> str:
    if not found.texts:
        return "Vocabulary, template and end tokens in the file are the run's."
    return (
        f"Tokenizer, template and end tokens are the run's: {found.conversations} conversations and "
        f"{found.texts} texts gave the same tokens."
    )


def _told(found: Behaviour) -> Iterator[str]:
    kind = "held-out" if found.are_held_out else "training"
    yield (
        f"On {found.rows} {kind} rows with {found.tokens:,} learned tokens: loss {found.live_loss:.4f} live, "
        f"{found.exported_loss:.4f} exported; KL(live, exported) {found.mean_divergence:.2g} nats per token, "
        f"at most {found.largest_divergence:.2g}; both choose the same token at {found.same_choice:.2%}."
    )
    yield (
        f"It gives {found.same_answers} of {found.answers} greedy answers as the live model does, token for "
        f"token ({found.same_answer_tokens} of {found.answer_tokens} tokens)."
    )
    reach = f"Its activations reach {found.largest_activation:.4g} ({found.largest_module})"
    if found.beyond_fp16:
        yield f"{reach}: too much for fp16; run it in bf16 or fp32."
    else:
        yield f"{reach}; fp16 ends at {FP16_LIMIT:.0f}."
    if found.plain is not None:
        yield (
            f"Plain transformers loads the files ({found.plain.how}) and gives the same logits, within "
            f"{found.plain.difference:.1g} of the largest."
        )


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def file_facts(folder: Path, report: Callable[[int], None]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of all files of an export but those not hashed, by their path in it.

    Args:
        folder: The export.
        report: Called with the bytes read so far.
    """
    found: dict[str, dict[str, Any]] = {}
    done = 0
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or name in NOT_HASHED:
            continue
        digest, before = hashlib.sha256(), done
        with path.open("rb") as file:
            while piece := file.read(_READ_BYTES):
                digest.update(piece)
                done += len(piece)
                report(done)
        found[name] = {"bytes": done - before, "sha256": digest.hexdigest()}
    return found


def changed_files(
    recorded: Mapping[str, Mapping[str, Any]], found: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """In sentences, which files are not what they were."""
    said = [f"{name} is gone" for name in recorded if name not in found]
    said += [
        f"{name} is not what was written"
        for name, facts in recorded.items()
        if found.get(name, facts) != dict(facts)
    ]
    return said + [f"{name} is not of this export" for name in found if name not in recorded]


def write_proof(folder: Path, proof: Proof) -> None:
    """Writes `proof.json` into an export that is not shown yet."""
    text = json.dumps(proof.values(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    (folder / PROOF_FILE).write_text(text, encoding="utf-8")


def read_proof(folder: Path) -> dict[str, Any]:
    """The values of an export's `proof.json`.

    Raises:
        BadRun: There is none, or it is damaged.
    """
    path = folder / PROOF_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        _check_made_of(MadeOf(**values["made_of"]))
        for name, facts in values["files"].items():
            if dict(facts).keys() != {"bytes", "sha256"}:
                raise ValueError(f"it tells of {name} {facts}")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise BadRun(
            f"{folder} has no proof that can be read: {error}",
            cure="Give the folder of an export; one made with --no-proof has none: export it again without.",
        ) from None
    found: dict[str, Any] = values
    return found


def _check_made_of(made_of: MadeOf) -> None:
    bases = MERGED_BASES if made_of.form in _OF_A_MODEL else ("",) if made_of.form in _OF_AN_ADAPTER else ()
    texts = (made_of.run, made_of.model, made_of.fingerprint, made_of.adapter, made_of.revision or "")
    if made_of.base not in bases or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"nothing is made of {asdict(made_of)}")
