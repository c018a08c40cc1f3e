"""The experiment on memory banks: its settings are allowed, its page says what its file says."""

import importlib

import pytest

from experiments.pages import memory_bank as memory_bank_page
from experiments.pages import page
from experiments.studies import grid, memory_bank
from jaxcl.contrastive.config import check_config


@pytest.mark.parametrize("config", ["memory_bank_emoji", "memory_bank_mnist"])
@pytest.mark.parametrize("part", memory_bank.SETTINGS)
def test_every_setting_is_allowed(part, config):
    config = importlib.import_module(f"configs.{config}").get_config()
    names = set()
    for devices, changes in memory_bank.SETTINGS[part](config):
        setting = memory_bank.setting(part, devices, changes)
        check_config(grid.changed(config, setting.fields), setting.devices)
        names.add(setting.place)
    assert len(names) == len(list(memory_bank.SETTINGS[part](config))), "two settings share a folder"


def test_banks_have_as_many_negatives_as_devices_that_gather():
    """An anchor's b - 1 and the bank's rows, against N b - 1."""
    config = importlib.import_module("configs.memory_bank_emoji").get_config()
    counts: dict[str, set[int]] = {}
    for _, changes in memory_bank.accuracy_settings(config):
        one = grid.changed(config, changes)
        counts.setdefault(one.negatives, set()).add(memory_bank.negatives_of(one.to_dict()))
    gathered = counts.pop("gathered") - {config.batch_size - 1}
    assert gathered == {63, 127, 255}
    assert all(gathered < counts[negatives] for negatives in ("fifo", "momentum", "full_bank"))


def test_the_page_is_that_of_the_result_file():
    text = memory_bank_page.PAGE.read_text()
    assert text == page.filled(text, memory_bank_page.sections(page.load("memory_bank")))


def test_a_difference_is_to_the_batch_alone_of_the_same_images():
    """Points, with the deviation of a difference; with crops to the first setting with crops."""

    def one(devices, *recall, **changes):
        counts = {"negatives": "fifo", "devices": devices, "negatives_of_an_anchor": 3, "steps": 4}
        return counts | {"recall": {memory_bank_page.SHOWN: recall}} | changes

    crop = {"data.augment": ["crop"]}
    settings = [one(1, 0.2, 0.4), one(2, 0.5, 0.5), one(3, 0.1, 0.1, **crop), one(4, 0.2, 0.4, **crop)]
    last = [line.split("|")[-2].strip() for line in memory_bank_page.short(settings).splitlines()[2:]]
    assert last == ["", "+20.0 ± 14.1", "", "+20.0 ± 14.1"]


def test_a_part_that_is_not_measured_is_said_to_be_so():
    assert set(memory_bank_page.sections({}).values()) == {"Not measured yet."}
