"""Reads a recipe: YAML 1.2, `section.key=value` overrides, every problem reported at once with its cure.

A recipe is given as a path, or as the name of one that ships with qadapt (`qadapt recipes` lists them).
"""

from __future__ import annotations

import codecs
import difflib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from qadapt.errors import BadRecipe
from qadapt.recipe import Column, Recipe

_OTHER_WORDS = {
    "reduction_factor": "`rank`, which is the model's width over that factor",
    "layer_norm": "`nonlinearity` with it, such as layernorm-gelu",
    "ln_before": "`nonlinearity` with it, such as layernorm-gelu",
}
"""What others call something of an adapter → its name here."""


def recipe_folder() -> Path:
    """The folder of shipped recipes: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """Name → file of every recipe that ships with qadapt, sorted by name; `adapters/` has one per method."""
    root = recipe_folder()
    files = [*sorted(root.glob("*.yaml")), *sorted(root.glob("adapters/*.yaml"))]
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in files}


def find_recipe(name: str) -> Path:
    """The file of a recipe given as a path or as a shipped name.

    Raises:
        BadRecipe: There is neither such a file nor such a recipe.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    close = difflib.get_close_matches(path.stem, shipped, n=1, cutoff=0.4)
    hint = f"Did you mean `{close[0]}`? " if close else ""
    raise BadRecipe(
        f"There is no recipe file {name!r}, and no recipe of that name ships with qadapt.",
        cure=f"{hint}`qadapt recipes` lists the shipped ones.",
    )


def read_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads, overrides and checks a recipe.

    Args:
        name: Path of a YAML file, or the name of a shipped recipe.
        overrides: `section.key=value` texts; the value is read as YAML.

    Raises:
        BadRecipe: The file cannot be read, or something in it is wrong; the message lists every problem.
    """
    path = find_recipe(name)
    try:
        values = load_yaml(_text_of(path.read_bytes()))
    except UnicodeDecodeError as error:
        raise BadRecipe(
            f"{path} is no text in UTF-8: byte {error.start} is {error.object[error.start]:#04x}.",
            cure="Save it as UTF-8.",
        ) from None
    except (OSError, YAMLError) as error:
        reason = " ".join(str(error).split())
        raise BadRecipe(
            f"{path} cannot be read as YAML: {reason}", cure="Correct the line it names."
        ) from None
    if not isinstance(values, dict):
        raise BadRecipe(f"{path} holds no sections.", cure="Start from a shipped recipe: `qadapt recipes`.")
    for override in overrides:
        apply_override(values, override)
    return check_recipe(values, origin=str(path))


def _text_of(raw: bytes) -> str:
    """UTF-8; or UTF-16 with its mark, as `>` writes in PowerShell 5."""
    is_wide = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return raw.decode("utf-16" if is_wide else "utf-8-sig")


def load_yaml(text: str) -> Any:
    """Plain Python values of a YAML 1.2 text (`no` is a word, not a truth value)."""
    return YAML(typ="safe", pure=True).load(text)


def dump_yaml(recipe: Recipe) -> str:
    """The recipe as YAML, every field written out: what a run stores."""
    stream = io.StringIO()
    writer = YAML(typ="safe", pure=True)
    writer.default_flow_style = False
    writer.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    writer.dump(recipe.model_dump(mode="json"), stream)
    return stream.getvalue()


def apply_override(values: dict[str, Any], override: str) -> None:
    """Sets one `section.key=value` in the unchecked values of a recipe.

    Raises:
        BadRecipe: The text is no override, or its value is not YAML.
    """
    key, equals, text = override.partition("=")
    cure = "Write it as section.key=value, for example train.learning_rate=1e-4."
    if not equals or not key.strip():
        raise BadRecipe(f"{override!r} is not an override.", cure=cure)
    try:
        value = load_yaml(text)
    except YAMLError:
        raise BadRecipe(f"The value of {override!r} cannot be read.", cure=cure) from None
    *sections, name = key.strip().split(".")
    place: dict[str, Any] = values
    for section in sections:
        inner: Any = place.setdefault(section, {})
        if section == "model" and isinstance(inner, str):
            inner = place[section] = {"source": inner}
        if not isinstance(inner, dict):
            raise BadRecipe(f"{override!r}: {section} is a single value, not a section.", cure=cure)
        place = inner
    place[name] = value


def check_recipe(values: dict[str, Any], *, origin: str) -> Recipe:
    """The checked recipe.

    Raises:
        BadRecipe: Something is wrong; the message lists every problem with its place.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        errors = error.errors()
        problems = [_problem(details) for details in errors if not _is_echo(details, errors)]
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    listed = "\n".join(f"  - {problem}" for problem in problems)
    raise BadRecipe(
        f"{origin} has {count}:\n{listed}", cure="Correct the recipe, or override with section.key=value."
    )


def _is_echo(details: ErrorDetails, errors: Sequence[ErrorDetails]) -> bool:
    """Whether a problem is only what another one, which is said already, leads to."""
    place = details["loc"]
    if details["type"] == "missing":
        return any(
            other["type"] == "extra_forbidden" and str(other["loc"][-1]).startswith(f"{place[-1]}:")
            for other in errors
        )
    return details["type"] in ("too_short", "string_type") and any(
        len(other["loc"]) > len(place) and other["loc"][: len(place)] == place for other in errors
    )


def _problem(details: ErrorDetails) -> str:
    place = ".".join(str(part) for part in details["loc"] if part not in ("all-linear", "tuple[str, ...]"))
    if details["loc"] and details["loc"][-1] == "[key]":
        name = str(details["loc"][-2])
        known = [str(each) for each in get_args(Column)]
        return f"{place.removesuffix('.[key]')}: unknown column{_closest(name, known)}"
    if details["type"] == "extra_forbidden":
        return f"{place}: unknown key{_did_you_mean(details['loc'])}"
    if details["type"] == "too_short":
        return f"{place}: give at least one"
    if details["type"] == "missing":
        return f"{place}: missing"
    message = details["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if not place:
        return message
    return f"{place}: {message} (got {details['input']!r})"


def _did_you_mean(place: tuple[int | str, ...]) -> str:
    if place[0] == "adapter" and (meant := _OTHER_WORDS.get(str(place[-1]))):
        return f"; give {meant}"
    elsewhere = [path for path in field_paths() if path.rpartition(".")[2] == place[-1]]
    return _closest(str(place[-1]), list(_fields_at(place[:-1])), elsewhere=elsewhere)


def _closest(name: str, known: Sequence[str], *, elsewhere: Sequence[str] = ()) -> str:
    """What may be meant by a name that is not known."""
    start, colon, rest = name.partition(":")
    if colon and start in known:
        return f"; YAML needs a space after the colon: `{start}: {rest}`"
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5) or elsewhere[:1]
    return f"; did you mean `{close[0]}`?" if close else f"; known here: {', '.join(known)}"


def _fields_at(place: tuple[int | str, ...]) -> list[str]:
    prefix = "".join(f"{part}." for part in place if not isinstance(part, int))
    return [
        path[len(prefix) :].partition(".")[0]
        for path in field_paths(sections=True)
        if path.startswith(prefix)
    ]


def field_paths(*, sections: bool = False) -> list[str]:
    """Every field of a recipe as `section.key`, in order; with `sections`, the sections themselves too."""
    paths: list[str] = []

    def walk(model: type[BaseModel], prefix: str) -> None:
        for name, field in model.model_fields.items():
            inner = _section_of(field.annotation)
            if inner is None or sections:
                paths.append(f"{prefix}{name}")
            if inner is not None:
                walk(inner, f"{prefix}{name}.")

    walk(Recipe, "")
    return paths


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        if isinstance(argument, type) and issubclass(argument, BaseModel):
            return argument
    return None
