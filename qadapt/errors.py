"""What can go wrong because of input, files or the machine: one tree, each error with its cure.

```
QadaptError            caught once, in cli/: two lines on the screen, exit code 2, no traceback
├── BadRecipe          the recipe (or a command's option) does not describe a run
├── BadModel           the base cannot be found, read or trusted
│   └── HubRefused     the hub said no: gated, missing, or out of reach
├── BadData            a source, a row or a template cannot be trained on
├── BadRun             a run folder is missing, taken, damaged or already finished
├── BadAdapter         an adapter is missing in the store, damaged, or cannot be trusted
├── BadOutput          the place to write to is read-only, full or taken
│   └── NoRoom         it is full: a run waits, and goes on when there is room
├── BadExport          the exported numbers would not be the trained ones
├── Diverged           the loss or a gradient is no number any more
├── DoesNotFit         the smallest setting allowed needs more memory than there is
└── Unsupported        known, and not done here: says what is
    └── NoClosedForm   a decoder that only the exact dry run can estimate
```

Errors that are qadapt's own fault are not in this tree: they are `assert`s and ordinary exceptions.
"""

from __future__ import annotations


class QadaptError(Exception):
    """An error a user can cure.

    Args:
        problem: One sentence with the name, the value and the rule that it breaks.
        cure: What to do about it, as an instruction.
    """

    def __init__(self, problem: str, *, cure: str) -> None:
        super().__init__(problem, cure)
        self.problem = problem
        self.cure = cure

    def __str__(self) -> str:
        return f"{self.problem}\n{self.cure}"


class BadRecipe(QadaptError):
    """The recipe, or an option of a command, does not describe a run."""


class BadModel(QadaptError):
    """The base model cannot be found, read or trusted."""


class HubRefused(BadModel):
    """The hub answered no: gated, missing, or out of reach."""


class BadData(QadaptError):
    """A source, a row or a template cannot be trained on."""


class BadRun(QadaptError):
    """A run folder is missing, taken, damaged or already finished."""


class BadAdapter(QadaptError):
    """An adapter is missing in the store, damaged, or cannot be trusted."""


class BadOutput(QadaptError):
    """The place to write to is read-only, full or taken."""


class NoRoom(BadOutput):
    """The disk is full, or a file may not grow: nothing is wrong that room would not cure."""


class BadExport(QadaptError):
    """The exported numbers would not be the trained ones."""


class Diverged(QadaptError):
    """The loss or a gradient is no number any more."""


class DoesNotFit(QadaptError):
    """The smallest setting that is allowed needs more memory than there is."""


class Unsupported(QadaptError):
    """Known, and not done here."""


class NoClosedForm(Unsupported):
    """A decoder-only text model whose closed form has not been shown to agree with the exact dry run."""
