"""What the package uses of other libraries that is not promised: all of it, and what we rely on.

A name with a leading underscore, or one documented as subject to change. Each has a contract test.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as StockLinear
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

PACKAGE = Path(__file__).parent.parent / "qadapt"
USED = {
    "_register_custom_module": {"adapters/fused.py"},
    "_attn_implementation": {"engine/documents.py"},
}
"""Name → the one file that may use it."""


def test_each_is_used_in_one_place() -> None:
    for name, places in USED.items():
        found = {
            path.relative_to(PACKAGE).as_posix()
            for path in PACKAGE.rglob("*.py")
            if f".{name}" in path.read_text(encoding="utf-8")
        }
        assert found == places, name


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(8, 8)
        self.config: dict[str, object] = {}


class OwnLinear(StockLinear):  # type: ignore[misc]
    """What a registration names."""


def test_peft_puts_a_registered_class_on_layers_and_never_writes_of_it(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["projection"])
    config._register_custom_module({nn.Linear: OwnLinear})
    model = get_peft_model(Block(), config)
    assert type(model.base_model.model.projection) is OwnLinear
    model.save_pretrained(str(tmp_path))
    assert "custom" not in json.dumps(json.loads((tmp_path / "adapter_config.json").read_text()))
    again = PeftModel.from_pretrained(Block(), str(tmp_path))
    assert type(again.base_model.model.projection) is StockLinear


def test_transformers_keeps_the_name_of_the_attention_that_was_chosen() -> None:
    config = AutoConfig.for_model("llama", hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        assert model.config._attn_implementation == name
