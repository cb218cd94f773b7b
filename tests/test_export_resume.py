"""An export that is killed at any moment: the target is absent or whole, and a second call goes on."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import killed_export
import pytest
import torch
from killed_export import Place

from qadapt import cache
from qadapt.errors import BadOutput, NoRoom
from qadapt.events import Event, StageAdvanced
from qadapt.export import staging
from qadapt.export.quantized import quantize
from qadapt.export.staging import new_folder, refuse_existing, refuse_full
from qadapt.export.threads import in_order
from qadapt.export.writing import Writing

KEPT = "model-00001-of-"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A small base of some shards and its adapter, and an export that nobody disturbed."""
    root = tmp_path_factory.mktemp("killed")
    widths = killed_export.Widths(layers=2, width=256, mlp=704, kv=128, vocabulary=1000)
    killed_export.make_model(root / "model", widths, layers=2)
    killed_export.make_adapter(root / "adapter", widths, layers=2)
    made = Place(root / "model", root / "adapter", root / "whole", shard_bytes=1_000_000)
    export(made, made.target)
    return made


def export(place: Place, target: Path, **options: str) -> list[Event]:
    return list(killed_export.export(replace(place, target=target), **options))


def hidden(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial")


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def remains(place: Place, root: Path) -> list[Path]:
    """Targets beside which lies what a process leaves that is killed after each step of an export."""
    targets = []
    at_work = replace(place, target=root / "killed" / "out")
    for event in killed_export.export(at_work):
        if isinstance(event, StageAdvanced):
            target = root / f"{len(targets)}" / "out"
            hidden(target).mkdir(parents=True)
            if at_work.noted:  # a thread may be writing it
                shutil.copyfile(hidden(at_work.target) / "manifest.json", hidden(target) / "manifest.json")
            shutil.copytree(hidden(at_work.target) / "made", hidden(target) / "made")  # times, too
            targets.append(target)
    return targets


@pytest.fixture
def late(place: Place, tmp_path: Path) -> Path:
    """A target of which a killed process has left all shards but the last."""
    return remains(place, tmp_path)[-2]


def test_export_has_several_files_and_twice_the_same_bytes(place, tmp_path):
    export(place, tmp_path / "again")
    assert files_of(tmp_path / "again") == place.files
    assert len(list(place.target.glob("*.safetensors"))) > 3
    assert not list(place.target.glob(".*"))


def test_killed_after_any_tensor_it_goes_on_to_the_same_bytes(place, tmp_path):
    targets = remains(place, tmp_path)
    kept = 0
    for target in random.Random(3).sample(targets, 8):
        before = {path.name: path.stat() for path in (hidden(target) / "made").iterdir()}
        noted = replace(place, target=target).noted
        assert not target.exists()
        export(place, target)
        assert files_of(target) == place.files
        assert [path.name for path in target.parent.iterdir()] == ["out"]
        for name in noted:
            assert (target / name).stat().st_mtime_ns == before[name].st_mtime_ns, "a whole shard stays"
        kept += len(noted)
    assert kept > 8


def test_killed_export_in_4_bits_goes_on_to_the_same_bytes(place, tmp_path):
    parts = {"model_folder": place.model, "adapter_folder": place.adapter, "base": "dequantized"}
    options = {**parts, "load_dtype": "bf16", "writing": Writing(shard_bytes=300_000)}
    list(quantize(target=tmp_path / "whole", **options))
    killed, target = replace(place, target=tmp_path / "killed"), tmp_path / "out"
    events = quantize(target=killed.target, **options)
    while len(killed.noted) < 2:
        next(events)
    hidden(target).mkdir()
    shutil.copyfile(hidden(killed.target) / "manifest.json", hidden(target) / "manifest.json")
    shutil.copytree(hidden(killed.target) / "made", hidden(target) / "made")
    events.close()
    kept = {path.name: path.stat().st_mtime_ns for path in (hidden(target) / "made").iterdir()}
    noted = replace(place, target=target).noted
    list(quantize(target=target, **options))
    assert files_of(target) == files_of(tmp_path / "whole")
    assert all((target / name).stat().st_mtime_ns == kept[name] for name in noted)


def test_killed_at_drawn_moments_it_goes_on_to_the_same_bytes(place, tmp_path, monkeypatch):
    monkeypatch.setattr(killed_export, "MOST_KILLS", 1)
    draw, kills, seconds = random.Random(5), 0, 0.2
    while not kills and seconds > 1e-4:  # the faster the machine, the earlier it must be killed
        killed = replace(place, target=tmp_path / f"out-{seconds}")
        kills, _ = killed_export.trial(killed, expected=place.files, seconds=seconds, draw=draw)
        seconds /= 2
    assert kills


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-8] + b"\1" * 8),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.unlink(),
    ],
    ids=["other bytes", "cut off", "missing"],
)
def test_damaged_shard_of_a_killed_export_is_written_anew(place, late, damage):
    shard = next((hidden(late) / "made").glob(f"{KEPT}*"))
    damage(shard)
    export(place, late)
    assert files_of(late) == place.files


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"version": 1}', '{"version": 1, "identity": 0, "files": {}}']
)
def test_damaged_manifest_means_to_begin_anew(place, late, text):
    (hidden(late) / "manifest.json").write_text(text, encoding="utf-8")
    export(place, late)
    assert files_of(late) == place.files


def changed_base(place: Place, root: Path) -> Place:
    shutil.copytree(place.model, root / "model")
    path = next((root / "model").glob("*.safetensors"))
    weights = bytearray(path.read_bytes())
    first = 8 + int.from_bytes(weights[:8], "little")
    weights[first : first + 2] = b"\x80\x3f"  # 1.0
    path.write_bytes(weights)
    return replace(place, model=root / "model")


def changed_adapter(place: Place, root: Path) -> Place:
    shutil.copytree(place.adapter, root / "adapter")
    path = root / "adapter" / "adapter_config.json"
    path.write_text(path.read_text(encoding="utf-8").replace('alpha": 32', 'alpha": 16'), encoding="utf-8")
    return replace(place, adapter=root / "adapter")


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (changed_base, {}),
        (changed_adapter, {}),
        (lambda place, root: place, {"base": "original"}),
        (lambda place, root: place, {"form": "merged-bf16"}),
    ],
    ids=["base", "adapter", "on another base", "form"],
)
def test_nothing_is_kept_of_another_export(place, late, tmp_path, change: Callable[..., Place], options):
    other = change(place, tmp_path)
    export(other, late, **options)
    export(other, tmp_path / "undisturbed", **options)
    assert files_of(late) == files_of(tmp_path / "undisturbed")
    first = next(name for name in place.files if name.startswith(KEPT))
    assert files_of(late)[first] != place.files[first]


def test_what_does_not_belong_is_cleared(place, late):
    (hidden(late) / "made" / "model-00099-of-00099.safetensors").write_bytes(b"x")
    (hidden(late) / "made" / "folder").mkdir()
    (hidden(late) / "old.safetensors").write_bytes(b"x")
    export(place, late)
    assert files_of(late) == place.files


def test_room_for_what_is_there_already_is_not_asked_for(place, late, monkeypatch):
    kept = sum(path.stat().st_size for path in (hidden(late) / "made").glob(f"{KEPT}*"))
    needed = 32 * 2**20 + sum(path.stat().st_size for path in place.target.glob("*.safetensors"))
    monkeypatch.setattr(cache, "free_bytes", lambda _: 64 * 2**20 + needed - kept)
    export(place, late)
    assert files_of(late) == place.files


def test_room_that_is_asked_for_ahead_of_long_work_counts_what_a_killed_export_left(place, late, monkeypatch):
    left = sum(path.stat().st_size for path in hidden(late).rglob("*") if path.is_file())
    needed = 10 * left
    monkeypatch.setattr(cache, "free_bytes", lambda _: needed - left + 64 * 2**20)
    refuse_full(late, needed_bytes=needed)
    with pytest.raises(NoRoom, match="are free there"):
        refuse_full(late, needed_bytes=needed + 1)


def test_lack_of_room_leaves_what_a_killed_export_has_made(place, late, monkeypatch):
    made = files_of(hidden(late) / "made")
    monkeypatch.setattr(cache, "free_bytes", lambda _: 40_000_000)
    with pytest.raises(NoRoom):
        export(place, late)
    whole = replace(place, target=late).noted
    assert files_of(hidden(late) / "made") == {name: made[name] for name in whole}


def test_two_processes_do_not_make_the_same(tmp_path):
    with new_folder(tmp_path / "out", needed_bytes=1) as building:
        (building.path / "file").write_bytes(b"mine")
        with (
            pytest.raises(BadOutput, match="Another process is exporting to out"),
            new_folder(tmp_path / "out", needed_bytes=1),
        ):
            pass
    assert files_of(tmp_path / "out") == {"file": b"mine"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_export_never_overwrites_what_appeared_before_its_turn(tmp_path, monkeypatch):
    """Another process had the folder, and has just finished."""

    class SlowLock(staging.FileLock):
        def acquire(self, **options: float) -> object:
            (tmp_path / "out").mkdir()
            return super().acquire(**options)

    monkeypatch.setattr(staging, "FileLock", SlowLock)
    with pytest.raises(BadOutput, match="exists already"), new_folder(tmp_path / "out", needed_bytes=1):
        pytest.fail("it began to write")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_export_never_overwrites_what_appeared_while_it_was_written(tmp_path):
    with (
        pytest.raises(BadOutput, match="exists already"),
        new_folder(tmp_path / "out", needed_bytes=1) as building,
    ):
        (building.path / "file").write_bytes(b"mine")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "file").write_bytes(b"somebody's")
    assert files_of(tmp_path / "out") == {"file": b"somebody's"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_asking_for_a_target_that_exists_disturbs_no_process_at_work_beside_it(tmp_path):
    with pytest.raises(BadOutput), new_folder(tmp_path / "out", needed_bytes=1) as building:
        (building.path / "file").write_bytes(b"mine")
        (tmp_path / "out").mkdir()
        with pytest.raises(BadOutput, match="exists already"):
            refuse_existing(tmp_path / "out")
        assert files_of(building.path) == {"file": b"mine"}


def test_name_that_no_disk_takes_is_said(tmp_path):
    with (
        pytest.raises(BadOutput, match="cannot be written"),
        new_folder(tmp_path / ("x" * 300), needed_bytes=1),
    ):
        pytest.fail("it began to write")
    assert list(tmp_path.iterdir()) == []


def test_what_a_process_left_that_was_killed_after_the_rename_is_cleared(place, late):
    (hidden(late) / "made").replace(late)
    with pytest.raises(BadOutput, match="exists already"):
        export(place, late)
    assert [path.name for path in late.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_results_of_threads_come_in_order_and_their_number_stays(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    draw = random.Random(0)
    sizes = [draw.randrange(1, 20_000) for _ in range(40)]
    results = in_order(
        lambda size=size: (size, torch.ones(size).sum(), torch.get_num_threads()) for size in sizes
    )
    found = [next(results)]
    assert torch.get_num_threads() == threads
    found += results
    assert [size for size, *_ in found] == sizes
    assert all(total == size and used == 1 for size, total, used in found)
    assert torch.get_num_threads() == threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2])
def test_error_of_a_thread_is_raised_where_its_result_would_be(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    results = in_order(lambda value=value: 6 // value for value in (3, 2, 0, 1))
    assert [next(results), next(results)] == [2, 3]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert torch.get_num_threads() == threads
    torch.set_num_threads(before)


def test_merge_on_several_threads_is_that_on_one(place, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    export(place, tmp_path / "out")
    torch.set_num_threads(before)
    assert files_of(tmp_path / "out") == place.files
