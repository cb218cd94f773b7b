"""Cards by any name people give them, what is assumed of them, and what this machine shows."""

from __future__ import annotations

from types import SimpleNamespace

import pynvml
import pytest

from qadapt.errors import BadRecipe
from qadapt.hardware import probe as probing
from qadapt.hardware.cards import Card, card_of_memory, cards, find_card
from qadapt.hardware.probe import Device, probe
from qadapt.hardware.target import find_target
from qadapt.units import GIB, MIB


def test_every_card_is_found_by_its_own_name() -> None:
    assert len(cards()) == 53
    assert [find_card(card.name) for card in cards()] == list(cards())


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("4060", "RTX 4060 8GB"),
        ("RTX 4060", "RTX 4060 8GB"),
        ("4060 8GB", "RTX 4060 8GB"),
        ("rtx4060ti 16gb", "RTX 4060 Ti 16GB"),
        ("4070 ti super", "RTX 4070 Ti SUPER 16GB"),
        ("NVIDIA GeForce RTX 4060 Laptop GPU", "RTX 4060 Laptop 8GB"),
        ("3080 mobile", "RTX 3080 Laptop 8GB"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090 24GB"),
        ("Tesla T4", "T4 16GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB SXM"),
        ("NVIDIA H100 80GB HBM3", "H100 80GB SXM"),
    ],
)
def test_a_card_is_found_however_it_is_called(name: str, meant: str) -> None:
    assert find_card(name).name == meant


def test_a_desktop_name_never_means_a_laptop_card() -> None:
    assert find_card("4070").name == "RTX 4070 12GB"
    assert find_card("4070 laptop").memory_bytes == 8188 * MIB


def test_an_unknown_card_is_answered_with_the_nearest_one() -> None:
    with pytest.raises(BadRecipe) as caught:
        find_card("RTX 4061")
    assert caught.value.problem == "There is no card 'RTX 4061' in the catalogue."
    assert caught.value.cure.startswith("Did you mean `RTX 4060 8GB`?")
    assert "--vram 7.3GiB" in caught.value.cure


@pytest.mark.parametrize("name", ["", "  ", "quux", "RTX", "4060 12GB"])
def test_what_is_no_card_is_refused(name: str) -> None:
    with pytest.raises(BadRecipe, match="There is no card"):
        find_card(name)


def test_a_name_of_two_cards_is_not_guessed() -> None:
    with pytest.raises(BadRecipe, match="may be several cards: RTX 4060 Ti 8GB, RTX 4060 Ti 16GB"):
        find_card("4060 ti")


def test_free_memory_shrinks_with_what_else_lies_on_the_card() -> None:
    card = find_card("RTX 4060")
    headless, linux, windows = (card.free_bytes(kind) for kind in ("headless", "linux", "windows"))
    assert card.memory_bytes > headless > linux > windows
    assert 7.2 * GIB < headless - 300 * MIB < 7.4 * GIB  # a context taken off: what others report
    assert 6.2 * GIB < windows - 300 * MIB < 6.6 * GIB


def test_speed_is_the_measured_one_then_the_vendors_then_unknown() -> None:
    assert find_card("RTX 4090").tflops == 165.7
    assert find_card("RTX 4070").tflops == 58.3
    assert find_card("RTX 4050 laptop").tflops is None
    assert not find_card("T4").has_bf16


def test_an_amount_of_memory_stands_for_a_card() -> None:
    target = find_target(vram="7.3GiB")
    assert target.free_bytes == round(7.3 * GIB)
    assert target.device == "cuda"
    assert card_of_memory("800 MiB").tflops is None
    with pytest.raises(BadRecipe, match="--vram: 'much' is not an amount of memory"):
        find_target(vram="much")


def test_a_card_and_an_amount_go_together() -> None:
    target = find_target("RTX 4060", "6GiB")
    assert (target.name, target.free_bytes) == ("RTX 4060 8GB", 6 * GIB)


class FakeDriver:
    """NVML with one card, a `free` that the test sets."""

    NVMLError = pynvml.NVMLError
    NVML_TEMPERATURE_GPU = 0

    def __init__(self, name: str, *, free: int) -> None:
        self.name, self.free = name, free

    def nvmlInit(self) -> None: ...
    def nvmlShutdown(self) -> None: ...
    def nvmlSystemGetDriverVersion(self) -> str:
        return "610.1"

    def nvmlDeviceGetCount(self) -> int:
        return 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetMemoryInfo(self, _: int) -> SimpleNamespace:
        return SimpleNamespace(total=8188 * MIB, free=self.free, used=8188 * MIB - self.free)

    def nvmlDeviceGetCudaComputeCapability(self, _: int) -> tuple[int, int]:
        return 8, 9

    def nvmlDeviceGetTemperature(self, _: int, __: int) -> int:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    def nvmlDeviceGetName(self, _: int) -> str:
        return self.name


def test_a_machine_with_a_card_is_a_target_with_what_is_free_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "pynvml", FakeDriver("NVIDIA GeForce RTX 4060", free=7 * GIB))
    device = probe().devices[0]
    assert (device.free_bytes, device.used_bytes) == (7 * GIB, 8188 * MIB - 7 * GIB)
    assert (device.card.tflops, device.card.has_bf16, device.temperature_celsius) == (31.2, True, None)
    assert find_target().free_bytes == 7 * GIB
    assert find_target(device="cpu").device == "cpu"


def test_an_unlisted_card_has_no_speed_rather_than_a_guess() -> None:
    device = Device(0, "NVIDIA Quadro X", 8 * GIB, 7 * GIB, 7.5, "610.1")
    assert device.card == Card("NVIDIA Quadro X", 8 * GIB, 7.5, has_bf16=False)
    assert device.card.tflops is None


def test_without_a_driver_there_are_no_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", no_driver)
    machine = probe()
    assert machine.devices == ()
    assert 0 < machine.host_available_bytes <= machine.host_total_bytes
    assert machine.disk_free_bytes > 0
    assert find_target().device == "cpu"
    with pytest.raises(BadRecipe, match="shows no NVIDIA GPU"):
        find_target(device="cuda")
