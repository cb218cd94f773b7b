"""Rows of a dataset of the hub, through `datasets`: fetched once, at one commit, memory-mapped, no code run.

The library fetches and converts into its own cache; what it says of a dataset that cannot be read becomes one
error with its cure. Without a network the state fetched last is used, unless another one is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from qadapt.cache import output_errors
from qadapt.data.reading.column_files import batch_rows
from qadapt.errors import BadData
from qadapt.quiet import quiet_libraries

if TYPE_CHECKING:
    from datasets import DatasetBuilder

_CONNECT = "Connect to the network (and unset HF_HUB_OFFLINE if it is set), or give a file."
_BATCH_ROWS = 1000


def hub_commit(name: str, revision: str | None = None) -> str | None:
    """The commit that a dataset's revision stands for now; None without a network.

    Args:
        name: `owner/name`.
        revision: Branch, tag or commit; None: the default branch.

    Raises:
        BadData: There is no such dataset or revision, or it is gated.
    """
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    with _named(name, revision=revision):
        try:
            return HfApi().dataset_info(name, revision=revision, timeout=20).sha
        except (httpx2.TransportError, OfflineModeIsEnabled):
            return None


def dataset_commit(name: str, *, subset: str | None) -> str:
    """The commit whose rows `read_hub` reads now: of the hub, or without a network the one fetched last.

    Args:
        name: `owner/name`, or `owner/name@revision`.
        subset: The subset (configuration); None: the only one, or the default.

    Raises:
        BadData: There is no such dataset, or it is neither in the cache nor in reach.
    """
    name, _, state = name.partition("@")
    revision = state or None
    commit = hub_commit(name, revision)
    if commit is not None:
        return commit
    with _named(name, revision=revision):
        return str(_cached_builder(name, subset=subset, revision=revision).hash)


def read_hub(name: str, *, split: str, subset: str | None) -> Iterator[tuple[str, object]]:
    """The rows of a split, each with its place, such as `owner/name (train), row 12`.

    Args:
        name: `owner/name`, or `owner/name@revision`.
        split: As `datasets` names it; a part such as `train[:10%]` too.
        subset: The subset (configuration); None: the only one, or the default.

    Raises:
        BadData: The dataset, its subset or its split does not exist, is gated, is not readable without code,
            or is neither in the cache nor in reach.
        BadOutput: The cache's disk is full or read-only.
    """
    import pyarrow

    name, _, state = name.partition("@")
    revision = state or None
    commit = hub_commit(name, revision)
    quiet_libraries()
    with _named(name, revision=revision):
        if commit is None:
            builder = _cached_builder(name, subset=subset, revision=revision)
        else:
            builder = _builder(name, subset=subset, commit=commit)
        _check_split(builder, name, split=split, commit=commit)
        _prepare(builder)
        dataset = builder.as_dataset(split=split).with_format("arrow")
        tables = dataset.iter(batch_size=_BATCH_ROWS)
        batches = (batch for table in tables for batch in table.to_batches())
        try:
            yield from batch_rows(batches, of=f"{name} ({split})")
        except pyarrow.ArrowException as error:
            _refuse(name, error)


def _builder(name: str, *, subset: str | None, commit: str) -> DatasetBuilder:
    from datasets import get_dataset_config_names, load_dataset_builder

    # the prefix keeps a folder of that name here from being read instead
    address = f"hf://datasets/{name}"
    try:
        return load_dataset_builder(address, subset, revision=commit)
    except ValueError as error:
        names = get_dataset_config_names(address, revision=commit)
        if subset is None and len(names) > 1:
            problem = f"{name} has several subsets: {', '.join(names)}."
        elif subset is not None and subset not in names:
            problem = f"{name} has no subset {subset!r}; it has {', '.join(names)}."
        else:
            _refuse(name, error)
        raise BadData(problem, cure=f"Set the source's subset, such as subset: {names[0]}.") from None


def _cached_builder(name: str, *, subset: str | None, revision: str | None) -> DatasetBuilder:
    """What was fetched last; asked the usual way, the library would try to reach the hub for a minute."""
    from datasets.packaged_modules.cache.cache import Cache

    given: dict[str, str] = {} if subset is None else {"config_name": subset}
    try:
        builder: DatasetBuilder = Cache(
            repo_id=name, dataset_name=name.split("/")[-1], version="auto", hash="auto", **given
        )
    except ValueError:
        which = name if subset is None else f"{name}, subset {subset},"
        raise BadData(
            f"The dataset {which} is not on this disk and the hub is out of reach.", cure=_CONNECT
        ) from None
    if revision is not None and builder.hash != revision:
        raise BadData(
            f"The hub is out of reach, and on this disk {name} is in another state than {revision!r}.",
            cure=_CONNECT,
        )
    return builder


def _prepare(builder: DatasetBuilder) -> None:
    """Fetches and converts what is not in the cache yet.

    Raises:
        BadOutput: The cache's disk is full or read-only.
    """
    from datasets import config
    from datasets.exceptions import DatasetGenerationError

    with output_errors(Path(config.HF_DATASETS_CACHE)):
        try:
            builder.download_and_prepare()
        except DatasetGenerationError as error:
            if isinstance(error.__cause__, OSError):
                raise error.__cause__ from None
            raise


def _check_split(builder: DatasetBuilder, name: str, *, split: str, commit: str | None) -> None:
    """Looks for the split before all of them are fetched."""
    from datasets import get_dataset_split_names

    known = builder.info.splits
    if known:
        names = list(known)
    elif commit is not None:
        names = get_dataset_split_names(f"hf://datasets/{name}", builder.config.name, revision=commit)
    else:
        return
    asked = [re.split(r"[\[(]", part.strip())[0] for part in split.split("+")]
    missing = [part for part in asked if part not in (*names, "all")]
    if missing:
        raise BadData(
            f"{name} has no split {missing[0]!r}; it has {', '.join(names)}.",
            cure=f"Set the source's split, such as split: {names[0]}.",
        )


@contextmanager
def _named(name: str, *, revision: str | None) -> Iterator[None]:
    """Says what the answers of the hub and of the library mean. Tokens and headers never become text."""
    import httpx2
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError:
        raise _gated(name) from None
    except RevisionNotFoundError:
        raise BadData(
            f"{name} has no revision {revision!r}.", cure="See which there are on its page."
        ) from None
    except RepositoryNotFoundError:
        raise _missing(name) from None
    except HFValidationError as error:
        raise BadData(
            f"{name!r} is no name of a dataset: {error}", cure="Write it as hub:owner/name."
        ) from None
    except HfHubHTTPError as error:
        raise BadData(
            f"The hub answered {name} with status {error.response.status_code}.",
            cure="If that is 401 or 403, log in anew with `hf auth login`; else try again later.",
        ) from None
    except DatasetNotFoundError as error:
        raise (_gated(name) if "gated" in f"{error}" else _missing(name)) from None
    except (ConnectionError, httpx2.TransportError):
        raise BadData(
            f"The dataset {name} is not on this disk and the hub is out of reach.", cure=_CONNECT
        ) from None
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        _refuse(name, error)


def _gated(name: str) -> BadData:
    return BadData(
        f"The dataset {name} is gated, and no account that may read it is logged in on this machine.",
        cure=f"Accept its conditions on the page of datasets/{name}, then log in with `hf auth login`.",
    )


def _missing(name: str) -> BadData:
    return BadData(
        f"There is no dataset {name} on the hub, or it is private and not for this account.",
        cure="Check the spelling; for a private one log in with `hf auth login`.",
    )


def _refuse(name: str, error: Exception) -> NoReturn:
    reason = error.__cause__ or error
    raise BadData(
        f"The dataset {name} cannot be read: {_line(reason)}",
        cure="Choose a revision with Parquet, JSON lines or CSV files (repository code is never run), or "
        "download a file of it and give its path.",
    ) from None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
