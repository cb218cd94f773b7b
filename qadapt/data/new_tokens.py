"""Those of a recipe's new tokens (`data.new_tokens`) that no row has: they would be exported untrained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qadapt.data.tokens import Tokens


def absent_ids(rows: Iterable[Tokens], ids: Sequence[int]) -> tuple[int, ...]:
    """Those of the ids, one after the other, that no row has; reads rows only until all are found."""
    missing = set(ids)
    for row in rows if missing else ():
        new = row.ids[row.ids >= min(ids)]
        if len(new):
            missing.difference_update(new.tolist())
            if not missing:
                break
    return tuple(sorted(missing))
