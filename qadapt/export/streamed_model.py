"""A model in as little memory as one of its layers takes: all rows go through a layer, then comes the next.

What computes are the library's own classes, built without weights. Their decoder runs twice over every
micro-batch: first with layers that do nothing, which tells how each is called (masks, positions), and at last
with layers that give what was computed, so that whatever stands around them is the library's own code, too.
In between each layer gets its weights once, sees all micro-batches, and lets its weights go. Of the embedding
only the rows that occur are read, of the head some rows at a time. Where tensors come from is handed in:
files as they were written, or numbers of a merge that is written nowhere. Knows no run and no adapter.

Legend: B rows, T tokens, D width, n tokens at the head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from qadapt.data.tokens import Tokens
from qadapt.engine.attention import choose_attention
from qadapt.engine.head import head_of
from qadapt.engine.recompute import decoder_layers
from qadapt.errors import BadExport, Unsupported
from qadapt.events import Event, StageAdvanced
from qadapt.export.activations import Ranges
from qadapt.export.learned_tokens import batches_of
from qadapt.model.precision import capability_of
from qadapt.model.tensor_files import TensorReader, rows_of
from qadapt.model.tensor_values import tensor_of
from qadapt.units import MIB

STAGE = "running the export layer by layer"
_HEAD_BYTES, _LOGIT_BYTES = 64 * MIB, 64 * MIB
"""Of the head's rows in fp32 at once, and of logits in fp32; a few such tensors are there."""

Read = Callable[[str, int, int], Tensor]
"""The rows of a named tensor from a first one up to, not including, a last one, in memory of their own and in
any type of floats; the rows of a vector are its elements."""


@dataclass(frozen=True)
class Tensors:
    """Where the tensors of a model come from: their names, and rows of each."""

    names: frozenset[str]
    read: Read


def tensors_of(reader: TensorReader) -> Tensors:
    """The tensors of safetensors files."""

    def read(name: str, first: int, last: int) -> Tensor:
        entry = reader.entries[name]
        last = max(
            first, min(last, rows_of(entry))
        )  # of a tensor with too few rows all, which is then found by its shape
        shape = (last - first, *entry.shape[1:])
        row_bytes = entry.size_bytes // max(1, entry.shape[0])
        buffer = memoryview(bytearray(row_bytes * (last - first)))
        return tensor_of(reader.read_rows(name, buffer, first=first, last=last), entry.dtype, shape)

    return Tensors(frozenset(reader.entries), read)


@dataclass(frozen=True)
class _Call:
    """How the decoder calls a layer for a micro-batch, hidden states aside."""

    arguments: tuple[Any, ...]
    named: Mapping[str, Any]


class StreamedModel:
    """A causal language model that computes in fp32 with tensors that are read when their turn comes.

    Args:
        config: Of the model.
        tensors: Its tensors.
        device: Where it computes.

    Raises:
        BadExport: A tensor of the model is not there.
        Unsupported: It is not known what this architecture does with its logits.
    """

    def __init__(self, config: PretrainedConfig, tensors: Tensors, *, device: torch.device) -> None:
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.eval().requires_grad_(False)
        choose_attention(model, dtype=torch.float32, capability=capability_of(device))
        for buffer in model.buffers():
            buffer.data = buffer.data.to(device)
        self._model, self._tensors, self._device = model, tensors, device
        self._names = {id(module): name for name, module in model.named_modules()}
        self._head = _Head(model, tensors, device=device)
        lacking = [name for name, _ in model.named_parameters() if name not in self._head.stands_for(tensors)]
        if lacking:
            raise BadExport(
                f"The export lacks {lacking[0]}"
                + (f" and {len(lacking) - 1} more tensors." if len(lacking) > 1 else "."),
                cure="Export again; if it is so every time, it is a bug of qadapt.",
            )

    @property
    def vocabulary(self) -> int:
        """Rows of the head."""
        return self._head.rows

    @property
    def parameters(self) -> int:
        """Weights of the model."""
        return self._model.num_parameters()

    def hidden_states(
        self, batches: Sequence[Tensor], *, ranges: Ranges | None = None
    ) -> Generator[Event, None, list[Tensor]]:
        """What goes into the head, (B, T, D) of each micro-batch, in fp32 on the model's device.

        Args:
            batches: (B, T) token ids, filled up at the end: attention is causal, so no mask is needed.
            ranges: Learns how large activations become.

        Raises:
            BadExport: A tensor has another shape than the model's.
        """
        seen = ranges or Ranges()
        layers, inputs = decoder_layers(self._model), [batch.to(self._device) for batch in batches]
        with ExitStack() as held:
            self._hold_surroundings(layers, inputs, held)
            calls, states = self._called(layers, inputs)
            for number, layer in enumerate(layers):
                self._go_through(layer, [each[number] for each in calls], states, seen)
                yield StageAdvanced(stage=STAGE, done=number + 1, total=len(layers), unit="layers")
            return self._finished(layers, inputs, states, seen)

    @torch.no_grad()
    def logits(self, hidden: Tensor, *, ranges: Ranges | None = None) -> Tensor:
        """The logits (n, V) of hidden states (n, D), in fp32, as the model gives them."""
        return self._head.logits(hidden, ranges or Ranges())

    def _hold_surroundings(
        self, layers: Sequence[nn.Module], inputs: Sequence[Tensor], held: ExitStack
    ) -> None:
        """Gives the decoder what it has besides its layers: norms, and the rows of embedding that occur."""
        decoder, embedding = self._model.get_decoder(), self._model.get_input_embeddings()
        assert isinstance(embedding, nn.Embedding)
        inside = {id(module) for layer in layers for module in layer.modules()}
        for module in decoder.modules():
            if id(module) not in inside and module is not embedding:
                held.enter_context(self._filled(module, recurse=False))
        used = torch.cat([each.flatten() for each in inputs]).unique()
        name = f"{self._names[id(embedding)]}.weight"
        rows = torch.cat([self._tensors.read(name, token, token + 1) for token in used.tolist()])
        held.enter_context(_weight(embedding, "weight", rows.to(self._device, torch.float32)))
        embedding.padding_idx = None  # it says which row gets no gradient; here rows have other numbers
        renumber = embedding.register_forward_pre_hook(
            lambda _, arguments: (torch.searchsorted(used, arguments[0]), *arguments[1:])
        )
        held.callback(renumber.remove)

    @torch.no_grad()
    def _called(
        self, layers: Sequence[nn.Module], inputs: Sequence[Tensor]
    ) -> tuple[list[list[_Call]], list[Tensor]]:
        """How each layer is called for each micro-batch, and what goes into the first."""
        calls: list[list[_Call]] = []
        states: list[Tensor] = []

        def note(number: int, hidden: Tensor, *arguments: Any, **named: Any) -> Tensor:
            if number == 0:
                calls.append([])
                states.append(hidden)
            calls[-1].append(_Call(arguments, named))
            return hidden

        with _answering(layers, note):
            for ids in inputs:
                self._model.get_decoder()(input_ids=ids, use_cache=False)
        return calls, states

    @torch.no_grad()
    def _go_through(
        self, layer: nn.Module, calls: Sequence[_Call], states: list[Tensor], seen: Ranges
    ) -> None:
        with self._filled(layer), seen.watching(layer, name=self._names[id(layer)]):
            for place, call in enumerate(calls):
                states[place] = layer(states[place], *call.arguments, **call.named)

    @torch.no_grad()
    def _finished(
        self, layers: Sequence[nn.Module], inputs: Sequence[Tensor], states: list[Tensor], seen: Ranges
    ) -> list[Tensor]:
        decoder, place = self._model.get_decoder(), 0

        def answer(_: int, hidden: Tensor, *arguments: Any, **named: Any) -> Tensor:
            return states[place]

        with ExitStack() as held:
            held.enter_context(_answering(layers, answer))
            for part in decoder.children():
                if not any(each is layer for each in part.modules() for layer in layers):
                    held.enter_context(seen.watching(part, name=self._names[id(part)]))
            for place, ids in enumerate(inputs):  # `answer` reads the place
                states[place] = decoder(input_ids=ids, use_cache=False).last_hidden_state
        return states

    @contextmanager
    def _filled(self, module: nn.Module, *, recurse: bool = True) -> Iterator[None]:
        """While open, a module has its weights."""
        with ExitStack() as held:
            for owner in module.modules() if recurse else (module,):
                for name, parameter in list(owner.named_parameters(recurse=False)):
                    path = f"{self._names[id(owner)]}.{name}"
                    value = self._tensors.read(path, 0, len(parameter))
                    _check_shape(path, value, parameter.shape)
                    held.enter_context(_weight(owner, name, value.to(self._device, torch.float32)))
            yield


class _Head:
    """Makes logits of hidden states; the table is read some rows at a time."""

    def __init__(self, model: PreTrainedModel, tensors: Tensors, *, device: torch.device) -> None:
        head = head_of(model)
        if head is None:
            raise Unsupported(
                f"What {model.config.model_type} does with its logits is not known, so it is not proven.",
                cure="Export with --no-proof, and compare some answers yourself.",
            )
        names = {id(module): name for name, module in model.named_modules()}
        self._path = names[id(head.module)]
        embedding = f"{names[id(model.get_input_embeddings())]}.weight"
        own, is_tied = f"{self._path}.weight", bool(model.config.tie_word_embeddings)
        # a head in the files is its own, whatever the configuration says of ties: so the library has it
        self._weight = embedding if is_tied and own not in tensors.names else own
        biases = [name for name, _ in head.module.named_parameters() if name == "bias"]
        self._bias = f"{self._path}.bias" if biases else None
        self._scale, self._softcap = head.scale, head.softcap
        self._read, self._device = tensors.read, device
        self.rows, self._width = head.module.get_parameter("weight").shape

    def stands_for(self, tensors: Tensors) -> frozenset[str]:
        """The names in the files, and the head's where the embedding stands for it."""
        return tensors.names | ({f"{self._path}.weight"} if self._weight in tensors.names else set())

    def logits(self, hidden: Tensor, seen: Ranges) -> Tensor:
        """(n, V) in fp32."""
        found = hidden.new_empty(len(hidden), self.rows, dtype=torch.float32)
        step = max(1, _HEAD_BYTES // (4 * self._width))
        for first in range(0, self.rows, step):
            last = min(first + step, self.rows)
            table = self._read(self._weight, first, last).to(self._device, torch.float32)
            _check_shape(self._weight, table, (last - first, self._width))
            torch.mm(hidden.float(), table.T, out=found[:, first:last])
        if self._bias is not None:
            found += self._read(self._bias, 0, self.rows).to(self._device, torch.float32)
        seen.see(self._path, (hidden, found))
        return finished(found, scale=self._scale, softcap=self._softcap)


def row_losses(
    model: StreamedModel, rows: Sequence[Tokens], *, pad_id: int
) -> Generator[Event, None, list[float]]:
    """The summed loss of the learned tokens of each row, in nats.

    Args:
        model: The model.
        rows: The rows.
        pad_id: The token that fills up.
    """
    batches = batches_of(rows, pad_id=pad_id)
    hidden = yield from model.hidden_states([batch.content.input_ids for batch in batches])
    sums = torch.zeros(len(rows), dtype=torch.float64)
    for batch, each in zip(batches, hidden, strict=True):
        states, numbers, targets = batch.before_head(each), batch.row_of_each, batch.targets
        for place in chunks_of(len(states), model.vocabulary):
            likely = model.logits(states[place]).log_softmax(-1).cpu()
            chosen = likely.gather(-1, targets[place, None])[:, 0]
            sums.index_add_(0, numbers[place], -chosen.double())
    found: list[float] = sums.tolist()
    return found


def chunks_of(tokens: int, vocabulary: int) -> list[slice]:
    """Places of so many tokens at once that their logits in fp32 take little memory."""
    step = max(1, _LOGIT_BYTES // (4 * vocabulary))
    return [slice(first, first + step) for first in range(0, tokens, step)]


def finished(logits: Tensor, *, scale: float, softcap: float | None) -> Tensor:
    """What a model makes of what its head gives, in fp32; logits that are fp32 are overwritten."""
    values = logits.float()
    if scale != 1:
        values.mul_(scale)
    if softcap is not None:
        values.div_(softcap).tanh_().mul_(softcap)
    return values


@contextmanager
def _answering(layers: Sequence[nn.Module], answer: Callable[..., Tensor]) -> Iterator[None]:
    """While open, layers do not compute: `answer(number of the layer, ...)` says what they give."""
    for number, layer in enumerate(layers):
        layer.forward = partial(answer, number)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@contextmanager
def _weight(module: nn.Module, name: str, value: Tensor) -> Iterator[None]:
    """While open, a module's parameter has a value."""
    empty = module.get_parameter(name)
    module.register_parameter(name, nn.Parameter(value, requires_grad=False))
    try:
        yield
    finally:
        module.register_parameter(name, empty)


def _check_shape(name: str, value: Tensor, shape: Sequence[int]) -> None:
    if tuple(value.shape) != tuple(shape):
        raise BadExport(
            f"{name} is {tuple(value.shape)} in the export; config.json makes it {tuple(shape)}.",
            cure="Export again; if it is so every time, it is a bug of qadapt.",
        )
