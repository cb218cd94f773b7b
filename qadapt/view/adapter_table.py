"""The store on the screen: its names, one version, and how two differ."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from qadapt.adapters.facts import below_of, nonlinearity_of
from qadapt.adapters.store import SHOWN, Store
from qadapt.adapters.versions import Version
from qadapt.errors import BadAdapter
from qadapt.units import format_bytes

if TYPE_CHECKING:
    from qadapt.adapters.difference import Difference

MOST_CHANGES = 40
_COMMIT = re.compile(r"@([0-9a-f]{12})[0-9a-f]{28}$")


def store_values(store: Store) -> dict[str, Any]:
    """All of a store as plain values.

    A version whose description is damaged is there with its `fault` and nothing else.

    Raises:
        BadAdapter: A name or a tag is damaged.
    """
    names, tags = store.names(), store.tags()
    versions = {each: _version_values(store, each) for each in store.ids()}
    return {
        "schema": 1,
        "names": {
            each: {"id": name.current, "used": name.used, "left": name.left} for each, name in names.items()
        },
        "tags": tags,
        "versions": versions,
    }


def _version_values(store: Store, version_id: str) -> dict[str, Any]:
    try:
        version = store.version(version_id)
    except BadAdapter as error:
        return {"fault": error.problem}
    record = version.record
    return {
        "base": record.facts.base,
        "revision": record.facts.revision,
        "method": record.method,
        "source": record.source,
        "metrics": dict(record.metrics),
        "bytes": version.bytes,
        "parent": version.parent,
    }


def store_table(store: Store) -> Table:
    """Every version with what means it, names first.

    Raises:
        BadAdapter: A name or a tag is damaged.
    """
    values = store_values(store)
    table = Table(box=None, pad_edge=False)
    for title in ("", "version", "method", "held-out\nloss", "size", "from"):
        table.add_column(title, no_wrap=title not in ("", "from"), overflow="fold")
    shown = [(name, each["id"]) for name, each in values["names"].items()]
    shown += [(f"tag {tag}", each) for tag, each in values["tags"].items()]
    meant = {each for _, each in shown}
    former = {each for name in values["names"].values() for each in (*name["used"], *name["left"])}
    for each in values["versions"]:
        if each not in meant:
            shown.append(("(former)" if each in former else "(unused)", each))
    for words, each in shown:
        version = values["versions"].get(each)
        if version is None or "fault" in version:
            what = "is not in the store any more" if version is None else "is damaged"
            table.add_row(Text(words), each[:SHOWN], "", "", "", Text(what))
            continue
        loss = version["metrics"].get("held-out loss")
        base = Path(version["base"]).name
        source = _COMMIT.sub(r"@\1", version["source"])
        table.add_row(
            Text(words),
            each[:SHOWN],
            Text(version["method"]),
            "" if loss is None else f"{loss:.4f}",
            format_bytes(version["bytes"]),
            Text(f"{source}\non {base}"),
        )
    return table


def version_lines(version: Version, folder: Path) -> Iterator[str]:
    """What is known of a version, one line each.

    Args:
        version: The version.
        folder: Where its files are.
    """
    record, facts = version.record, version.record.facts
    held = {"nf4": "4 bits (NF4)", "int8": "8 bits", "none": "16 or 32 bits"}[facts.quantization]
    lines = {
        "version": version.id,
        "from": record.source,
        "method": record.method,
        **({"nonlinearity": name} if (name := nonlinearity_of(folder)) else {}),
        **({"stands on": f"{on.get('name')}, {on.get('sha256')}"} if (on := below_of(folder)) else {}),
        "base": f"{facts.base}{f'@{facts.revision}' if facts.revision else ''}, held in {held}",
        "base's hash": facts.fingerprint,
        "prompts": facts.prompt_fingerprint,
        "rows": record.data or "not known",
        **{name: f"{value:.6g}" for name, value in record.metrics.items()},
        "parent": version.parent or "none",
        "files": f"{len(version.files)}, {format_bytes(version.bytes)}, each as it was added",
        "folder": f"{folder}",
    }
    for name, value in lines.items():
        yield f"{name:<{max(map(len, lines))}}  {value}"


def difference_lines(found: Difference) -> Iterator[str]:
    """How two versions differ, one line each."""
    for change in found.changes[:MOST_CHANGES]:
        yield f"{change.what}: {_said(change.first)} → {_said(change.second)}"
    if len(found.changes) > MOST_CHANGES:
        yield f"... and {len(found.changes) - MOST_CHANGES} more; --json has them all"
    if not found.changed_tensors and not found.only_first and not found.only_second:
        yield f"numbers: all {found.tensors} tensors are the same"
        return
    if found.tensors:
        most = f"; most in {found.furthest}" if found.furthest else ""
        yield (
            f"numbers: {found.changed_tensors} of {found.tensors} tensors differ, by {found.distance:.3g} of "
            f"the first's length{most}"
        )
    else:
        yield "numbers: no tensor of the one has a place in the other"
    for whose, names in (("first", found.only_first), ("second", found.only_second)):
        if names:
            yield f"only in the {whose}, or in another shape: {_tensors(len(names))}, such as {names[0]}"


def _tensors(count: int) -> str:
    return f"{count} tensor{'s' * (count != 1)}"


def _said(value: object) -> str:
    return "none" if value is None else f"{value}"
