"""What runs of adapters beside the weights are asked alike."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_dryrun import config, counted
from test_estimate import shape_of
from torch import Tensor

from qadapt.adapters.store import Store
from qadapt.errors import Unsupported
from qadapt.exporting.export import export
from qadapt.plan.estimate import estimate_step
from qadapt.plan.setting import Setting
from qadapt.recipe import Recipe
from qadapt.run import load, train
from qadapt.serve.partner import find_partner
from qadapt.train.dryrun import dry_run
from qadapt.trained.keeping import add
from qadapt.trained.loading import load_partner

IDS = torch.arange(3, 40)[None]
ELSEWHERE = """
import sys, torch
from safetensors.torch import save_file
from qadapt.run import load
torch.set_num_threads(1)
found = {}
for kind in sys.argv[3:]:
    tuned = load("first", folder=f"{sys.argv[1]}/{kind}/runs")
    with torch.no_grad():
        found[kind] = tuned.model(input_ids=torch.arange(3, 40)[None]).logits.contiguous()
save_file(found, sys.argv[2])
"""


def logits_of(runs: Path) -> Tensor:
    """What the first of some runs computes of `IDS`."""
    with torch.no_grad():
        found: Tensor = load("first", folder=str(runs)).model(input_ids=IDS).logits
    return found


def logits_elsewhere(place: Path, kinds: Sequence[str]) -> dict[str, Tensor]:
    """The same in another process, for the runs of each kind in a place."""
    file = place / "logits.safetensors"
    subprocess.run([sys.executable, "-c", ELSEWHERE, str(place), str(file), *kinds], check=True)
    return load_file(file)


def kept_and_exported(recipe: Recipe, place: Path, *, title: str, said: str) -> tuple[Path, Path]:
    """Trains; the adapter as it is exported, and as a store has it, which compute the same as the run.

    Args:
        recipe: What is trained.
        place: For the store.
        title: What the method is called where merging is refused.
        said: What the export's README says of it.
    """
    list(train(recipe))
    for form in ("merged-fp16", "gguf-lora"):
        with pytest.raises(Unsupported, match=rf"{title}, .*no {form} of it.\n.*--form adapter"):
            list(export("first", form=form, folder=recipe.run.folder))
    list(export("first", form="adapter", folder=recipe.run.folder))
    exported = Path(recipe.run.folder) / "first" / "export" / "adapter"
    assert f"by {said}; this is the adapter alone" in (exported / "README.md").read_text("utf-8")
    store = Store(place / "store")
    kept = add("first", store, name="front", folder=recipe.run.folder).version
    assert kept.record.method == recipe.adapter.method
    expected = logits_of(Path(recipe.run.folder))
    folders = exported, store.folder_of(kept.id)
    for folder in folders:
        with torch.no_grad():
            found = load_partner(find_partner(str(folder))).model(input_ids=IDS).logits
        assert torch.equal(found, expected)
    return folders


def assert_real_step(family: str, setting: Setting, folder: Path, *, alphas: Sequence[float] = (16,)) -> None:
    """The dry run and the estimate are the step of a model to the byte, as far as they say so."""
    dry = dry_run(config(family), setting)
    for alpha in alphas:
        ledger = counted(folder, setting, alpha=alpha)
        assert dry.peak == ledger.peak
        assert dry.phase_bytes == dict(ledger.phase_bytes)
    categories = estimate_step(shape_of(family), setting).categories
    for category in ("base_weights", "quantization_constants", "unquantized", "adapters", "optimizer"):
        assert dry.static[category] == categories[category], category
