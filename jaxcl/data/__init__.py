"""Data: sources of labelled images, their split into tasks, batches of rows, and augmentation on the device."""

from jaxcl.data.augment import make_augment, make_normalize
from jaxcl.data.loader import Batch, Loader, blank_batches, eval_batches, train_batches
from jaxcl.data.scenarios import SCENARIOS, Scenario, Task, class_incremental, hold_out, make_scenario
from jaxcl.data.sources import Source, array_source, open_source

__all__ = [
    "SCENARIOS",
    "Batch",
    "Loader",
    "Scenario",
    "Source",
    "Task",
    "array_source",
    "blank_batches",
    "class_incremental",
    "eval_batches",
    "hold_out",
    "make_augment",
    "make_normalize",
    "make_scenario",
    "open_source",
    "train_batches",
]
