"""What the power benchmark reads of NVML, without a GPU: a library that says what a card would."""

from __future__ import annotations

import ctypes
import time

import pytest

from benchmarks.gpu.power import SAMPLE_SECONDS, Card, Clocks


class Nvml:
    """As far as it is asked; `refused` is what fails."""

    refused = ""

    def __getattr__(self, name: str) -> object:
        def function(*arguments: object) -> int:
            values = {"nvmlDeviceGetTotalEnergyConsumption": 1500, "nvmlDeviceGetEnforcedPowerLimit": 700_000}
            if name == "nvmlDeviceGetClockInfo":
                assert arguments[1] == 1  # of the multiprocessors; 0 is of graphics, 2 of the memory
            if name.startswith("nvmlDeviceGet"):
                arguments[-1]._obj.value = values.get(name, 1980)  # type: ignore[attr-defined]
            return 3 if name == self.refused else 0

        return function


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    library = Nvml()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    return library


def test_units(nvml: Nvml) -> None:
    card = Card()
    assert (card.joules(), card.limit_watts(), card.megahertz()) == (1.5, 700, 1980)


def test_what_is_refused_is_named(nvml: Nvml) -> None:
    nvml.refused = "nvmlInit_v2"
    with pytest.raises(RuntimeError, match="Init_v2 failed with status 3"):
        Card()


def test_clocks_are_sampled_until_the_end(nvml: Nvml) -> None:
    with Clocks(Card()) as clocks:
        time.sleep(5 * SAMPLE_SECONDS)
    count = len(clocks.samples)
    assert count >= 2
    assert set(clocks.samples) == {1980}
    time.sleep(2 * SAMPLE_SECONDS)
    assert len(clocks.samples) == count
