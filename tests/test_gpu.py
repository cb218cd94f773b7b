"""What only a CUDA device can show: run with `pytest -m gpu`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from test_packing import loss_and_gradient, rows
from test_train import adapted, changed, make_recipe, only

from qadapt.adapters.lora import Lora, attach_lora, trainable
from qadapt.adapters.method import Adapter, attach
from qadapt.batch_shape import packed_shape
from qadapt.data.batches import MicroBatch, micro_batches, packed_batches
from qadapt.data.prompt import load_contract
from qadapt.engine.arrangement import arrange
from qadapt.engine.boundaries import Boundaries
from qadapt.engine.documents import documents_of, kernel_problem
from qadapt.engine.host import sent
from qadapt.engine.out_of_memory import is_out_of_memory
from qadapt.engine.recompute import set_recompute
from qadapt.events import MemoryMeasured, Planned, RunFinished, StepDone
from qadapt.model.load import load_base
from qadapt.model.precision import DTYPES, capability_of
from qadapt.plan import host
from qadapt.plan.allocator import RUN_NOISE, reserved_range
from qadapt.plan.setting import LOSS_CHUNK, Part, Setting, auto_dtypes
from qadapt.plan.workspace import blas_workspace_bytes
from qadapt.run import resume, train
from qadapt.running.card import shared_card
from qadapt.selftest.report import SelfTest
from qadapt.shape import find_config, shape_from_config
from qadapt.train.dryrun import dry_run
from qadapt.train.guards import _celsius
from qadapt.train.optimizer import make_optimizer
from qadapt.train.samples import Samples
from qadapt.train.spill import OUTSIDE_BYTES, card_memory, within_free_memory
from qadapt.train.step import drop_gradients, evaluate_loss, find_gradient, train_step

if TYPE_CHECKING:
    from conftest import TinyModel
    from peft import PeftModel

pytestmark = pytest.mark.gpu


@pytest.fixture
def before_bytes() -> int:
    """What is allocated, but for the workspaces of cuBLAS, which a thread keeps from its first product on.

    A dry run begins before they are there. Here they are made, if no test has done so, and taken off.
    """
    values = torch.ones(16, 16, device="cuda", requires_grad=True)
    (values @ values).sum().backward()
    del values
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    workspaces = 2 * blas_workspace_bytes(capability_of(torch.device("cuda")))
    assert torch.cuda.memory_allocated() >= workspaces
    return torch.cuda.memory_allocated() - workspaces


def test_a_run_on_the_card_learns_within_its_prediction(tmp_path: Path, tiny_model: TinyModel) -> None:
    recipe = make_recipe(tmp_path, tiny_model("llama", layers=4), steps=12)
    events = list(train(changed(recipe, "memory", device="cuda", compute_dtype="auto")))
    steps = only(StepDone, events)
    assert steps[-1].loss < steps[0].loss
    predicted = only(Planned, events)[0].predicted_peak_bytes
    measured = only(MemoryMeasured, events)[-1].peak_bytes
    assert measured <= predicted * 1.1 + 64 * 1024**2
    assert isinstance(events[-1], RunFinished)


def test_a_run_on_the_card_resumes(tmp_path: Path, tiny_model: TinyModel) -> None:
    recipe = changed(
        make_recipe(tmp_path, tiny_model("llama")), "memory", device="cuda", compute_dtype="auto"
    )
    events = train(recipe)
    for event in events:
        if isinstance(event, StepDone) and event.step == 4:
            break
    events.close()  # type: ignore[attr-defined]
    assert isinstance(list(resume("first", folder=str(tmp_path / "runs")))[-1], RunFinished)


def test_paged_states_are_saved_and_read_back(tiny_model: TinyModel) -> None:
    parameters = {
        name: torch.nn.Parameter(parameter.detach().to("cuda", torch.bfloat16).repeat(8, 8))
        for name, parameter in list(trainable(adapted(tiny_model("llama"))).items())[:2]
    }
    optimizer = make_optimizer(parameters, kind="adamw-8bit", betas=(0.9, 0.999), weight_decay=0.0)
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step(1e-3)
    saved = {name: value.detach().cpu().clone() for name, value in optimizer.tensors().items()}
    again = make_optimizer(parameters, kind="adamw-8bit", betas=(0.9, 0.999), weight_decay=0.0)
    again.load(saved)
    assert all(torch.equal(value.cpu(), saved[name]) for name, value in again.tensors().items())


def test_a_step_on_the_card_takes_what_the_dry_run_says(before_bytes: int, tiny_model: TinyModel) -> None:
    device = torch.device("cuda")
    folder = tiny_model("llama", layers=6, width=512, vocabulary=8192, context=2048)
    compute, adapter = auto_dtypes("cuda", has_bf16=torch.cuda.is_bf16_supported(including_emulation=False))
    setting = Setting(
        rows=2,
        length=2048,
        compute_dtype=compute,
        adapter_dtype=adapter,
        optimizer="adamw",
        accumulates=False,
    )
    dry = dry_run(find_config(str(folder)).values, setting, capability=capability_of(device), steps=2)
    base = load_base(folder, quantization="nf4", double_quant=True, dtype=DTYPES[compute], device=device)
    set_recompute(base, "all")
    model = attach_lora(base, Lora(rank=16, alpha=16), dtype=DTYPES[adapter], seed=0).train()
    optimizer = make_optimizer(trainable(model), kind="adamw", betas=(0.9, 0.99), weight_decay=0.0)
    ids = torch.randint(3, 8000, (2, 2048))
    batch = MicroBatch(ids, torch.arange(2048), ids, 2 * 2048, 2 * 2048, loss_chunk=setting.loss_chunk)
    for _ in range(2):
        train_step(model, optimizer, [batch], learning_rate=1e-4, clip_norm=1.0, scaler=None)
    evaluate_loss(model, [batch])
    peak_bytes = torch.cuda.max_memory_allocated() - before_bytes
    assert peak_bytes == pytest.approx(dry.peak.bytes, rel=0.02, abs=4 * 1024**2)
    assert reserved_range(dry.trace).widened(RUN_NOISE).holds(torch.cuda.max_memory_reserved())


def on_the_card(folder: Path, compute: str, offload: tuple[Part, ...] = ()) -> PeftModel:
    base = load_base(
        folder,
        quantization="nf4",
        double_quant=True,
        dtype=DTYPES[compute],
        device=torch.device("cuda"),
        offload=offload,
    )
    set_recompute(base, "all")
    return attach_lora(base, Lora(rank=16, alpha=16), dtype=torch.float32, seed=0).train()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_a_packed_step_on_the_card_is_the_padded_one(family: str, tiny_model: TinyModel) -> None:
    compute, _ = auto_dtypes("cuda", has_bf16=torch.cuda.is_bf16_supported(including_emulation=False))
    model = on_the_card(tiny_model(family), compute)
    for parameter in trainable(model).values():
        torch.nn.init.normal_(parameter, std=0.1)
    shape = shape_from_config(model.get_base_model().config.to_dict(), name=family)
    assert kernel_problem(shape, device=torch.device("cuda"), dtype=DTYPES[compute]) is None
    packed = loss_and_gradient(model, packed_batches(rows(), capacity=150))
    padded = loss_and_gradient(model, micro_batches(rows(), size=2, pad_id=0))
    assert packed[0] == pytest.approx(padded[0], rel=1e-2)  # 16 bits
    for name, value in padded[1].items():
        difference = (packed[1][name] - value).norm() / value.norm()
        assert difference < 0.1, name  # 16 bits


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_packed_documents_on_the_card_see_their_prefix_as_filled_up_rows_do(
    family: str, tiny_model: TinyModel
) -> None:
    compute, _ = auto_dtypes("cuda", has_bf16=torch.cuda.is_bf16_supported(including_emulation=False))
    device, dtype = torch.device("cuda"), DTYPES[compute]
    base = load_base(tiny_model(family), quantization="nf4", double_quant=True, dtype=dtype, device=device)
    set_recompute(base, "all")
    model = attach(base, Adapter("prefix-flat", 7, 1.0), dtype=torch.float32, seed=0).train()
    packed = loss_and_gradient(model, packed_batches(rows(), capacity=150))
    padded = loss_and_gradient(model, micro_batches(rows(), size=2, pad_id=0))
    assert packed[0] == pytest.approx(padded[0], rel=1e-2)  # 16 bits
    for name, value in padded[1].items():
        assert (packed[1][name] - value).norm() < 0.1 * value.norm(), name  # 16 bits


def test_a_packed_step_on_the_card_takes_what_the_dry_run_says(
    before_bytes: int, tiny_model: TinyModel
) -> None:
    folder = tiny_model("llama", layers=6, width=512, vocabulary=8192, context=2048)
    compute, _ = auto_dtypes("cuda", has_bf16=torch.cuda.is_bf16_supported(including_emulation=False))
    setting = Setting(
        rows=2, length=2048, compute_dtype=compute, adapter_dtype="fp32", optimizer="adamw",
        accumulates=False, packed=True, supervised_share=0.25,
    )  # fmt: skip
    shape = packed_shape((2048, 1000, 500, 300, 248), supervised_tokens=1024)
    capability = capability_of(torch.device("cuda"))
    dry = dry_run(find_config(str(folder)).values, setting, capability=capability, batch=shape, steps=2)
    model = on_the_card(folder, compute)
    optimizer = make_optimizer(trainable(model), kind="adamw", betas=(0.9, 0.99), weight_decay=0.0)
    ids, positions = torch.randint(3, 8000, (1, 4096)), torch.arange(0, 4096, 4)
    documents = documents_of(shape.documents)
    batch = MicroBatch(ids, positions, ids[:, positions], 4096, 1024, documents, setting.loss_chunk)
    for _ in range(2):
        train_step(model, optimizer, [batch], learning_rate=1e-4, clip_norm=1.0, scaler=None)
    evaluate_loss(model, [batch])
    peak_bytes = torch.cuda.max_memory_allocated() - before_bytes
    assert peak_bytes == pytest.approx(dry.peak.bytes, rel=0.02, abs=4 * 1024**2)


@pytest.mark.parametrize("is_packed", [True, False])
def test_a_step_waits_for_the_card_at_its_end_and_once_for_each_padded_micro_batch(
    is_packed: bool, tiny_model: TinyModel
) -> None:
    compute, _ = auto_dtypes("cuda", has_bf16=torch.cuda.is_bf16_supported(including_emulation=False))
    model = on_the_card(tiny_model("llama"), compute)
    optimizer = make_optimizer(trainable(model), kind="adamw", betas=(0.9, 0.99), weight_decay=0.0)
    batches = packed_batches(rows(), capacity=150) if is_packed else micro_batches(rows(), size=2, pad_id=0)
    assert len(batches) > 1

    def step() -> None:
        train_step(model, optimizer, batches, learning_rate=1e-4, clip_norm=1.0, scaler=None)

    step()  # makes and loads what the next ones use
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    said = [f"{wait.filename}:{wait.lineno} {wait.message}" for wait in waits]
    # loss and norm, which is there when the loss is; the library's look at the positions of padded rows
    assert 2 <= len(said) <= 2 + (0 if is_packed else len(batches)), said


def test_the_allocator_says_no_before_the_card_is_full_and_is_free_again_after_it() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.empty_cache()
    before = card_memory(device)
    too_much = before.free_bytes - OUTSIDE_BYTES // 2  # the driver would give this, or spill
    with within_free_memory(device):
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(too_much, dtype=torch.uint8, device=device)
        fits = torch.empty(before.free_bytes // 2, dtype=torch.uint8, device=device)
        assert card_memory(device).free_bytes >= OUTSIDE_BYTES
        del fits
    torch.cuda.empty_cache()
    torch.empty(before.free_bytes - OUTSIDE_BYTES, dtype=torch.uint8, device=device)
    torch.cuda.empty_cache()


def test_asking_samples_on_the_card_changes_no_gradient(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama")
    compute, _ = auto_dtypes("cuda", has_bf16=torch.cuda.is_bf16_supported(including_emulation=False))
    model = on_the_card(folder, compute)
    for parameter in trainable(model).values():
        torch.nn.init.normal_(parameter, std=0.1)
    before = loss_and_gradient(model, micro_batches(rows(), size=2, pad_id=0))
    random = torch.cuda.get_rng_state()
    assert len(list(Samples(model, load_contract(folder), ["say 3"]).ask(1))) == 1
    assert torch.equal(torch.cuda.get_rng_state(), random)
    after = loss_and_gradient(model, micro_batches(rows(), size=2, pad_id=0))
    assert after[0] == before[0]
    assert all(torch.equal(after[1][name], value) for name, value in before[1].items())


def test_the_self_test_of_the_card_is_right() -> None:
    checks = list(SelfTest().checks())
    assert len(checks) > 30
    assert [check for check in checks if check.verdict == "FAILED"] == []


def test_the_card_is_known_by_its_driver_and_its_heat() -> None:
    card = shared_card("auto")
    assert card is not None and card.memory_bytes == torch.cuda.get_device_properties(0).total_memory
    celsius = _celsius(torch.device("cuda", torch.cuda.current_device()))
    assert celsius is None or 0 < celsius < 120
    assert not is_out_of_memory(RuntimeError("CUBLAS_STATUS_NOT_INITIALIZED")), "it has room"


def test_a_run_in_fp16_scales_its_loss_on_the_card(tmp_path: Path, tiny_model: TinyModel) -> None:
    recipe = make_recipe(tmp_path, tiny_model("llama", layers=2), steps=6)
    events = list(train(changed(recipe, "memory", device="cuda", compute_dtype="fp16")))
    steps = only(StepDone, events)
    assert steps[-1].loss < steps[0].loss
    assert isinstance(events[-1], RunFinished)


PLACED: tuple[tuple[Part, ...], ...] = (
    ("embeddings",),
    ("layers",),
    ("embeddings", "layers"),
    ("head",),
    ("embeddings", "head", "layers"),
)


@pytest.mark.parametrize("offload", PLACED)
def test_a_base_partly_on_the_host_has_the_same_gradients(
    offload: tuple[Part, ...], tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "SLICE_BYTES", 1)  # slices of 64 rows
    compute, _ = auto_dtypes("cuda", has_bf16=torch.cuda.is_bf16_supported(including_emulation=False))
    folder = tiny_model("llama", layers=5)
    found = []
    for placed in ((), offload):
        model = on_the_card(folder, compute, placed)
        draw = torch.Generator().manual_seed(1)
        for parameter in trainable(model).values():
            assert parameter.is_cuda
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
        loss_and_gradient(model, micro_batches(rows(), size=2, pad_id=0))  # the buffers are used again
        found.append(loss_and_gradient(model, micro_batches(rows(), size=2, pad_id=0)))
        assert len(list(Samples(model, load_contract(folder), ["say 3"]).ask(1))) == 1
    table = model.get_base_model().get_input_embeddings().weight
    assert table.is_cuda == ("embeddings" not in offload)
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-3)  # 16 bits
    for name, value in found[0][1].items():
        assert (found[1][1][name] - value).norm() <= 1e-2 * value.norm(), name  # 16 bits


@pytest.mark.parametrize("offload", PLACED)
def test_a_step_with_parts_on_the_host_takes_what_the_dry_run_says(
    offload: tuple[Part, ...], tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "SLICE_BYTES", 1 << 20)
    folder = tiny_model("llama", layers=6, width=512, vocabulary=8192, context=2048)
    compute, _ = auto_dtypes("cuda", has_bf16=torch.cuda.is_bf16_supported(including_emulation=False))
    setting = Setting(
        rows=2, length=2048, compute_dtype=compute, adapter_dtype="fp32", optimizer="adamw",
        accumulates=False, offload=offload,
    )  # fmt: skip
    capability = capability_of(torch.device("cuda"))
    dry = dry_run(find_config(str(folder)).values, setting, capability=capability, steps=2)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before_bytes = torch.cuda.memory_allocated()
    model = on_the_card(folder, compute, offload)
    loading_bytes = torch.cuda.max_memory_allocated() - before_bytes
    optimizer = make_optimizer(trainable(model), kind="adamw", betas=(0.9, 0.99), weight_decay=0.0)
    ids = torch.randint(3, 8000, (2, 2048))
    batch = MicroBatch(ids, torch.arange(2048), ids, 2 * 2048, 2 * 2048, loss_chunk=setting.loss_chunk)
    pinned = []
    for _ in range(3):
        train_step(model, optimizer, [batch], learning_rate=1e-4, clip_norm=1.0, scaler=None)
        pinned.append(torch.cuda.memory.host_memory_stats()["allocated_bytes.current"])
    evaluate_loss(model, [batch])
    peak_bytes = torch.cuda.max_memory_allocated() - before_bytes
    assert peak_bytes == pytest.approx(dry.peak.bytes, rel=0.02, abs=4 * 1024**2)
    assert loading_bytes <= peak_bytes, "loading takes no more of the card than training"
    assert pinned[1] == pinned[2], "steps take no more of the host"


def long_step(folder: Path, *, tiles: int, is_away: bool) -> tuple[dict[str, torch.Tensor], int]:
    """The gradients of the second factors (the first ones' are zero) for a row of 4,096 tokens, and the peak
    of allocated bytes of such steps."""
    compute, adapter = auto_dtypes("cuda", has_bf16=torch.cuda.is_bf16_supported(including_emulation=False))
    torch.manual_seed(0)
    base = load_base(
        folder, quantization="nf4", double_quant=True, dtype=DTYPES[compute], device=torch.device("cuda")
    )
    arrange(base, recompute="all", tiles=tiles, offload=("boundaries",) if is_away else ())
    model = attach_lora(base, Lora(rank=16, alpha=16), dtype=DTYPES[adapter], seed=0).train()
    optimizer = make_optimizer(trainable(model), kind="adamw", betas=(0.9, 0.99), weight_decay=0.0)
    ids = torch.randint(3, 8000, (1, 4096))
    batch = MicroBatch(ids, torch.arange(512), ids[:, :512], 4096, 512, loss_chunk=LOSS_CHUNK)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    find_gradient(model, optimizer, [batch], clip_norm=None, scaler=None)
    found = {name: value.grad.float().cpu() for name, value in trainable(model).items() if "lora_B" in name}
    drop_gradients(optimizer)
    train_step(model, optimizer, [batch], learning_rate=1e-3, clip_norm=1.0, scaler=None)
    return found, torch.cuda.max_memory_allocated()


def test_boundaries_in_pinned_memory_give_the_same_step_within_the_dry_runs_peak(
    before_bytes: int, tiny_model: TinyModel
) -> None:
    folder = tiny_model("llama", layers=8, width=512, vocabulary=8192, context=4096)
    compute, adapter = auto_dtypes("cuda", has_bf16=torch.cuda.is_bf16_supported(including_emulation=False))
    plain, _ = long_step(folder, tiles=4, is_away=False)
    away, peak_bytes = long_step(folder, tiles=4, is_away=True)
    for name, value in plain.items():  # the attention's gradient is not the same from run to run
        assert (away[name] - value).norm() <= 0.05 * value.norm(), name
    setting = Setting(
        length=4096, compute_dtype=compute, adapter_dtype=adapter, optimizer="adamw", accumulates=False,
        supervised_share=1 / 8, mlp_tiles=4, offload=("boundaries",),
    )  # fmt: skip
    capability = capability_of(torch.device("cuda"))
    dry = dry_run(find_config(str(folder)).values, setting, capability=capability, steps=2)
    assert peak_bytes - before_bytes == pytest.approx(dry.peak.bytes, rel=0.02, abs=4 * 1024**2)


def test_what_is_put_away_comes_back_to_the_bit_while_the_card_is_busy() -> None:
    boundaries = Boundaries()
    busy = torch.randn(2048, 2048, device="cuda")
    for height in (900, 700, 900):
        kept = []
        for place in range(6):
            tensor = torch.full((height, 4096), float(place), device="cuda") + torch.arange(
                4096, device="cuda"
            )
            kept.append(boundaries.put_away(tensor))
            del tensor
            for _ in range(5):
                busy = torch.tanh(busy @ busy)
        assert all(buffer.is_pinned() for each in kept for buffer in each.room.buffers)  # type: ignore[attr-defined]
        for place in reversed(range(6)):
            wanted = torch.full((height, 4096), float(place), device="cuda") + torch.arange(
                4096, device="cuda"
            )
            found = boundaries.bring_back(kept.pop())
            busy = torch.tanh(busy @ busy)
            assert torch.equal(found, wanted)
    held = sum(buffer.numel() for buffer in boundaries._place._free)  # type: ignore[union-attr]
    assert held <= 6 * 16 << 20  # used again, not made anew


def test_what_is_on_the_card_is_sent_there_as_it_is() -> None:
    ids = torch.arange(5, device="cuda")
    assert sent(ids, torch.device("cuda")) is ids
    assert torch.equal(sent(ids.cpu(), torch.device("cuda")), ids)
