"""Data: sources of labelled images, their split into tasks, batches of rows, and augmentation on the device."""

from jaxcl.data.augment import AUGMENTATIONS, make_augment, make_normalize, scaled_shape
from jaxcl.data.given import given_name, given_sources
from jaxcl.data.loader import Loader, blank_batches, eval_batches, train_batches
from jaxcl.data.scenarios import SCENARIOS, Scenario, Split, Task, class_incremental, make_scenario
from jaxcl.data.source import Source, array_source, hold_out
from jaxcl.data.sources import SOURCES, open_source
from jaxcl.types import Batch

__all__ = [
    "AUGMENTATIONS",
    "SCENARIOS",
    "SOURCES",
    "Batch",
    "Loader",
    "Scenario",
    "Source",
    "Split",
    "Task",
    "array_source",
    "blank_batches",
    "class_incremental",
    "eval_batches",
    "given_name",
    "given_sources",
    "hold_out",
    "make_augment",
    "make_normalize",
    "make_scenario",
    "open_source",
    "scaled_shape",
    "train_batches",
]
