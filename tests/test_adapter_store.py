"""The store of adapters: versions never change, names and tags move whole, nothing is lost or held twice."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as some
from rich.console import Console

from qadapt.adapters import store as store_module
from qadapt.adapters.difference import Difference
from qadapt.adapters.facts import AdapterFacts, write_facts
from qadapt.adapters.pointers import Name, check_name
from qadapt.adapters.store import Added, Store
from qadapt.adapters.versions import FileFacts, Record, Version, files_of, read_version
from qadapt.errors import BadAdapter, BadOutput, NoRoom
from qadapt.view.adapter_table import difference_lines, store_table

FACTS = AdapterFacts(
    base="owner/base", revision="c0ffee", fingerprint="f" * 64, quantization="nf4", double_quant=True,
    load_dtype="bf16", prompt_fingerprint="e" * 64,
)  # fmt: skip
RECORD = Record(FACTS, "lora", "run first", "d" * 64, {"adapter": {"rank": 4}}, {"held-out loss": 1.5})


def adapter(folder: Path, weights: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_model.safetensors").write_text(weights)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "README.md").write_text("left out")
    write_facts(FACTS, folder)
    return folder


class Shelf:
    """A store, and adapters to put in: the same weights are the same adapter."""

    def __init__(self, place: Path) -> None:
        self.place, self.store = place, Store(place / "adapters")

    def add(self, weights: str, name: str = "summaries", **options: str) -> str:
        return self.added(weights, name, **options).version.id

    def added(self, weights: str, name: str = "summaries", **options: str) -> Added:
        folder = adapter(self.place / "source" / weights, weights)
        return self.store.add(folder, RECORD, name=name, **options)

    def weights(self, what: str) -> str:
        return (self.store.folder_of(self.store.find(what)) / "adapter_model.safetensors").read_text()

    def names(self) -> dict[str, str]:
        return {each: self.weights(each) for each in self.store.names()}


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path)


def test_what_is_added_comes_back_with_all_that_is_known(shelf: Shelf) -> None:
    added = shelf.added("one")
    version = shelf.store.version(shelf.store.find("summaries"))
    assert version == added.version
    assert version.record == RECORD
    assert version.parent is None
    assert sorted(version.files) == ["adapter_config.json", "adapter_model.safetensors", "qadapt.json"]
    assert files_of(shelf.store.folder_of(version.id)) == version.files


def test_an_id_is_the_sha256_of_a_description_with_all_hashes(shelf: Shelf) -> None:
    first, second = shelf.add("one"), shelf.add("two")
    assert first != second
    assert shelf.store.version(second).parent == first
    other = replace(shelf.store.version(first), record=replace(RECORD, data="0" * 64))
    assert other.id != first


def test_an_id_is_the_same_in_every_release() -> None:
    """Whoever adds a field to what is known must leave it out of the description where it says nothing."""
    version = Version({"adapter_model.safetensors": FileFacts(3, "a" * 64)}, RECORD, "b" * 64)
    assert version.id == "8731bba7788d38475c04c8341a1e11ada6c003134af2021cb0a4a493b104d492"


def test_what_is_there_is_not_added_twice(shelf: Shelf) -> None:
    first = shelf.added("one")
    shelf.add("two")
    again = shelf.added("one")
    assert (again.version, again.is_new) == (first.version, False)
    assert shelf.weights("summaries") == "one"
    assert len(shelf.store.ids()) == 2


def test_what_is_said_to_have_followed_another_version_did(shelf: Shelf) -> None:
    one, two, three = shelf.add("one"), shelf.add("two"), shelf.add("three", "other")
    said = shelf.added("two", parent="other")
    assert (said.version.parent, said.is_new) == (three, True)
    again = shelf.added("two", parent="other")
    assert (again.version, again.is_new) == (said.version, False)
    assert shelf.added("two", parent=one).version.id == two
    assert shelf.weights(two) == shelf.weights(said.version.id) == "two"


def test_a_file_that_versions_share_is_on_the_disk_once(shelf: Shelf) -> None:
    ids = [shelf.add("one"), shelf.add("two")]
    configs = [shelf.store.folder_of(each) / "adapter_config.json" for each in ids]
    assert configs[0].samefile(configs[1])
    shelf.store.use("old", ids[0])
    shelf.store.rollback("summaries")
    shelf.store.remove(ids[1])
    assert configs[0].read_text() == "{}"


def test_a_disk_without_links_holds_copies(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise PermissionError

    monkeypatch.setattr("os.link", refuse)
    shelf.add("one")
    shelf.add("two")
    assert shelf.weights("summaries") == "two"


def test_a_shared_file_is_not_taken_from_a_damaged_version(shelf: Shelf) -> None:
    first = shelf.add("one")
    damaged = shelf.store.folder_of(first) / "adapter_config.json"
    damaged.write_text("!!")
    shelf.add("two")
    assert shelf.weights("summaries") == "two"


def test_names_move_and_roll_back_step_by_step(shelf: Shelf) -> None:
    one, two, three = (shelf.add(weights) for weights in ("one", "two", "three"))
    assert shelf.store.rollback("summaries").current == two
    assert shelf.store.rollback("summaries") == Name((one,), (three, two))
    with pytest.raises(BadAdapter, match=f"never meant another version than {one[:12]}"):
        shelf.store.rollback("summaries")
    shelf.add("four")
    assert shelf.store.rollback("summaries").current == one
    shelf.store.use("summaries", three[:10])
    assert shelf.weights("summaries") == "three"
    assert shelf.store.rollback("summaries").current == one


def test_a_rollback_is_one_rename(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf.add("one")
    shelf.add("two")
    renamed: list[tuple[str, str]] = []
    replace_of = Path.replace

    def noted(self: Path, target: Path) -> Path:
        renamed.append((self.name, Path(target).name))
        return replace_of(self, target)

    monkeypatch.setattr(Path, "replace", noted)
    shelf.store.rollback("summaries")
    assert renamed == [(".summaries.json.tmp", "summaries.json")]


def test_tags_move_and_names_do_not_take_them(shelf: Shelf) -> None:
    one, two = shelf.add("one"), shelf.add("two")
    shelf.store.tag(one, "best")
    assert shelf.weights("best") == "one"
    shelf.store.tag("summaries", "best")
    assert shelf.store.tags() == {"best": two}
    with pytest.raises(BadAdapter, match=r"best is a tag in .* already"):
        shelf.add("three", "best")
    with pytest.raises(BadAdapter, match=r"best is a tag in .* already"):
        shelf.store.use("best", one)
    with pytest.raises(BadAdapter, match=r"summaries is a name in .* already"):
        shelf.store.tag(one, "summaries")


@pytest.mark.parametrize(
    "name", ["", "Big", "a/b", "../a", "a.", "con", "nul.txt", "com1", "-a", "a b", "é", "a" * 65]
)
def test_a_name_that_some_system_cannot_have_is_refused(shelf: Shelf, name: str) -> None:
    with pytest.raises(BadAdapter, match="cannot be a name in the store"):
        shelf.add("one", name)
    assert not shelf.store.path.exists()


def test_a_name_that_reads_as_an_id_is_refused(shelf: Shelf) -> None:
    with pytest.raises(BadAdapter, match=r"'cafe' cannot be a name .* beginning of a version's id") as caught:
        shelf.add("one", "cafe")
    check_name("cafe-1", what="name")
    assert "cafe-1" in caught.value.cure


def test_an_ambiguous_id_lists_the_versions(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    alike = ["abcd" + "0" * 60, "abcd" + "1" * 60]
    monkeypatch.setattr(shelf.store, "ids", lambda: alike)
    with pytest.raises(
        BadAdapter, match="abcd is the beginning of 2 versions: abcd00000000, abcd11111111"
    ) as caught:
        shelf.store.find("abcd")
    assert caught.value.cure == "Give more characters."
    assert shelf.store.find("abcd1") == alike[1]


@pytest.mark.parametrize("what", ["nothing", "abc", "f" * 64])
def test_what_is_not_there_is_said_with_what_is(shelf: Shelf, what: str) -> None:
    shelf.add("one")
    with pytest.raises(BadAdapter, match=f"no name, tag or version '{what}'") as caught:
        shelf.store.find(what)
    assert "summaries" in caught.value.cure


def test_a_mistyped_name_gets_a_hint(shelf: Shelf) -> None:
    shelf.add("one")
    with pytest.raises(BadAdapter) as caught:
        shelf.store.rollback("sumaries")
    assert "Did you mean `summaries`?" in caught.value.cure


def test_without_a_store_nothing_is_made(shelf: Shelf) -> None:
    for call in (shelf.store.gc, lambda: shelf.store.remove("a"), lambda: shelf.store.find("a")):
        with pytest.raises(BadAdapter, match="no store in"):
            call()
    with pytest.raises(BadAdapter, match="no store in"):
        shelf.add("one", parent="absent")
    assert not shelf.store.path.exists()


def test_a_store_is_made_where_its_path_leads_and_nothing_on_the_way(shelf: Shelf) -> None:
    detour = Store(shelf.place / "absent" / ".." / "adapters")
    with pytest.raises(BadOutput, match=r"adapters cannot be written: it goes up from .*absent, which is no"):
        detour.add(adapter(shelf.place / "one", "one"), RECORD, name="summaries")
    assert [path.name for path in shelf.place.iterdir()] == ["one"]
    (shelf.place / "absent").mkdir()
    detour.add(shelf.place / "one", RECORD, name="summaries")
    assert shelf.weights("summaries") == "one"


def test_gc_frees_what_nothing_means_or_meant(shelf: Shelf) -> None:
    one, two, three = (shelf.add(weights) for weights in ("one", "two-two", "three"))
    shelf.store.rollback("summaries")
    assert shelf.store.gc().versions == ()
    shelf.store.tag(one, "first")
    shelf.store.remove("summaries")
    trial = shelf.store.gc(is_trial=True)
    assert shelf.store.ids() == sorted([one, two, three])
    assert shelf.store.gc() == trial
    assert sorted(trial.versions) == sorted([two, three])
    own = sum((shelf.store.version(one).bytes, 0))
    assert trial.bytes > len("two-two" + "three")
    assert trial.bytes < 2 * own + 10_000
    assert shelf.store.ids() == [one]
    assert shelf.weights("first") == "one"


def test_gc_counts_a_shared_file_only_if_nobody_keeps_it(shelf: Shelf) -> None:
    shelf.add("one")
    two = shelf.add("two")
    description = len(shelf.store.version(two).text().encode())
    shelf.store.rollback("summaries")
    shelf.store.use("other", "summaries")
    shelf.store.remove("summaries")
    assert shelf.store.gc() == store_module.Freed((two,), len("two") + description)


def test_a_version_in_use_is_not_removed(shelf: Shelf) -> None:
    one, two = shelf.add("one"), shelf.add("two")
    shelf.store.tag(one, "best")
    with pytest.raises(BadAdapter, match=f"The version {two[:12]} is in use: summaries means it"):
        shelf.store.remove(two)
    with pytest.raises(BadAdapter, match="in use: best means it"):
        shelf.store.remove(one)
    assert shelf.store.remove("best") == "the tag best"
    assert shelf.store.remove(one) == f"the version {one[:12]}"
    assert shelf.store.names() == {"summaries": Name((two,))}
    assert shelf.store.ids() == [two]


def test_a_damaged_version_is_refused_everywhere_and_mended_by_adding_it_again(shelf: Shelf) -> None:
    one = shelf.add("one")
    shelf.add("two")
    path = shelf.store.folder_of(one) / "adapter_model.safetensors"
    path.write_text("eno")
    for call in (
        lambda: shelf.store.folder_of(one),
        lambda: shelf.store.rollback("summaries"),
        lambda: shelf.store.use("other", one),
    ):
        with pytest.raises(BadAdapter, match=f"{one[:12]} is damaged: adapter_model.safetensors"):
            call()
    assert shelf.weights("summaries") == "two"
    again = shelf.added("one")
    assert (again.version.id, again.is_new) == (one, False)
    assert shelf.weights("summaries") == "one"


def test_a_file_too_many_is_noticed_and_gone_once_it_is_mended(shelf: Shelf) -> None:
    one = shelf.add("one")
    (shelf.store.folder_of(one) / "side_car.json").write_text("{}")
    with pytest.raises(BadAdapter, match=r"is damaged: side_car\.json is not what was added"):
        shelf.store.folder_of(one)
    shelf.add("one")
    assert files_of(shelf.store.folder_of(one)) == shelf.store.version(one).files


def test_a_description_that_was_changed_is_refused(shelf: Shelf) -> None:
    one = shelf.add("one")
    path = shelf.store.path / "versions" / one / "version.json"
    path.write_text(path.read_text().replace("1.5", "0.5"))
    with pytest.raises(BadAdapter, match=f"{one[:12]} has no sound version.json: it was changed"):
        shelf.store.folder_of(one)
    shelf.add("one")
    assert shelf.weights("summaries") == "one"


def test_an_older_version_whose_description_is_damaged_is_mended_by_adding_it_again(shelf: Shelf) -> None:
    one, two, three = (shelf.add(weights) for weights in ("one", "two", "three"))
    for each in (one, two):
        (shelf.store.path / "versions" / each / "version.json").write_text("{")
    assert [shelf.add("one"), shelf.add("two")] == [one, two]
    assert [shelf.store.version(each).parent for each in (one, two, three)] == [None, one, two]
    assert shelf.store.rollback("summaries").current == one
    assert len(shelf.store.ids()) == 3


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", '{"version": 2}', '{"version": 1}', '{"version": 1, "used": [], "left": []}'),
        '{"version": 1, "used": ["ID"]}',
        '{"version": 1, "used": "ID", "left": []}',
        '{"version": 1, "used": ["ID"], "left": 3}',
        '{"version": 1, "used": [4], "left": []}',
        '{"version": 1, "used": ["../ID"], "left": []}',
    ],
)
def test_a_damaged_name_says_which_file(shelf: Shelf, text: str) -> None:
    one = shelf.add("one")
    (shelf.store.path / "names" / "summaries.json").write_text(text.replace("ID", one))
    with pytest.raises(BadAdapter, match=r"summaries\.json does not say which version is meant"):
        shelf.store.names()


def test_a_version_that_somebody_deleted_is_said(shelf: Shelf) -> None:
    one = shelf.add("one")
    shutil.rmtree(shelf.store.path / "versions" / one)
    with pytest.raises(BadAdapter, match=f"stands for the version {one[:12]}, which is not in"):
        shelf.store.find("summaries")


def test_a_link_in_the_folder_is_refused(shelf: Shelf, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "odd", "one")
    (tmp_path / "secret.json").write_text("{}")
    (folder / "prompt.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(BadAdapter, match=r"prompt\.json in .* is a link to .*secret\.json"):
        shelf.store.add(folder, RECORD, name="odd")


def test_pickled_weights_are_refused_and_other_pickles_left_out(shelf: Shelf, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "odd", "one")
    (folder / "training_args.bin").write_bytes(b"\x80\x04.")
    added = shelf.store.add(folder, RECORD, name="odd")
    assert "training_args.bin" not in added.version.files
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(BadAdapter, match=r"are a pickle \(adapter_model\.bin\)"):
        shelf.store.add(folder, RECORD, name="odd")
    for path in folder.glob("*.bin"):
        path.unlink()
    with pytest.raises(BadAdapter, match="holds no adapter"):
        shelf.store.add(folder, RECORD, name="odd")


def test_a_file_that_changes_while_it_is_copied_is_noticed(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copyfile

    def changed(source: Path, target: Path) -> None:
        copy(source, target)
        target.write_text("other")

    monkeypatch.setattr(shutil, "copyfile", changed)
    with pytest.raises(BadAdapter, match="was changed while it was being added"):
        shelf.add("one")
    assert shelf.store.ids() == []
    assert shelf.store.names() == {}


def test_what_does_not_belong_to_an_adapter_is_left_out(shelf: Shelf, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "odd", "one")
    for name in (
        "checkpoint-5/adapter_model.safetensors",
        "model.safetensors",
        "trainer_state.json",
        "x/LICENSE",
        "license_plates.safetensors",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("more")
    kept = (
        "LICENSE.txt",
        "licence.md",
        "MODEL_LICENSE",
        "Notices.txt",
        "USE_POLICY.md",
        "additional_chat_templates/rag.jinja",
        "tokenizer.json",
        "prompt.json",
    )
    for name in kept:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    version = shelf.store.add(folder, RECORD, name="odd").version
    assert set(version.files) == {*kept, "adapter_config.json", "adapter_model.safetensors", "qadapt.json"}
    assert files_of(shelf.store.folder_of(version.id)) == version.files


def test_a_full_disk_is_refused_before_the_first_byte(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qadapt.cache.free_bytes", lambda folder: 10)
    with pytest.raises(NoRoom, match="The adapter needs"):
        shelf.add("one")
    assert shelf.store.ids() == []


def test_whoever_waits_too_long_is_told(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf.add("one")
    monkeypatch.setattr(store_module, "WAIT_SECONDS", 0.0)
    with (
        FileLock(shelf.store.path / "lock"),
        pytest.raises(BadOutput, match="Another process has been changing"),
    ):
        shelf.add("two")
    assert shelf.names() == {"summaries": "one"}


MOVES = some.lists(
    some.tuples(some.sampled_from(["add", "use", "rollback"]), some.integers(0, 3)), min_size=1, max_size=12
)


@given(MOVES)
def test_a_name_is_a_stack_of_versions(moves: list[tuple[str, int]]) -> None:
    """Against a plain list: moving pushes, rolling back pops, and nothing that was meant is lost."""
    name, stack, seen = Name(("0",)), ["0"], {"0"}
    for move, number in moves:
        version = str(number)
        if move == "rollback":
            if len(stack) == 1:
                continue
            stack.pop()
            name = name.rolled_back()
        else:
            if version != stack[-1]:
                stack.append(version)
            seen.add(version)
            name = name.moved_to(version)
        assert name.used == tuple(stack)
        assert seen == {*name.used, *name.left}
        assert len(set(name.left)) == len(name.left)


class Expected:
    """A store as plain dictionaries: what every name, tag and version must be."""

    def __init__(self) -> None:
        self.names: dict[str, list[str]] = {}
        self.left: dict[str, set[str]] = {}
        self.tags: dict[str, str] = {}
        self.versions: set[str] = set()

    def move(self, name: str, weights: str) -> None:
        stack = self.names.setdefault(name, [])
        if not stack or stack[-1] != weights:
            stack.append(weights)
            self.left.setdefault(name, set()).discard(weights)

    def roll_back(self, name: str) -> None:
        self.left[name].add(self.names[name].pop())

    def collect(self) -> None:
        meant = {each for stack in self.names.values() for each in stack}
        meant |= {each for name in self.names for each in self.left[name]}
        self.versions &= meant | set(self.tags.values())


DEEDS = some.tuples(
    some.sampled_from(["add", "use", "tag", "rollback", "remove name", "remove tag", "gc"]),
    some.sampled_from(["a-name", "b-name"]),
    some.sampled_from(["one", "two", "three"]),
)


def follow(shelf: Shelf, expected: Expected, deed: str, *, name: str, weights: str) -> None:
    """Does one thing in the store and with the dictionaries; what cannot be done is refused by the store."""
    known = {shelf.weights(each): each for each in shelf.store.ids()}
    if deed == "add":
        shelf.add(weights, name)
        expected.versions.add(weights)
        expected.move(name, weights)
    elif deed in ("use", "tag") and weights in known:
        if deed == "use":
            shelf.store.use(name, known[weights])
            expected.move(name, weights)
        else:
            shelf.store.tag(known[weights], "best")
            expected.tags["best"] = weights
    elif deed == "rollback" and len(expected.names.get(name, [])) > 1:
        shelf.store.rollback(name)
        expected.roll_back(name)
    elif deed == "remove name" and name in expected.names:
        shelf.store.remove(name)
        del expected.names[name], expected.left[name]
    elif deed == "remove tag" and expected.tags:
        shelf.store.remove("best")
        expected.tags.clear()
    elif deed == "gc" and shelf.store.path.exists():
        shelf.store.gc()
        expected.collect()


@settings(max_examples=40)
@given(some.lists(DEEDS, min_size=1, max_size=14))
def test_whatever_is_done_the_store_holds_what_plain_dictionaries_hold(
    deeds: list[tuple[str, str, str]],
) -> None:
    with TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda handle: None)
        shelf, expected = Shelf(Path(place)), Expected()
        for deed, name, weights in deeds:
            follow(shelf, expected, deed, name=name, weights=weights)
            assert shelf.names() == {name: stack[-1] for name, stack in expected.names.items()}
            assert {tag: shelf.weights(tag) for tag in shelf.store.tags()} == expected.tags
            kept = {shelf.weights(each) for each in shelf.store.ids()}
            assert expected.versions == kept
            for name, value in shelf.store.names().items():
                used = [shelf.weights(each) for each in value.used]
                assert used == expected.names[name]


@pytest.mark.parametrize("width", [80, 160])
def test_a_list_hides_no_name_and_no_id(shelf: Shelf, width: int) -> None:
    long, source = "a-very-long-name-that-somebody-gave", f"hub me/some-long-adapter-name@{'c0ffee' * 7}"[:-2]
    record = replace(RECORD, source=source, facts=replace(FACTS, base="meta-llama/Llama-3.1-8B-Instruct"))
    folder = adapter(shelf.place / "source", "one")
    one, two = shelf.store.add(folder, record, name=long).version.id, shelf.add("two")
    (shelf.store.path / "versions" / two / "version.json").write_text("{")
    with (screen := Console(width=width, file=StringIO())).capture() as said:
        screen.print(store_table(shelf.store))
    lines = said.get().splitlines()
    assert max(map(len, lines)) <= width and "…" not in said.get()
    assert one[:12] in said.get() and two[:12] in said.get() and "is damaged" in said.get()
    names = "".join(line[: lines[1].index("version")].strip() for line in lines)
    words = "".join(line[lines[1].index("from") :].strip() for line in lines)
    assert long in names
    assert "c0ffeec0ffee" in words and "c0ffeec0ffeec" not in words
    assert "onLlama-3.1-8B-Instruct" in words.replace(" ", "")


def test_versions_without_a_tensor_in_common_are_said_to_have_none() -> None:
    found = Difference((), (), 0, 0, ("a",), ("a", "b"), 0.0, "")
    assert list(difference_lines(found)) == [
        "numbers: no tensor of the one has a place in the other",
        "only in the first, or in another shape: 1 tensor, such as a",
        "only in the second, or in another shape: 2 tensors, such as a",
    ]


def test_a_version_reads_back_as_it_was_written(shelf: Shelf) -> None:
    one = shelf.add("one")
    folder = shelf.store.path / "versions" / one
    version = read_version(folder)
    assert version.text() == (folder / "version.json").read_text(encoding="utf-8")
    assert json.loads(version.text())["record"]["facts"]["fingerprint"] == "f" * 64
