"""qadapt fine-tunes 7B-class language models on the GPU you already own.

The functions are the commands: `estimate`, `plan`, `train`, `export`; `load` for a base with its adapter,
`load_together` for a base with several. `Store` is what `qadapt adapters` works on. They are imported when
first used: `import qadapt` costs nothing.

`qadapt.train` is the function although a subpackage has that name, too. `from qadapt.train import loop`
finds a module of it; `import qadapt.train.loop as loop` looks in the function and raises ImportError.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qadapt.adapters.store import Store as Store
    from qadapt.estimating.planning import estimate as estimate
    from qadapt.estimating.planning import plan as plan
    from qadapt.exporting.export import export as export
    from qadapt.run import load as load
    from qadapt.run import train as train
    from qadapt.trained.loading import load_together as load_together

__all__ = ["Store", "estimate", "export", "load", "load_together", "plan", "train"]

_HOMES = {
    "Store": "qadapt.adapters.store",
    "estimate": "qadapt.estimating.planning",
    "export": "qadapt.exporting.export",
    "load": "qadapt.run",
    "load_together": "qadapt.trained.loading",
    "plan": "qadapt.estimating.planning",
    "train": "qadapt.run",
}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        import_module("qadapt.quiet").quiet_libraries()
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Surface(ModuleType):
    """Keeps `qadapt.train` the function although a subpackage has that name, too.

    Importing `qadapt.train.step` binds the subpackage as an attribute of its parent; imports find it in
    `sys.modules` all the same. (Customizing a module by its class: Python data model, section 3.3.2.)
    """

    def __setattr__(self, name: str, value: object) -> None:
        if name not in _HOMES or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Surface
