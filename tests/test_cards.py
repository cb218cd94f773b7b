"""Cards by any name people give them, what is assumed of them, and what this machine shows."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest

from qadapt.errors import BadRecipe
from qadapt.hardware import cards as cataloguing
from qadapt.hardware.cards import CONTEXT_BYTES, Card, card_of_memory, cards, find_card, this_platform
from qadapt.hardware.probe import Device, probe, visible
from qadapt.hardware.target import find_target
from qadapt.units import GIB, MIB


def test_every_card_is_found_by_its_own_name() -> None:
    assert len(cards()) == 54
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
        ("3080 mobile 16gb", "RTX 3080 Laptop 16GB"),
        ("NVIDIA GeForce RTX 5070 Ti Laptop GPU", "RTX 5070 Ti Laptop 12GB"),
        ("NVIDIA GeForce RTX 4070 SUPER", "RTX 4070 SUPER 12GB"),
        ("NVIDIA RTX A6000", "RTX A6000 48GB"),
        ("NVIDIA A10G", "A10G 24GB"),
        ("l40s", "L40S 48GB"),
        ("NVIDIA H100 PCIe", "H100 80GB PCIe"),
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
    with pytest.raises(BadRecipe, match="may be several cards: RTX 3080 Laptop 8GB, RTX 3080 Laptop 16GB"):
        find_card("3080 laptop")


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

    def __init__(self, name: str, *, free: int, count: int = 1) -> None:
        self.name, self.free, self.count = name, free, count

    def nvmlInit(self) -> None: ...
    def nvmlShutdown(self) -> None: ...
    def nvmlSystemGetDriverVersion(self) -> str:
        return "610.1"

    def nvmlDeviceGetCount(self) -> int:
        return self.count

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

    def nvmlDeviceGetUUID(self, index: int) -> str:
        return f"GPU-8932f93{index}-d72c"


def test_a_machine_with_a_card_is_a_target_with_what_is_free_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeDriver("NVIDIA GeForce RTX 4060", free=7 * GIB))
    device = probe().devices[0]
    assert (device.free_bytes, device.used_bytes) == (7 * GIB, 8188 * MIB - 7 * GIB)
    assert (device.card.tflops, device.card.has_bf16, device.temperature_celsius) == (31.2, True, None)
    target = find_target()
    assert (target.free_bytes, target.is_here) == (7 * GIB, True)
    assert target.assumption == "free now; 1020.0 MiB are the driver's, the desktop's and other programs'"
    assert find_target(device="cpu").device == "cpu"
    assert not find_target("RTX 4060").is_here


DEVICES = tuple(
    Device(
        index, "NVIDIA GeForce RTX 4060", 8188 * MIB, 7 * GIB, 8.9, "610.1", uuid=f"GPU-8932f93{index}-d72c"
    )
    for index in range(3)
)


@pytest.mark.parametrize(
    ("wanted", "shown"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("1", [1]),
        ("2, 0", [2, 0]),
        ("-1", []),
        ("0,-1,1", [0]),
        ("7", []),
        ("1,1", []),
        ("GPU-8932f932", [2]),
        ("GPU-8932f931-d72c,GPU-8932f930-d72c", [1, 0]),
        ("GPU-8932", []),
        ("NoDevFiles", []),
        ("MIG-8932f932", []),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(wanted: str | None, shown: list[int]) -> None:
    assert [device.index for device in visible(DEVICES, wanted)] == shown


def test_the_first_visible_card_is_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeDriver("NVIDIA GeForce RTX 4060", free=7 * GIB, count=2))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    machine = probe()
    assert ([device.index for device in machine.devices], machine.hidden) == ([1], 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert find_target().device == "cpu"
    with pytest.raises(BadRecipe, match="CUDA_VISIBLE_DEVICES hides 2"):
        find_target(device="cuda")


@pytest.mark.parametrize(
    ("system", "release", "meant"),
    [
        ("win32", "11", "windows"),
        ("linux", "6.8.0-45-generic", "linux"),
        ("linux", "5.15.153.1-microsoft-standard-WSL2", "wsl"),
    ],
)
def test_wsl_is_told_from_linux_by_its_kernel(
    monkeypatch: pytest.MonkeyPatch, system: str, release: str, meant: str
) -> None:
    monkeypatch.setattr(cataloguing.sys, "platform", system)
    monkeypatch.setattr(cataloguing.platform, "release", lambda: release)
    assert this_platform() == meant


def test_wsl_has_windows_totals_and_spills_like_it() -> None:
    card = find_card("RTX 4060")
    assert card.free_bytes("wsl") == card.free_bytes("windows") < card.free_bytes("linux")
    assert [find_target("RTX 4060", platform=each).may_spill for each in ("linux", "windows", "wsl")] == [
        False, True, True,
    ]  # fmt: skip


def test_a_context_is_the_published_one_where_there_is_one() -> None:
    assert find_card("T4").context_bytes == 141 * MIB
    assert find_card("RTX 4060").context_bytes == CONTEXT_BYTES
    for form in ("SXM", "PCIe"):
        assert find_card(f"H100 80GB {form}").context_range_bytes == (616 * MIB, 992 * MIB)
    for card in cards():
        low, high = card.context_range_bytes
        assert 0 < low <= card.context_bytes <= high
    device = Device(0, "Tesla T4", 15360 * MIB, 15000 * MIB, 7.5, "610.1")
    assert device.card.context_bytes == find_card("T4").context_bytes
    listed = json.loads((Path(cataloguing.__file__).parent / "cards.json").read_text(encoding="utf-8"))
    assert all("context_source" in each for each in listed if "context_mib" in each)


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
