"""Adapters as vectors: the laws of sums, every way against a whole matrix, every refusal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from merged_families import make_family
from peft import LoraConfig, PeftConfig, PeftModel
from peft.utils import merge_utils
from safetensors.torch import load_file, save_file
from test_merge import facts, logits, make_adapter, merged, tensors_of
from test_merge_methods import KINDS, adapt, load
from torch import Tensor

from qadapt.adapters import thinning
from qadapt.adapters.compose import Pair, compressed, distance, joined, length
from qadapt.adapters.facts import COMBINATION_FILE, write_facts
from qadapt.adapters.thinning import Matrix, change, dropped, elected, lengths, low_rank, summed, trimmed
from qadapt.adapters.versions import files_of, sha256_of
from qadapt.errors import BadExport, BadOutput, BadRecipe, BadRun, QadaptError, Unsupported
from qadapt.events import Event, StageAdvanced, Warned
from qadapt.export.adapter import Adapter
from qadapt.export.combine import Combined, Way, combine
from qadapt.licences import copy_licences, is_licence

WEIGHTS = "adapter_model.safetensors"
ROWS, COLUMNS = 37, 53
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "llama"
    make_family(folder, "llama")
    return folder


@pytest.fixture(scope="module")
def make(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    root = tmp_path_factory.mktemp("adapters")

    def adapter(seed: int = 1, **options: Any) -> Path:
        folder = root / f"{seed} {options}".replace("/", "")[:200]
        if not folder.exists():
            make_adapter(load(tiny), folder, seed=seed, **options)
        return folder

    return adapter


def put_together(parts: Sequence[tuple[Path, float]], target: Path, **way: Any) -> Combined:
    made: list[Combined] = []

    def keep() -> Iterator[Event]:
        made.append((yield from combine(parts, target, way=Way(**way))))

    list(keep())
    return made[0]


def deltas(folder: Path) -> dict[str, Tensor]:
    """ΔW of every weight, in fp64, by the package's own reader."""
    with Adapter(folder) as adapter:
        found = {}
        for name in adapter.weights:
            update = adapter.update(name)
            found[name] = (update.b.double() @ update.a.double()) * update.scale
        return found


def peft_deltas(base: Path, folder: Path) -> dict[str, Tensor]:
    """ΔW of every weight as PEFT loads the folder."""
    adapted = PeftModel.from_pretrained(load(base), str(folder))
    return {
        name.removeprefix("base_model.model.") + ".weight": module.get_delta_weight("default").double()
        for name, module in adapted.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def total(*parts: tuple[dict[str, Tensor], float]) -> dict[str, Tensor]:
    names = {name for change, _ in parts for name in change}
    return {
        name: sum((change[name] * weight for change, weight in parts if name in change), torch.zeros(()))
        for name in names
    }


def assert_near(found: dict[str, Tensor], exact: dict[str, Tensor], within: float = 1e-6) -> None:
    assert found.keys() == exact.keys() and len(exact) > 1
    for name, value in exact.items():
        assert (found[name] - value).norm() <= within * max(1e-3, float(value.norm())), name


def pair(seed: int, rank: int = 5) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return Pair(draw(rank, COLUMNS), draw(ROWS, rank))


def whole(matrix: Matrix) -> Tensor:
    return torch.cat([rows for _, rows in matrix.chunks()])


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of seven rows, which divide the 37 rows unevenly."""
    monkeypatch.setattr(thinning, "_CHUNK_ELEMENTS", 7 * COLUMNS)


# --- the arithmetic alone


@given(some.lists(some.tuples(some.integers(0, 4), some.floats(-3, 3)), min_size=1, max_size=4))
def test_a_join_is_the_sum_of_the_whole_matrices(drawn):
    parts = [(weight, pair(seed)) for seed, weight in drawn]
    found = joined(parts)
    exact = sum(
        (weight * (each.b @ each.a) for weight, each in parts),
        torch.zeros(ROWS, COLUMNS, dtype=torch.float64),
    )
    assert torch.allclose(found.b @ found.a, exact, atol=1e-12)
    assert found.rank == 5 * len({seed for seed, _ in drawn})


def test_a_change_less_itself_is_zero_to_the_bit():
    found = joined([(0.7, pair(1)), (0.3, pair(2)), (-0.7, pair(1)), (-0.3, pair(2))])
    assert not (found.b @ found.a).any() and length(found) == 0


@pytest.mark.parametrize("rank", [1, 3, 9, 10, 40])
def test_compressing_is_the_svd_of_the_whole_matrix(rank):
    exact = joined([(1.0, pair(1)), (-0.4, pair(2))])
    found = compressed(exact, rank)
    left, values, right = torch.linalg.svd(exact.b @ exact.a)
    best = left[:, :rank] * values[:rank] @ right[:rank] if rank <= 37 else exact.b @ exact.a
    assert torch.allclose(found.b @ found.a, best, atol=1e-10)
    assert found.rank == min(rank, 10)
    assert distance(exact, found) == pytest.approx(float(values[rank:].norm()), rel=1e-9, abs=1e-10)
    assert length(exact) == pytest.approx(float(values.norm()), rel=1e-12)


def test_a_rank_above_the_weight_s_width_compresses_too():
    wide = pair(1, rank=80)
    found = compressed(wide, 60)
    assert found.rank == ROWS and torch.allclose(found.b @ found.a, wide.b @ wide.a, atol=1e-9)


@pytest.mark.parametrize("density", [1e-9, 0.01, 0.2, 0.5, 1.0])
def test_trimming_keeps_the_largest_magnitudes(small_chunks, density):
    matrix = change(pair(1), -1.5)
    exact = whole(matrix)
    count = max(1, int(density * exact.numel()))
    least = exact.abs().flatten().topk(count).values[-1]
    assert torch.equal(whole(trimmed(matrix, density)), exact.where(exact.abs() >= least, 0))


def test_trimming_of_nothing_but_zeros_is_zero(small_chunks):
    assert not whole(trimmed(change(pair(1), 0.0), 0.2)).any()


def test_dropping_keeps_a_share_and_the_mean_and_is_the_same_each_time():
    a = torch.ones(1, 1000, dtype=torch.float64)
    matrix = change(Pair(a, torch.ones(800, 1, dtype=torch.float64)), 1.0)
    kept = whole(dropped(matrix, 0.3, key="x"))
    assert kept.unique().tolist() == pytest.approx([0, 1 / 0.3])
    assert float(kept.mean()) == pytest.approx(1, abs=0.01)
    assert torch.equal(kept, whole(dropped(matrix, 0.3, key="x")))
    assert not torch.equal(kept, whole(dropped(matrix, 0.3, key="y")))


@pytest.mark.parametrize("density", [0.2, 0.7])
def test_ties_with_equal_weights_is_peft_s(small_chunks, density):
    changes = [change(pair(seed), 1.0) for seed in (1, 2, 3)]
    found = whole(elected([trimmed(each, density) for each in changes]))
    expected = merge_utils.ties([whole(each) for each in changes], torch.ones(3), density)
    assert torch.allclose(found, expected, atol=1e-6)


def test_magnitude_pruning_is_peft_s(small_chunks):
    weights = (0.7, -0.3)
    parts = [change(pair(seed), weight) for seed, weight in zip((1, 2), weights, strict=True)]
    plain = [whole(change(pair(seed), 1.0)) for seed in (1, 2)]
    expected = merge_utils.magnitude_prune(plain, torch.tensor(weights), 0.2)
    assert torch.allclose(whole(summed([trimmed(each, 0.2) for each in parts])), expected, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 4, 16, 37])
def test_factors_of_a_thinned_matrix_are_nearly_the_nearest(small_chunks, rank):
    matrix = summed([dropped(change(pair(seed), 1.0), 0.3, key=f"{seed}") for seed in (1, 2)])
    values = torch.linalg.svdvals(whole(matrix).double())
    size, lost = lengths(matrix, low_rank(matrix, rank))
    assert size == pytest.approx(float(values.norm()), rel=1e-6)
    assert float(values[rank:].norm()) * 0.999 - 1e-3 <= lost <= float(values[rank:].norm()) * 1.01 + 1e-3


# --- folders

FORMS = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True, "r": 3},
    "patterns": {"rank_pattern": {"o_proj": 7}, "alpha_pattern": {"down_proj": 33}},
    "some layers": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
}


@pytest.mark.parametrize("form", FORMS)
def test_one_adapter_with_the_weight_one_is_a_copy(make, tmp_path, form):
    folder = make(**FORMS[form])
    put_together([(folder, 1)], tmp_path / "out")
    for name in (WEIGHTS, "adapter_config.json", "qadapt.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


def test_a_copy_may_be_of_any_method(tiny, tmp_path):
    for place, kind in enumerate(("DoRA", "IA3", "trained biases")):
        folder = tmp_path / f"{place}"
        adapt(load(tiny), KINDS[kind]("llama"), folder)
        put_together([(folder, 1)], tmp_path / f"{place} out")
        assert (tmp_path / f"{place} out" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


def test_a_copy_has_all_that_belongs_to_the_adapter(make, tmp_path):
    folder = Path(shutil.copytree(make(), tmp_path / "mine"))
    (folder / "additional_chat_templates").mkdir()
    for name in ("additional_chat_templates/rag.jinja", "LICENSE", "notes.txt"):
        (folder / name).write_text(name, encoding="utf-8")
    put_together([(folder, 1)], tmp_path / "out")
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*")}
    assert {"additional_chat_templates/rag.jinja", "LICENSE"} <= found
    assert "notes.txt" not in found


def test_a_sum_has_the_terms_of_all_its_parts(make, tmp_path):
    parts = []
    for seed, terms in enumerate(("mine", "yours", "mine", None), start=1):
        parts.append(Path(shutil.copytree(make(seed), tmp_path / f"part {seed}")))
        if terms is not None:
            (parts[-1] / "LICENSE.txt").write_text(terms, encoding="utf-8")
            (parts[-1] / "notes.txt").write_text(terms, encoding="utf-8")
    (parts[3] / "NOTICE").write_text("theirs", encoding="utf-8")
    put_together([(part, 0.25) for part in parts], tmp_path / "out")
    terms = {name: (tmp_path / "out" / name).read_text("utf-8") for name in files_of(tmp_path / "out")
             if is_licence(name)}  # fmt: skip
    assert terms == {"LICENSE.txt": "mine", "LICENSE-2.txt": "yours", "NOTICE": "theirs"}
    assert not (tmp_path / "out" / "notes.txt").exists()
    base = tmp_path / "base"
    base.mkdir()
    (base / "LICENSE.txt").write_text("the base's", encoding="utf-8")
    for _ in range(2):
        copy_licences(tmp_path / "out", base)
    terms = {path.name: path.read_text("utf-8") for path in base.iterdir()}
    wanted = {"LICENSE.txt": "the base's", "LICENSE-2.txt": "mine", "LICENSE-3.txt": "yours"}
    assert terms == {**wanted, "NOTICE": "theirs"}


@pytest.mark.parametrize("first", FORMS)
@pytest.mark.parametrize("second", FORMS)
def test_a_weighted_sum_is_the_sum_of_the_changes(tiny, make, tmp_path, first, second):
    a, b = make(1, **FORMS[first]), make(2, **FORMS[second])
    made = put_together([(a, 0.7), (b, -0.3)], tmp_path / "out")
    exact = total((deltas(a), 0.7), (deltas(b), -0.3))
    assert_near(deltas(tmp_path / "out"), exact)
    assert made.weights == len(exact) and made.error < 1e-7
    if first == "patterns" or second == "embedding":
        assert_near(peft_deltas(tiny, tmp_path / "out"), exact)


@pytest.mark.parametrize(
    "way", [{}, {"rank": 3}, {"name": "ties", "density": 0.3}, {"name": "dare", "density": 0.5}]
)
def test_the_order_changes_no_bit(make, tmp_path, way):
    a, b = make(1), make(2, r=5, use_rslora=True)
    put_together([(a, 0.5), (b, 1)], tmp_path / "ab", **way)
    put_together([(b, 1), (a, 0.5)], tmp_path / "ba", **way)
    assert (tmp_path / "ab" / WEIGHTS).read_bytes() == (tmp_path / "ba" / WEIGHTS).read_bytes()
    assert_near(deltas(tmp_path / "ba"), deltas(tmp_path / "ab"), within=1e-15)


WAYS = [
    {},
    {"rank": 2},
    {"name": "ties", "density": 0.3},
    {"name": "dare", "density": 0.5},
    {"name": "dare-ties", "density": 0.5},
    {"name": "magnitude", "density": 0.2},
]


@pytest.mark.parametrize("way", WAYS)
def test_an_adapter_less_itself_is_zero_to_the_bit(tiny, make, tmp_path, way):
    a, b = make(1), make(2)
    made = put_together([(a, 1), (b, 0.5), (a, -1), (b, -0.5)], tmp_path / "zero", **way)
    assert made.error == 0 and not any(value.any() for value in deltas(tmp_path / "zero").values())
    loaded = PeftModel.from_pretrained(load(tiny), str(tmp_path / "zero")).eval()
    assert torch.equal(logits(loaded), logits(load(tiny).eval()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weight", [2, -1, 0.3, 0])
def test_scaling_is_linear_and_keeps_the_type(make, tmp_path, form, weight):
    folder = make(**FORMS[form])
    made = put_together([(folder, weight)], tmp_path / "out")
    assert_near(deltas(tmp_path / "out"), total((deltas(folder), weight)), within=1e-15)
    assert made.error == 0


def test_scaling_a_sum_is_the_sum_of_the_scaled(make, tmp_path):
    a, b = make(1), make(2, r=5)
    put_together([(a, 0.5), (b, 0.25)], tmp_path / "sum")
    put_together([(tmp_path / "sum", 3)], tmp_path / "after")
    put_together([(a, 1.5), (b, 0.75)], tmp_path / "before")
    assert_near(deltas(tmp_path / "after"), deltas(tmp_path / "before"))


def test_sums_associate(make, tmp_path):
    a, b, c = make(1), make(2, use_rslora=True), make(3, rank_pattern={"q_proj": 2})
    put_together([(a, 1), (b, 1)], tmp_path / "ab")
    put_together([(tmp_path / "ab", 1), (c, 1)], tmp_path / "(ab)c")
    put_together([(b, 1), (c, 1)], tmp_path / "bc")
    put_together([(a, 1), (tmp_path / "bc", 1)], tmp_path / "a(bc)")
    assert_near(deltas(tmp_path / "(ab)c"), deltas(tmp_path / "a(bc)"))


def test_what_was_added_can_be_taken_away(make, tmp_path):
    a, b = make(1), make(2)
    put_together([(a, 1), (b, 1)], tmp_path / "sum")
    put_together([(tmp_path / "sum", 1), (b, -1)], tmp_path / "left")
    assert_near(deltas(tmp_path / "left"), deltas(a))


def test_the_rank_adds_up_but_for_a_change_that_comes_twice(make, tmp_path):
    a, b = make(1), make(2, r=5)
    assert put_together([(a, 1), (b, 1)], tmp_path / "sum").rank == 9
    assert put_together([(tmp_path / "sum", 1), (tmp_path / "sum", 1)], tmp_path / "twice").rank == 9


def test_numbers_that_bf16_holds_stay_in_bf16(make, tmp_path):
    for seed in (1, 2):
        folder = tmp_path / f"{seed}"
        folder.mkdir()
        for path in make(seed).iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        half = {name: value.bfloat16() for name, value in load_file(folder / WEIGHTS).items()}
        save_file(half, folder / WEIGHTS, {"format": "pt"})
    parts = [(tmp_path / "1", 0.3), (tmp_path / "2", -0.15)]
    made = put_together(parts, tmp_path / "out")
    assert (made.dtype, made.error) == ("bfloat16", 0)
    assert {value.dtype for value in load_file(tmp_path / "out" / WEIGHTS).values()} == {torch.bfloat16}
    assert put_together([(tmp_path / "1", 0.3), (tmp_path / "2", 0.7)], tmp_path / "other").dtype == "float32"


@pytest.mark.parametrize("way", [each for each in WAYS if each])
def test_the_error_that_is_told_is_that_of_what_is_written(make, tmp_path, way):
    a, b = make(1), make(2, r=5)
    made = put_together(
        [(a, 0.7), (b, 0.3)], tmp_path / "out", **way, **({} if "rank" in way else {"rank": 3})
    )
    asked = wanted([a, b], [0.7, 0.3], **way)
    found = deltas(tmp_path / "out")
    errors = {name: float((asked[name] - found[name]).norm()) for name in asked}
    size = sum(float(value.square().sum()) for value in asked.values()) ** 0.5
    told = json.loads((tmp_path / "out" / COMBINATION_FILE).read_text(encoding="utf-8"))["error"]
    assert (
        made.error == told == pytest.approx(sum(each**2 for each in errors.values()) ** 0.5 / size, rel=1e-5)
    )
    shares = {name: error / float(asked[name].norm()) for name, error in errors.items()}
    assert made.worst_error == pytest.approx(max(shares.values()), rel=1e-5)
    assert shares[made.worst] == pytest.approx(made.worst_error, rel=1e-5)
    assert 0.01 < made.error < 1


def wanted(
    folders: list[Path], weights: list[float], *, name: str = "sum", density: float = 1, rank: int = 0
):
    """What a way asks for, from whole matrices; of DARE its mean only is known, so ours is asked for it."""
    changes = [deltas(folder) for folder in folders]
    if name == "sum":
        return total(*zip(changes, weights, strict=True))
    found = {}
    for weight in changes[0]:
        parts = [each[weight].float() * share for each, share in zip(changes, weights, strict=True)]
        if name == "magnitude":
            found[weight] = merge_utils.magnitude_prune(parts, torch.ones(2), density).double()
        elif name == "ties":
            found[weight] = merge_utils.ties(parts, torch.ones(2), density).double()
        else:
            kept = [drop(each, density, folder, weight) for each, folder in zip(parts, folders, strict=True)]
            found[weight] = (
                whole(elected([dense(each) for each in kept])) if name == "dare-ties" else kept[0] + kept[1]
            ).double()
    return found


def dense(value: Tensor) -> Matrix:
    return Matrix(lambda first, last: value[first:last].clone(), (value.shape[0], value.shape[1]))


def drop(value: Tensor, density: float, folder: Path, weight: str) -> Tensor:
    return whole(dropped(dense(value), density, key=f"0 {sha256_of(folder / WEIGHTS)} {weight}"))


def test_the_result_is_an_adapter_like_any_other(tiny, make, tmp_path):
    a, b = make(1), make(2)
    put_together([(a, 0.7), (b, 0.3)], tmp_path / "made")
    options = {"form": "merged-fp32", "base": "original"}
    merged(tiny, tmp_path / "made", tmp_path / "one", **options)
    merged(tiny, [(a, 0.7), (b, 0.3)], tmp_path / "both", **options)
    found, exact = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "both")
    assert all(torch.allclose(found[name], exact[name], atol=1e-6) for name in exact)
    loaded = PeftModel.from_pretrained(load(tiny), str(tmp_path / "made")).eval()
    assert torch.allclose(logits(loaded), logits(load(tmp_path / "both").eval()), atol=2e-4)
    assert isinstance(PeftConfig.from_pretrained(str(tmp_path / "made")), LoraConfig)


def test_the_record_names_the_runs_and_versions_that_the_parts_are_of(make, tmp_path):
    for seed, name in ((1, "my-run"), (2, "f" * 64)):
        shutil.copytree(make(seed), tmp_path / name / "adapter")
    parts = [(tmp_path / name / "adapter", 1.0) for name in ("my-run", "f" * 64)]
    put_together(parts, tmp_path / "out")
    record = json.loads((tmp_path / "out" / COMBINATION_FILE).read_text(encoding="utf-8"))
    assert [part["name"] for part in record["parts"]] == ["my-run", "f" * 64]


def test_a_seed_that_nothing_is_drawn_with_changes_nothing(tiny, tmp_path):
    adapt(load(tiny), KINDS["DoRA"]("llama"), tmp_path / "it")
    assert put_together([(tmp_path / "it", 1)], tmp_path / "out", seed=3).weights == 0


def test_progress_is_counted_in_weights_and_the_record_names_the_parts(make, tmp_path):
    a, b = make(1), make(2)
    events = list(combine([(a, 0.5), (b, -2)], tmp_path / "out"))
    counts = [(each.done, each.total, each.unit) for each in events if isinstance(each, StageAdvanced)]
    assert counts == [(done, len(counts), "weights") for done in range(1, len(counts) + 1)] and counts
    record = json.loads((tmp_path / "out" / COMBINATION_FILE).read_text(encoding="utf-8"))
    assert [(part["name"], part["weight"]) for part in record["parts"]] == [(a.name, 0.5), (b.name, -2)]
    assert record["way"] == {"name": "sum", "rank": None, "density": None, "seed": 0}


# --- refusals


@pytest.mark.parametrize(
    ("way", "said"),
    [
        ({"name": "average"}, "'average'"),
        ({"rank": 0}, "rank 0"),
        ({"density": 0.5}, "0.5 means nothing"),
        ({"name": "ties"}, "ties keeps a share of what there is; its density is None"),
        ({"name": "dare", "density": 0.0}, "its density is 0.0"),
        ({"name": "dare", "density": 1.5}, "its density is 1.5"),
        ({"name": "dare", "density": float("nan")}, "its density is nan"),
    ],
)
def test_a_way_that_means_nothing_is_refused(make, tmp_path, way, said):
    refused([(make(1), 1)], tmp_path, BadRecipe, said, **way)


def refused(parts: Any, tmp_path: Path, kind: type[QadaptError], said: str, **way: Any) -> None:
    with pytest.raises(kind, match=said) as caught:
        put_together(parts, tmp_path / "out", **way)
    assert caught.value.cure and not list(tmp_path.glob("out")) and not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("DoRA", "gives weights a length"),
        ("IA3", "scales weights"),
        ("whole head and norms", "in place of the base's"),
        ("whole embedding", "in place of the base's"),
    ],
)
@pytest.mark.parametrize("weight", [2, 1])
def test_what_is_no_sum_is_refused_by_name(tiny, make, tmp_path, kind, said, weight):
    adapt(load(tiny), KINDS[kind]("llama"), tmp_path / "it")
    others = [] if weight == 2 else [(make(1), 1)]
    refused([(tmp_path / "it", weight), *others], tmp_path, Unsupported, said)


# PEFT takes the biases, which are what is tested here, for shards of a matrix
@pytest.mark.filterwarnings("ignore:Adapter 'default'")
@pytest.mark.parametrize(
    ("option", "said"), [({"lora_bias": True}, "lora_bias"), ({"bias": "all"}, "in place of the base's")]
)
def test_biases_are_refused_by_name(tmp_path, option, said):
    make_family(tmp_path / "qwen2", "qwen2")
    make_adapter(load(tmp_path / "qwen2"), tmp_path / "it", target_modules=["q_proj", "v_proj"], **option)
    refused([(tmp_path / "it", 2)], tmp_path, Unsupported, said)


@pytest.mark.parametrize(
    ("field", "other", "said"),
    [
        ("fingerprint", {"fingerprint": "e" * 64}, "different bases: .*, with other files"),
        ("quantization", {"quantization": "none"}, "with quantization nf4.* with none"),
        ("load_dtype", {"load_dtype": "bf16"}, "with load_dtype fp32.* with bf16"),
    ],
)
def test_adapters_of_different_bases_are_refused(tiny, make, tmp_path, field, other, said):
    make_adapter(load(tiny), tmp_path / "b")
    path = tmp_path / "b" / "qadapt.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | other), encoding="utf-8")
    refused([(make(1), 1), (tmp_path / "b", 1)], tmp_path, BadExport, said)


def test_adapters_of_different_shapes_are_refused(tiny, make, tmp_path):
    make_adapter(load(tiny), tmp_path / "b")
    tensors = load_file(tmp_path / "b" / WEIGHTS)
    name = next(each for each in tensors if each.endswith("lora_A.weight"))
    tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, tmp_path / "b" / WEIGHTS, {"format": "pt"})
    refused([(make(1), 1), (tmp_path / "b", 1)], tmp_path, BadExport, "in different shapes")


@pytest.mark.parametrize("weight", [1, 2])
def test_an_adapter_with_nan_is_refused(tiny, tmp_path, weight):
    make_adapter(load(tiny), tmp_path / "b")
    tensors = load_file(tmp_path / "b" / WEIGHTS)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, tmp_path / "b" / WEIGHTS, {"format": "pt"})
    refused([(tmp_path / "b", weight)], tmp_path, BadExport, "NaN")


def test_no_adapter_a_weight_that_is_no_number_and_a_folder_without_facts_are_refused(make, tmp_path):
    refused([], tmp_path, BadRecipe, "no adapter")
    refused([(make(1), float("inf"))], tmp_path, BadRecipe, "inf")
    (tmp_path / "empty").mkdir()
    refused([(tmp_path / "empty", 1)], tmp_path, BadRun, "no adapter")


@pytest.mark.parametrize("weight", [1e6, -1e39, 1e300])
@pytest.mark.parametrize("way", [{}, {"rank": 2}, {"name": "ties", "density": 0.3}])
def test_a_weight_that_would_drown_the_base_is_refused(make, tmp_path, weight, way):
    refused([(make(1), 1), (make(2), weight)], tmp_path, BadRecipe, "would drown its base", **way)


def test_a_target_that_exists_is_refused_and_kept(make, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(BadOutput, match="exists already"):
        put_together([(make(1), 1)], tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_different_prompts_are_said(tiny, make, tmp_path):
    make_adapter(load(tiny), tmp_path / "b")
    values = facts()
    write_facts(type(values)(**{**vars(values), "prompt_fingerprint": "q" * 64}), tmp_path / "b")
    events = list(combine([(make(1), 1), (tmp_path / "b", 1)], tmp_path / "out"))
    assert ["different prompts" in each.message for each in events if isinstance(each, Warned)] == [True]
