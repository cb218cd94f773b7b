from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qadapt.errors import BadRecipe
from qadapt.recipe import Recipe
from qadapt.recipe_file import (
    apply_override,
    check_recipe,
    dump_yaml,
    field_paths,
    find_recipe,
    load_yaml,
    read_recipe,
)

LEAST: dict[str, Any] = {
    "model": "smollm2-135m",
    "data": {"sources": [{"path": "rows.jsonl"}]},
    "run": {"name": "trial"},
}


def checked(**sections: Any) -> Recipe:
    return check_recipe({**LEAST, **sections}, origin="test")


def problem_of(**sections: Any) -> str:
    with pytest.raises(BadRecipe) as caught:
        checked(**sections)
    return caught.value.problem


def test_the_least_recipe_has_everything_else_by_default() -> None:
    recipe = checked()
    assert recipe.model.source == "smollm2-135m"
    assert recipe.adapter.rank == 16
    assert recipe.train.learning_rate == 2e-4
    assert recipe.model.quantization == "nf4"


def test_an_unknown_key_is_refused_with_the_nearest_known_one() -> None:
    assert "train.lerning_rate: unknown key; did you mean `learning_rate`?" in problem_of(
        train={"lerning_rate": 1e-4}
    )


def test_a_key_in_the_wrong_section_is_shown_where_it_belongs() -> None:
    assert "train.rank: unknown key; did you mean `adapter.rank`?" in problem_of(train={"rank": 8})


def test_an_unknown_key_without_a_likeness_lists_the_known_ones() -> None:
    assert "run.zzzz: unknown key; known here: name, folder" in problem_of(run={"name": "x", "zzzz": 1})


def test_other_libraries_words_are_told_apart_from_typing_errors() -> None:
    problem = problem_of(adapter={"method": "houlsby", "reduction_factor": 16})
    assert "adapter.reduction_factor: unknown key; give `rank`, which is the model's width over" in problem
    problem = problem_of(adapter={"method": "houlsby", "layer_norm": True})
    assert "adapter.layer_norm: unknown key; give `nonlinearity` with it, such as layernorm-gelu" in problem


def test_betas_that_an_earlier_release_stored_apart_are_read() -> None:
    assert checked(train={"beta1": 0.8, "beta2": 0.95}).train.betas == (0.8, 0.95)
    assert checked(train={"beta2": 0.95}).train.betas == (0.9, 0.95)
    assert "train.beta1: unknown key" in problem_of(train={"beta1": 0.8, "betas": [0.9, 0.99]})
    assert "train.betas" in problem_of(train={"beta1": 1.0})


def test_an_unknown_section_is_refused() -> None:
    assert "trian: unknown key; did you mean `train`?" in problem_of(trian={})


def test_several_problems_are_reported_at_once() -> None:
    problem = problem_of(
        train={"steps": 0, "schedule": "cosin"}, adapter={"rank": "many"}, data={"sources": []}, run={}
    )
    assert problem.startswith("test has 5 problems:")
    for place in ("train.steps", "train.schedule", "adapter.rank", "data.sources", "run.name: missing"):
        assert f"\n  - {place}" in problem


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"memory": {"budget": "8 gigs"}}, "not an amount of memory"),
        ({"export": {"shard": "big"}}, "not an amount of memory"),
        ({"run": {"name": "../escape"}}, "run.name"),
        ({"run": {"name": ""}}, "run.name"),
        ({"train": {"patience": 2}}, "give train.evaluate_every too"),
        ({"train": {"evaluate_every": 5}}, "needs data.held_out or data.held_out_fraction"),
        (
            {"data": {**LEAST["data"], "held_out": "h.jsonl", "held_out_fraction": 0.1}},
            "both ask for held-out rows; keep one",
        ),
        ({"memory": {"micro_batch": 32}}, "larger than train.rows_per_step"),
        (
            {"memory": {"recompute": 0}},
            "give auto, all, none, or how many of the first layers, 1 or more (got 0)",
        ),
        (
            {"memory": {"offload": "embeddings"}},
            "or a list such as [embeddings, layers], of embeddings, head, bound",
        ),
        ({"memory": {"offload": ["layers", "layers"]}}, "memory.offload: name each part once"),
        ({"memory": {"recompute": -3}}, "1 or more (got -3)"),
        ({"memory": {"recompute": True}}, "1 or more (got True)"),
        ({"memory": {"recompute": "some"}}, "has 1 problem:\n  - memory.recompute: give auto"),
        ({"data": {**LEAST["data"], "length": 4}}, "data.length"),
        ({"adapter": {"targets": []}}, "adapter.targets"),
        ({"adapter": {"method": "fusion", "targets": ["one", ""]}}, "adapter.targets"),
        ({"data": {"sources": []}}, "has 1 problem:\n  - data.sources: give at least one"),
        (
            {"data": {**LEAST["data"], "learn": "user"}},
            "has 1 problem:\n  - data.learn: give answers, last, all",
        ),
        ({"data": {**LEAST["data"], "learn": ["bot"]}}, "or a list of roles (system, user, assistant, tool)"),
        (
            {"data": {**LEAST["data"], "packing": "yes"}},
            "has 1 problem:\n  - data.packing: give auto, true or",
        ),
        (
            {"data": {**LEAST["data"], "columns": {"promt": "x"}}},
            "data.columns.promt: unknown column; did you mean `prompt`?",
        ),
        (
            {"data": {**LEAST["data"], "columns": {"prompt:x": None}}},
            "has 1 problem:\n  - data.columns.prompt:x: unknown column; YAML needs a space after the colon: "
            "`prompt: x`",
        ),
        (
            {"data": {"sources": [{"path:a.jsonl": None}]}},
            "- data.sources.0.path:a.jsonl: unknown key; YAML needs a space after the colon",
        ),
        ({"train": {"learning_rate": 0}}, "train.learning_rate"),
        ({"model": {"source": ""}}, "model.source"),
    ],
)
def test_values_that_describe_no_run_are_refused(sections: dict[str, Any], said: str) -> None:
    assert said in problem_of(**sections)


@pytest.mark.parametrize(
    ("override", "place", "value"),
    [
        ("train.learning_rate=1e-4", ("train", "learning_rate"), 1e-4),
        ("train.steps=7", ("train", "steps"), 7),
        ("memory.recompute=7", ("memory", "recompute"), 7),
        ("adapter.targets=[q_proj, v_proj]", ("adapter", "targets"), ("q_proj", "v_proj")),
        ("model.source=some/folder", ("model", "source"), "some/folder"),
        ("model.double_quant=false", ("model", "double_quant"), False),
        ("model=other", ("model", "source"), "other"),
        ("train.clip_norm=null", ("train", "clip_norm"), None),
        ("memory.budget=7.3GiB", ("memory", "budget"), "7.3GiB"),
        ("run.folder=a=b", ("run", "folder"), "a=b"),
    ],
)
def test_an_override_sets_one_value(
    tmp_path: Path, override: str, place: tuple[str, str], value: Any
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: smollm2-135m\ndata: {sources: [{path: rows.jsonl}]}\nrun: {name: trial}\n", encoding="utf-8"
    )
    assert getattr(getattr(read_recipe(str(path), [override]), place[0]), place[1]) == value


@pytest.mark.parametrize("override", ["train.steps", "=3", " =3", "run.name.first=x", "train.steps=[1"])
def test_what_is_no_override_is_refused_with_an_example(override: str) -> None:
    with pytest.raises(BadRecipe) as caught:
        apply_override({"run": {"name": "x"}}, override)
    assert "train.learning_rate=1e-4" in caught.value.cure
    assert override in caught.value.problem


def test_yaml_is_read_as_1_2() -> None:
    assert load_yaml("a: no\nb: on\nc: 1e-3\nd: 010\ne: true\nf: 12:30:45") == {
        "a": "no",
        "b": "on",
        "c": 1e-3,
        "d": 10,
        "e": True,
        "f": "12:30:45",
    }


def test_a_recipe_that_is_no_yaml_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("model: x\n  train: [", encoding="utf-8")
    with pytest.raises(BadRecipe, match="line 2"):
        read_recipe(str(path))


@pytest.mark.parametrize("text", ["", "just words", "- a\n- list"])
def test_a_file_without_sections_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BadRecipe, match="holds no sections"):
        read_recipe(str(path))


def test_a_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes("model: caf\xe9\n".encode("latin-1"))
    with pytest.raises(BadRecipe, match=r"is no text in UTF-8: byte 10 is 0xe9\.") as caught:
        read_recipe(str(path))
    assert caught.value.cure == "Save it as UTF-8."


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_recipe_that_a_windows_shell_wrote_is_read(tmp_path: Path, encoding: str) -> None:
    path, shipped = tmp_path / "mine.yaml", find_recipe("quickstart-smollm2-135m")
    path.write_text(shipped.read_text(encoding="utf-8"), encoding=encoding)
    assert read_recipe(str(path)) == read_recipe("quickstart-smollm2-135m")


def test_an_unknown_recipe_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(BadRecipe) as caught:
        read_recipe("llama-3.1-8b-qlora-8g")
    assert "Did you mean `llama-3.1-8b-qlora-8gb`?" in caught.value.cure


def test_a_recipe_does_not_change_after_reading() -> None:
    with pytest.raises(ValueError, match="frozen"):
        checked().train.steps = 5  # type: ignore[misc]


def test_there_are_at_most_sixty_fields_and_each_says_what_it_is() -> None:
    assert 30 < len(field_paths()) <= 60

    def undescribed(model: Any) -> list[str]:
        missing = []
        for name, field in model.model_fields.items():
            inner = field.annotation if isinstance(field.annotation, type) else None
            if inner is not None and hasattr(inner, "model_fields"):
                missing += undescribed(inner)
            elif not field.description and name != "source":
                missing.append(name)
        return missing

    assert undescribed(Recipe) == []


NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,12}", fullmatch=True)
PATHS = st.text(min_size=1, max_size=30).filter(lambda text: text.isprintable())
RECIPES = st.fixed_dictionaries(
    {
        "model": st.fixed_dictionaries(
            {"source": PATHS},
            optional={"quantization": st.sampled_from(["nf4", "none"]), "double_quant": st.booleans()},
        ),
        "data": st.fixed_dictionaries(
            {
                "sources": st.lists(
                    st.fixed_dictionaries({"path": PATHS}, optional={"limit": st.integers(1, 10**9)}),
                    min_size=1,
                    max_size=3,
                )
            },
            optional={"length": st.integers(8, 10**6), "held_out": st.none() | PATHS},
        ),
        "run": st.fixed_dictionaries({"name": NAMES}, optional={"folder": st.text(max_size=20)}),
    },
    optional={
        "adapter": st.fixed_dictionaries(
            {},
            optional={
                "rank": st.integers(1, 512),
                "alpha": st.floats(1e-3, 1e3),
                "dropout": st.floats(0, 0.99),
                "targets": st.just("all-linear") | st.lists(NAMES, min_size=1, max_size=3),
            },
        ),
        "train": st.fixed_dictionaries(
            {},
            optional={
                "steps": st.none() | st.integers(1, 10**6),
                "learning_rate": st.floats(1e-9, 1.0),
                "clip_norm": st.none() | st.floats(1e-6, 1e6),
                "seed": st.integers(-(2**63), 2**63),
            },
        ),
    },
)


@given(RECIPES)
def test_a_written_recipe_is_read_back_the_same(values: dict[str, Any]) -> None:
    recipe = check_recipe(values, origin="drawn")
    assert check_recipe(load_yaml(dump_yaml(recipe)), origin="dumped") == recipe
