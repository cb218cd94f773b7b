"""`qadapt adapters combine`, as it is typed: what it writes, says and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from merged_families import make_family
from safetensors.torch import load_file, save_file
from test_compose import WEIGHTS, assert_near, deltas, total
from test_merge import make_adapter
from test_merge_methods import load

from qadapt.cli.main import run


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the adapters a and b."""
    root = tmp_path_factory.mktemp("named")
    make_family(root / "base", "llama")
    for seed, name in enumerate("ab"):
        make_adapter(load(root / "base"), root / name, seed=seed)
    return root


def combined(*words: str) -> int:
    return run(["adapters", "combine", *words])


@pytest.fixture
def here(adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder with the adapters is the current one; what is made goes to `tmp_path`."""
    monkeypatch.chdir(adapters)
    return tmp_path


def test_a_sum_is_written_and_its_error_said(here, capfd):
    assert combined("a=0.7", "b=-0.3", "--to", str(here / "out")) == 0
    said = capfd.readouterr().out
    assert "14 weights, rank 8, float32" in said and "of what was asked for" in said
    assert_near(deltas(here / "out"), total((deltas(Path("a")), 0.7), (deltas(Path("b")), -0.3)))


def test_a_compressed_sum_says_what_is_lost_as_json(here, capfd):
    assert combined("a=1", "b=1", "--rank", "4", "--to", str(here / "out"), "--json") == 0
    told = json.loads(capfd.readouterr().out)
    exact, found = total((deltas(Path("a")), 1), (deltas(Path("b")), 1)), deltas(here / "out")
    lost = sum(float((exact[name] - found[name]).square().sum()) for name in exact)
    size = sum(float(value.square().sum()) for value in exact.values())
    assert told["error"] == pytest.approx((lost / size) ** 0.5, rel=1e-6)
    assert (told["schema"], told["rank"], told["weights"]) == (1, 4, len(exact))
    assert told["bytes"] == (here / "out" / WEIGHTS).stat().st_size


def test_what_loses_nothing_says_so(here, capfd):
    assert combined("a=2", "--to", str(here / "twice")) == 0
    assert "to the bit" in capfd.readouterr().out
    assert combined("a=1", "--to", str(here / "copy")) == 0
    assert "a copy" in capfd.readouterr().out


def test_a_folder_whose_name_has_an_equals_sign_can_be_named(here, capfd):
    assert combined("a=1", "b=1", "--to", str(here / "x=1")) == 0
    assert combined(f"{here / 'x=1'}=2", "--to", str(here / "out")) == 0


def test_ties_takes_a_density(here, capfd):
    words = ("a=1", "b=1", "--how", "ties", "--density", "0.2", "--rank", "3", "--to", str(here / "out"))
    assert combined(*words) == 0
    assert "rank 3" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("a", "b=1"), "'a' is no adapter with its weight"),
        (("a=much",), "'a=much' is no adapter with its weight"),
        (("=1",), "'=1' is no adapter with its weight"),
        (("a=nan",), "is nan; a number is needed"),
        (("nowhere=1",), "nowhere"),
        (("a=1", "b=1", "--how", "mean"), "'mean'"),
        (("a=1", "b=1", "--how", "dare"), "its density is None"),
        (("a=1", "--rank", "0"), "rank 0"),
    ],
)
def test_what_means_nothing_is_refused_with_a_cure(here, capfd, words, said):
    assert combined(*words, "--to", str(here / "out")) == 2
    error = capfd.readouterr().err
    assert said in error.replace("\n", " ") and "Traceback" not in error
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    "to", ["absent/../out", "absent/deep/../../../out", "absent/..", "a/../b/../absent/../out"]
)
def test_a_way_up_from_a_folder_that_is_not_there_is_refused_and_nothing_left(here, adapters, capfd, to):
    before = sorted(adapters.rglob("*"))
    assert combined("a=1", "b=1", "--to", to) == 2
    error = capfd.readouterr().err
    assert "goes up from" in error and "absent" in error and "without `..`" in error
    assert sorted(adapters.rglob("*")) == before
    assert not (adapters.parent / "out").exists()
    assert combined("a=1", "b=1", "--to", str(here / ".." / here.name / "out")) == 0
    assert [path.name for path in here.iterdir()] == ["out"]


def test_a_damaged_adapter_is_refused(here, adapters, capfd):
    (here / "bad").mkdir()
    for path in (adapters / "a").iterdir():
        (here / "bad" / path.name).write_bytes(path.read_bytes())
    tensors = load_file(here / "bad" / WEIGHTS)
    tensors.pop(next(name for name in tensors if "lora_A" in name))
    save_file(tensors, here / "bad" / WEIGHTS, {"format": "pt"})
    assert combined(f"{here / 'bad'}=2", "--to", str(here / "out")) == 2
    assert "only one of the two matrices" in capfd.readouterr().err
