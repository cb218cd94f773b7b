"""Datasets of a hub: fetched at one commit, read like files, refused with the reason and the cure.

The libraries read the hub's address when they are imported, so the readings happen in processes of their own.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hub_server import COMMIT, Repository, running_hub
from row_files import TURNS, problem_of, write_rows

from qadapt.data.reading import hub_rows
from qadapt.data.reading.hub_rows import hub_commit
from qadapt.data.reading.sources import RowReader
from qadapt.errors import BadData, BadOutput

READ = """
import json, sys
from qadapt.data.reading.hub_rows import hub_commit
from qadapt.data.reading.sources import RowReader
from qadapt.errors import BadData

found = {}
for name, rules in json.load(sys.stdin).items():
    reader = RowReader()
    try:
        rows = list(reader.rows(f"hub:{rules.pop('path')}", **rules))
    except BadData as error:
        found[name] = {"problem": error.problem, "cure": error.cure}
    else:
        parts = [[row.turns, row.tools] for row in rows]
        found[name] = {"rows": parts, "places": [row.place for row in rows], "formats": reader.formats}
found["commit"] = hub_commit("owner/rows")
json.dump(found, sys.stdout)
"""
CARD = b"""---
configs:
- config_name: en
  data_files: en.jsonl
- config_name: de
  data_files: de.jsonl
---
"""
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": [1, "two"]}}}]}
OTHER = {"role": "assistant", "tool_calls": [{"function": {"name": "g", "arguments": {"y": {"z": None}}}}]}
CALLS = [{"messages": [TURNS[0], CALL]}, {"messages": [TURNS[0], OTHER]}, {"messages": TURNS}]


def lines(count: int) -> bytes:
    return b"".join(
        json.dumps({"prompt": f"ask {n}", "completion": "x"}).encode() + b"\n" for n in range(count)
    )


def as_lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


DATASETS = {
    "owner/rows": Repository({"README.md": b"about", "train.jsonl": lines(5), "test.jsonl": lines(2)}),
    "owner/calls": Repository({"train.jsonl": as_lines(CALLS)}),
    "owner/subsets": Repository({"README.md": CARD, "en.jsonl": lines(3), "de.jsonl": lines(4)}),
    "owner/gated": Repository({"README.md": b""}, is_gated=True),
    "owner/code": Repository({"README.md": b"", "code.py": b"raise SystemExit"}),
    "owner/broken": Repository({"train.jsonl": b'{"prompt": "x"}\n{"prom'}),
}
ONLINE: dict[str, dict[str, object]] = {
    "rows": {"path": "owner/rows"},
    "test": {"path": "owner/rows", "split": "test"},
    "part": {"path": "owner/rows", "split": "train[:40%]+test", "limit": 3},
    "commit given": {"path": f"owner/rows@{COMMIT}"},
    "calls": {"path": "owner/calls"},
    "subset": {"path": "owner/subsets", "subset": "de"},
    "no split": {"path": "owner/rows", "split": "dev"},
    "no revision": {"path": "owner/rows@v9"},
    "no dataset": {"path": "owner/none"},
    "no name": {"path": "a/b/c"},
    "no such subset": {"path": "owner/subsets", "subset": "fr"},
    "which subset": {"path": "owner/subsets"},
    "gated": {"path": "owner/gated"},
    "code": {"path": "owner/code"},
    "broken": {"path": "owner/broken"},
}
OFFLINE: dict[str, dict[str, object]] = {
    "rows": {"path": "owner/rows"},
    "subset": {"path": "owner/subsets", "subset": "de"},
    "other subset": {"path": "owner/subsets", "subset": "en"},
    "commit given": {"path": f"owner/rows@{COMMIT}"},
    "other commit": {"path": f"owner/rows@{COMMIT[::-1]}"},
    "never fetched": {"path": "owner/none"},
    "no split": {"path": "owner/rows", "split": "dev"},
}
Found = dict[str, Any]


def read_all(readings: Found, folder: Path, endpoint: str, **others: str) -> Found:
    """What a process finds that knows this hub only."""
    places = {"HF_HOME": str(folder / "cache"), "HF_ENDPOINT": endpoint, "NO_PROXY": "127.0.0.1,localhost"}
    environment = {key: value for key, value in os.environ.items() if key != "HF_TOKEN"} | places | others
    (folder / "here" / "owner" / "rows").mkdir(parents=True, exist_ok=True)
    write_rows(folder / "here" / "owner" / "rows" / "decoy.jsonl", {"prompt": "local", "completion": "x"})
    done = subprocess.run(
        [sys.executable, "-c", READ],
        input=json.dumps(readings), capture_output=True, text=True, env=environment, cwd=folder / "here",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert not done.stderr, "libraries keep quiet"
    found: Found = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Found, Found]:
    """What is found with the hub in reach, and afterwards without it."""
    folder = tmp_path_factory.mktemp("hub")
    with running_hub() as hub:
        hub.datasets |= DATASETS
        online = read_all(ONLINE, folder, hub.endpoint)
    return online, read_all(OFFLINE, folder, "http://127.0.0.1:9")


def asked(result: Found) -> list[str]:
    return [turns[0]["content"] for turns, _ in result["rows"]]


def test_a_dataset_is_read_split_by_split(found: tuple[Found, Found]) -> None:
    online, _ = found
    assert asked(online["rows"]) == [f"ask {number}" for number in range(5)]
    assert online["rows"]["places"][4] == "owner/rows (train), row 5"
    assert online["rows"]["formats"] == {"prompt-completion": 5}
    assert online["test"]["places"] == ["owner/rows (test), row 1", "owner/rows (test), row 2"]
    assert asked(online["part"]) == ["ask 0", "ask 1", "ask 0"]
    assert online["commit given"] == online["rows"]
    assert online["commit"] == COMMIT
    assert len(online["subset"]["rows"]) == 4


def test_a_dataset_is_read_as_its_file_would_be(found: tuple[Found, Found], tmp_path: Path) -> None:
    rows = RowReader().read(write_rows(tmp_path / "rows.jsonl", *CALLS[:1], *CALLS[2:]))
    direct = [[row.turns, list(row.tools)] for row in rows]  # type: ignore[union-attr]
    online = found[0]["calls"]["rows"]
    assert [online[0], online[2]] == direct
    assert online[1][0][1]["tool_calls"][0]["function"]["name"] == "g"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no split", "owner/rows has no split 'dev'; it has train, test"),
        ("no revision", "owner/rows has no revision 'v9'"),
        ("no dataset", "There is no dataset owner/none on the hub, or it is private"),
        ("no name", "'a/b/c' is no name of a dataset"),
        ("no such subset", "owner/subsets has no subset 'fr'; it has en, de"),
        ("which subset", "owner/subsets has several subsets: en, de"),
        ("gated", "The dataset owner/gated is gated, and no account that may read it"),
        ("code", "The dataset owner/code cannot be read: Dataset scripts are no longer supported"),
        ("broken", "The dataset owner/broken cannot be read: JSON parse error"),
    ],
)
def test_what_cannot_be_read_is_one_error_with_its_cure(
    found: tuple[Found, Found], name: str, said: str
) -> None:
    assert said in found[0][name]["problem"]
    assert found[0][name]["cure"]


def test_without_a_network_what_was_fetched_is_read_and_no_other_state(found: tuple[Found, Found]) -> None:
    online, offline = found
    assert offline["commit"] is None
    for name in ("rows", "subset", "commit given"):
        assert offline[name] == online[name]
    assert "in another state than" in offline["other commit"]["problem"]
    assert "owner/subsets, subset en, is not on this disk" in offline["other subset"]["problem"]
    assert (
        "The dataset owner/none is not on this disk and the hub is out of reach"
        in (offline["never fetched"]["problem"])
    )
    assert "it has train, test" in offline["no split"]["problem"]


def test_split_and_subset_are_not_for_files(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", {"prompt": "x", "completion": "y"})
    for rules, said in (({"split": "test"}, "has no split 'test'"), ({"subset": "en"}, "has no subset 'en'")):
        with pytest.raises(BadData, match=f"is a local file and {said}: that is for datasets of the hub"):
            list(RowReader().rows(path, **rules))  # type: ignore[arg-type]
    assert len(list(RowReader().rows(path, split="train"))) == 1


def test_a_name_that_is_none_needs_no_network() -> None:
    assert "is no name of a dataset" in problem_of("hub:")
    with pytest.raises(BadData, match="is no name of a dataset"):
        hub_commit("a b")


@pytest.mark.parametrize("is_wrapped", [True, False])
def test_a_full_disk_is_named_as_that(monkeypatch: pytest.MonkeyPatch, is_wrapped: bool) -> None:
    from datasets.exceptions import DatasetGenerationError

    class Builder:
        def download_and_prepare(self) -> None:
            full = OSError(errno.ENOSPC, "No space left on device")
            if is_wrapped:
                raise DatasetGenerationError("while generating") from full
            raise full

    monkeypatch.setattr(hub_rows, "hub_commit", lambda name, revision: COMMIT)
    monkeypatch.setattr(hub_rows, "_builder", lambda name, *, subset, commit: Builder())
    monkeypatch.setattr(hub_rows, "_check_split", lambda *given, **rules: None)
    with pytest.raises(BadOutput, match=r"The disk of .* is full"):
        RowReader().read("hub:owner/rows")
