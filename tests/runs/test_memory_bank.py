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


def test_a_part_that_is_not_measured_is_said_to_be_so():
    assert set(memory_bank_page.sections({}).values()) == {"Not measured yet."}
