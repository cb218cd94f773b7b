"""The ladder of CONTRIBUTING.md: imports point down, to the defining module, and planning stays light."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "qadapt"

RUNGS = (
    {"errors", "units", "quiet", "collection"},
    {"recipe", "recipe_file", "shape", "architecture", "experts", "batch_shape", "cache", "durable", "events"}
    | {"methods", "control", "pause_rules", "stage", "run_folder", "hardware", "measured", "licences"}
    | {"stacking"},
    {"plan"},
    {"engine"},
    {"model", "adapters", "data"},
    {"train"},
    {"export", "view", "serve"},
    {"fusing", "selftest"},
    {"estimating"},
    {"running"},
    {"trained"},
    {"exporting"},
    {"run"},
    {"cli", "__init__"},
    {"__main__"},
)
LIGHT = RUNGS[0] | RUNGS[1] | RUNGS[2] | RUNGS[-2] | RUNGS[-1] | {"view"}
"""What starts in a blink: their top-level imports reach no heavy library, at any distance."""
HEAVY_LIBRARIES = {"torch", "transformers", "peft", "bitsandbytes", "pydantic", "datasets", "accelerate"}
SLOW_FILES = {"qadapt.recipe", "qadapt.recipe_file"}
"""They need pydantic, so light files import them inside functions only."""

EXCEPTIONS: dict[tuple[str, str], str] = {}
"""(importing module, imported module) → why the ladder does not hold for it."""


@dataclass(frozen=True)
class Import:
    """One `import` of `target` in `module`; `is_eager` if it runs when the module is imported."""

    module: str
    line: int
    target: str
    is_eager: bool

    @property
    def place(self) -> str:
        return f"{self.module}, line {self.line}, imports {self.target}"


def modules(package: Path) -> dict[str, Path]:
    """Dotted name → file; a package's `__init__` has the package's own name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def imports(module: str, path: Path) -> Iterator[Import]:
    """Every import of a file, those inside functions and for types included.

    `from qadapt import control` imports the module `qadapt.control`, not a name of the package.
    """
    package = next(parent for parent in path.parents if parent.name == "qadapt")

    def walk(node: ast.AST, is_eager: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(module, child.lineno, alias.name, is_eager)
            elif isinstance(child, ast.ImportFrom):
                origin = "." * child.level + (child.module or "")
                folder = package.parent.joinpath(*origin.split(".")) if not child.level else package
                for alias in child.names:
                    is_module = is_ours(origin) and (folder / f"{alias.name}.py").is_file()
                    target = f"{origin}.{alias.name}" if is_module else origin
                    yield Import(module, child.lineno, target, is_eager)
            is_lazy = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            is_for_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            yield from walk(child, is_eager and not is_lazy and not is_for_types)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), True)


def place_of(module: str) -> str:
    """The rung's entry a module belongs to: `qadapt.plan.fit` → `plan`, `qadapt` → `__init__`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def rung_of(module: str) -> int | None:
    return next((rung for rung, places in enumerate(RUNGS) if place_of(module) in places), None)


def is_ours(target: str) -> bool:
    return target == "qadapt" or target.startswith("qadapt.")


def ladder_problems(package: Path) -> list[str]:
    files = modules(package)
    problems: list[str] = [
        f"{module} stands on no rung; add it to CONTRIBUTING.md and to RUNGS here"
        for module in files
        if rung_of(module) is None
    ]
    packages = {module for module, path in files.items() if path.name == "__init__.py"}
    for found in (found for module, path in files.items() for found in imports(module, path)):
        if found.target.startswith("."):
            problems.append(f"{found.place}: write the full name of the module that defines it")
        elif is_ours(found.target) and (found.module, found.target) not in EXCEPTIONS:
            problems += _problem(found, files=files, packages=packages)
    return list(dict.fromkeys(problems))


def _problem(found: Import, *, files: dict[str, Path], packages: set[str]) -> list[str]:
    if found.target in packages:
        return [f"{found.place}, a package: import from the module that defines the name"]
    if found.target not in files:
        return [f"{found.place}, which is no file of the package: import from the module itself"]
    source, target = rung_of(found.module), rung_of(found.target)
    if source is None or target is None:
        return []
    is_same_package = place_of(found.module) == place_of(found.target)
    are_files = found.module.count(".") == found.target.count(".") == 1  # not folders of the same rung
    if target < source or (target == source and (is_same_package or are_files)):
        return []
    return [
        f"{found.place}: rung {source} may only import from rungs below it. Move the function to the rung of "
        "what it needs, hand the value in as an argument, or yield an event that the upper rung acts on"
    ]


def circles(package: Path) -> list[str]:
    files = modules(package)
    graph = {
        module: sorted({found.target for found in imports(module, path)} & set(files))
        for module, path in files.items()
    }
    done: set[str] = set()
    found: list[str] = []

    def visit(module: str, way: tuple[str, ...]) -> None:
        if module in way:
            found.append(" → ".join((*way[way.index(module) :], module)))
        elif module not in done:
            for target in graph[module]:
                visit(target, (*way, module))
            done.add(module)

    for module in graph:
        visit(module, ())
    return found


def weight_problems(package: Path) -> list[str]:
    files = modules(package)
    eager = {
        module: [found for found in imports(module, path) if found.is_eager] for module, path in files.items()
    }

    ways: dict[str, str | None] = {}

    def heavy_way(module: str) -> str | None:
        """How importing a module comes to a heavy library, or None."""
        if module not in ways:
            ways[module] = None  # while it is looked at: a circle leads nowhere else
            for found in eager.get(module, []):
                library = found.target.partition(".")[0]
                heavy = library if library in HEAVY_LIBRARIES else heavy_way(found.target)
                if heavy:
                    ways[module] = f"{module} → {heavy}"
                    break
        return ways[module]

    return [
        f"{found.place} at the top, which costs seconds ({heavy}): import it inside the function"
        for module in files
        if place_of(module) in LIGHT and module not in SLOW_FILES
        for found in eager[module]
        if (
            heavy := found.target
            if found.target.partition(".")[0] in HEAVY_LIBRARIES
            else heavy_way(found.target)
        )
    ]


def test_imports_point_down_the_ladder() -> None:
    assert not ladder_problems(PACKAGE), "\n" + "\n".join(ladder_problems(PACKAGE))


def test_no_imports_run_in_circles() -> None:
    assert not circles(PACKAGE), "\n" + "\n".join(circles(PACKAGE))


def test_planning_and_watching_import_no_heavy_library() -> None:
    assert not weight_problems(PACKAGE), "\n" + "\n".join(weight_problems(PACKAGE))


def test_view_and_train_do_not_know_each_other() -> None:
    for module, path in modules(PACKAGE).items():
        other = {"view": "train", "train": "view"}.get(place_of(module))
        targets = {place_of(found.target) for found in imports(module, path) if is_ours(found.target)}
        assert other not in targets, f"{module} imports from {other}/; let events pass between them"


def test_the_walk_saw_the_package() -> None:
    files = modules(PACKAGE)
    assert {"qadapt", "qadapt.errors", "qadapt.plan", "qadapt.plan.categories"} <= set(files)
    assert sum(1 for module, path in files.items() for _ in imports(module, path)) > 100


def write_package(folder: Path, sources: dict[str, str]) -> Path:
    package = folder / "qadapt"
    for name, source in sources.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(source, encoding="utf-8")
    (package / "__init__.py").touch()
    return package


def test_an_import_upwards_is_found_with_its_cure(tmp_path: Path) -> None:
    package = write_package(
        tmp_path,
        {"plan/fit.py": "def f():\n    from qadapt.train.step import step\n", "train/step.py": "step = 1\n"},
    )
    assert len(ladder_problems(package)) == 1
    assert "qadapt.plan.fit, line 2, imports qadapt.train.step: rung 2" in ladder_problems(package)[0]
    assert "Move the function" in ladder_problems(package)[0]


def test_packages_of_the_same_rung_do_not_import_each_other(tmp_path: Path) -> None:
    sources = {"model/load.py": "from qadapt.data.prompt import x\n", "data/prompt.py": "x = 1\n"}
    assert len(ladder_problems(write_package(tmp_path, sources))) == 1


def test_an_import_through_a_package_is_found(tmp_path: Path) -> None:
    sources = {
        "cli/main.py": "from qadapt.plan import Plan\n",
        "cli/plan.py": "from qadapt.plan import fit\n",  # a module, which is fine
        "plan/fit.py": "",
        "run.py": "from . import plan\n",
    }
    problems = ladder_problems(write_package(tmp_path, sources))
    assert len(problems) == 2
    assert any("a package: import from the module" in problem for problem in problems)


def test_a_module_on_no_rung_is_found(tmp_path: Path) -> None:
    assert "no rung" in ladder_problems(write_package(tmp_path, {"utils.py": ""}))[0]


def test_a_circle_is_found(tmp_path: Path) -> None:
    sources = {"plan/a.py": "from qadapt.plan.b import x\n", "plan/b.py": "from qadapt.plan.a import y\n"}
    assert circles(write_package(tmp_path, sources)) == ["qadapt.plan.a → qadapt.plan.b → qadapt.plan.a"]


def test_heavy_imports_are_found_where_they_run_and_allowed_where_they_do_not(tmp_path: Path) -> None:
    sources = {
        "plan/a.py": "import torch.nn\n",
        "view/b.py": "if True:\n    from qadapt.recipe import Recipe\n",
        "cli/c.py": "from qadapt.model.cache import x\n",
        "cli/d.py": "def f():\n    import torch\n",
        "cli/e.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n",
        "recipe.py": "import pydantic\n",
        "cli/f.py": "from qadapt.model.names import x\n",
        "model/cache.py": "from qadapt.model.load import x\n",
        "model/load.py": "import torch\nx = 1\n",
        "model/names.py": "x = 1\n",
    }
    problems = weight_problems(write_package(tmp_path, sources))
    assert [problem.split(",")[0] for problem in problems] == [
        "qadapt.cli.c",
        "qadapt.plan.a",
        "qadapt.view.b",
    ]
