"""What keeps the package readable in one sitting: sizes, annotations, no swallowed errors, no print."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "qadapt"

MOST_FUNCTION_LINES = 60
MOST_FILE_LINES = 400
MOST_ARGUMENTS = 6
MOST_POSITIONAL = (
    3  # style asks for two; a callback or a triple such as (weight, state, dtype) may have three
)
NAMES_THAT_SAY_NOTHING = {"utils", "util", "common", "helpers", "types", "constants", "misc"}

EXCEPTIONS: dict[str, str] = {
    "stage.py::except": "whatever goes wrong in the working thread is handed over and raised in the caller",
    "engine/attention.py::attend_repeated": "transformers calls attention with these five by position",
    "engine/documents.py::attend_documents": "transformers calls attention with these five by position",
    "engine/prefix.py::attend_prefixed": "transformers calls attention with these five by position",
    "engine/prefix.py::attend_eagerly": "transformers calls attention with these five by position",
    "engine/linear.py::forward": "torch hands a function's arguments over by position",
    "exporting/export.py::export": "its arguments are the command's options, of which each can be left out",
    "engine/target.py::_attend": "it stands for torch's scaled_dot_product_attention and has its parameters",
}
"""`<file>`, `<file>::<function>`, `<file>::except`, `<file>::print` → why the rule makes this code worse."""

CATCH = "catch what you can name; cli/ catches the rest"
Function = ast.FunctionDef | ast.AsyncFunctionDef


def problems(folder: Path) -> list[str]:
    """Every broken rule in the Python files of a folder, each with its cure."""
    return [
        f"{place}: {problem}"
        for path in sorted(folder.rglob("*.py"))
        for place, problem in file_problems(path, path.relative_to(folder).as_posix())
        if place not in EXCEPTIONS
    ]


def file_problems(path: Path, name: str) -> Iterator[tuple[str, str]]:
    text = path.read_text(encoding="utf-8")
    lines = text.count("\n")
    if lines > MOST_FILE_LINES:
        yield name, f"{lines} lines, at most {MOST_FILE_LINES}: split it by what it is about"
    if path.stem in NAMES_THAT_SAY_NOTHING:
        yield name, "a name that says nothing collects everything: name it by what lives there"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, Function):
            for problem in function_problems(node):
                yield f"{name}::{node.name}", problem
        elif isinstance(node, ast.ExceptHandler) and is_broad(node) and not name.startswith("cli/"):
            yield f"{name}::except", f"line {node.lineno} is broad: {CATCH}"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield f"{name}::print", f"line {node.lineno}: yield an event, or take a console as an argument"


def is_broad(handler: ast.ExceptHandler) -> bool:
    """Whether a handler swallows what it cannot name; cleaning up and raising again is no swallowing."""
    if isinstance(handler.body[-1], ast.Raise) and handler.body[-1].exc is None:
        return False
    caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(kind is None or ast.unparse(kind) in ("Exception", "BaseException") for kind in caught)


def function_problems(node: Function) -> Iterator[str]:
    """Problems of one function; its length counts from `def` to the end, its docstring left out."""
    length = (node.end_lineno or node.lineno) - node.lineno + 1 - docstring_lines(node)
    if length > MOST_FUNCTION_LINES:
        yield f"{length} lines, at most {MOST_FUNCTION_LINES}: name its stages as functions"
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    unbound = [argument for argument in arguments if argument.arg not in ("self", "cls")]
    starred = [argument for argument in (node.args.vararg, node.args.kwarg) if argument is not None]
    bare = [argument.arg for argument in (*unbound, *starred) if argument.annotation is None]
    if bare:
        yield f"no annotation on {', '.join(bare)}"
    if node.returns is None:
        yield "no annotation on what it returns"
    is_called_by_others = node.name.startswith("__") or node.decorator_list or is_command(node)
    if is_called_by_others:  # the signature is the language's, a library's or the command line's
        return
    positional = [a for a in (*node.args.posonlyargs, *node.args.args) if a.arg not in ("self", "cls", "ctx")]
    if len(positional) > MOST_POSITIONAL and not node.name.startswith("_"):
        yield f"{len(positional)} positional arguments: make them keyword-only"
    if len(unbound) > MOST_ARGUMENTS:
        yield f"{len(unbound)} arguments, at most {MOST_ARGUMENTS}: a type is missing"


def is_command(node: Function) -> bool:
    """Whether the command line reads this signature: its arguments carry Typer's annotations."""
    annotations = [argument.annotation for argument in (*node.args.args, *node.args.kwonlyargs)]
    return any(
        "typer." in ast.unparse(each) or "Annotated" in ast.unparse(each) for each in annotations if each
    )


def docstring_lines(node: Function) -> int:
    first = node.body[0]
    is_text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    if not (is_text and isinstance(first.value.value, str)):  # type: ignore[attr-defined]
        return 0
    return (first.end_lineno or first.lineno) - first.lineno + 1


def test_every_file_and_function_keeps_the_rules() -> None:
    found = problems(PACKAGE)
    assert not found, "\n" + "\n".join(found)


def test_the_walk_saw_the_package() -> None:
    assert len(list(PACKAGE.rglob("*.py"))) >= 18


def test_exceptions_name_something_that_exists() -> None:
    for entry, reason in EXCEPTIONS.items():
        assert (PACKAGE / entry.partition("::")[0]).is_file(), f"{entry} is gone; take it off the list"
        assert len(reason) > 20, f"{entry}: say why"


def test_each_rule_can_fail(tmp_path: Path) -> None:
    (tmp_path / "long.py").write_text("x = 1\n" * (MOST_FILE_LINES + 1), encoding="utf-8")
    (tmp_path / "helpers.py").touch()
    body = "    x = 1\n" * MOST_FUNCTION_LINES
    (tmp_path / "functions.py").write_text(
        f'def long() -> None:\n    """Text.\n    """\n{body}'
        "def bare(a, *b, c: int) -> None: ...\n"
        "def silent(a: int): ...\n"
        "def many(*, a: int, b: int, c: int, d: int, e: int, f: int, g: int) -> None: ...\n"
        "def unclear(a: int, b: int, c: int, d: int) -> None: ...\n"
        "try:\n    print(1)\nexcept (OSError, Exception):\n    pass\n"
        "try:\n    x = 1\nexcept BaseException:\n    x = 2\n    raise\n"
        "def _fine(a: int, b: int, c: int, d: int) -> None: ...\n"
        "def fine(self, a: int, b: int, *, c: int = 1) -> None: ...\n",
        encoding="utf-8",
    )
    assert [problem.split(" (")[0] for problem in sorted(problems(tmp_path))] == [
        "functions.py::bare: no annotation on a, b",
        "functions.py::except: line 70 is broad: catch what you can name; cli/ catches the rest",
        "functions.py::long: 61 lines, at most 60: name its stages as functions",
        "functions.py::many: 7 arguments, at most 6: a type is missing",
        "functions.py::print: line 69: yield an event, or take a console as an argument",
        "functions.py::silent: no annotation on what it returns",
        "functions.py::unclear: 4 positional arguments: make them keyword-only",
        "helpers.py: a name that says nothing collects everything: name it by what lives there",
        "long.py: 401 lines, at most 400: split it by what it is about",
    ]
