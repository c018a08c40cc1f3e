"""The pictures of a report, in their order: what draws each of them, its title, its caption."""

import importlib
from collections.abc import Callable
from typing import Any

# Name -> (file of jaxcl/report that draws it by a function of this name, title, caption). The function takes groups of runs and
# gives a figure; None where the runs do not tell what is to be drawn.
PICTURES = {
    "average_accuracy": (
        "pictures",
        "Average {measure.name}",
        "Mean {measure.name} over the tasks seen so far, after each task. Bands: one standard deviation over seeds.",
    ),
    "accuracy_by_task": (
        "pictures",
        "{measure.name} on each task",
        "Each line is one task, from the moment it was trained. A line that {measure.forgets} is forgetting.",
    ),
    "accuracy_matrix": (
        "pictures",
        "{measure.name} matrix",
        "Mean over seeds, accuracies in percent. Above the stair: tasks not trained yet.",
    ),
    "loss": (
        "curves",
        "Training loss",
        "As logged, one line a seed; of more than 300 points the means of neighbours. Dotted: a task begins.",
    ),
    "per_class_accuracy": (
        "classes",
        "Accuracy on each class",
        "After the last task, mean over seeds, the classes in the order in which they came. Dotted: a task begins.",
    ),
    "confusion": (
        "classes",
        "Confusion",
        "After the last task: of the test rows of a class, the share that is taken for each class; mean over seeds.",
    ),
    "time_by_phase": (
        "pictures",
        "Time by phase",
        "Seconds, mean over seeds. Hatched: the thread of the buffer in host memory, working while the loop goes on.",
    ),
    "time_of_steps": ("pictures", "Time of the steps", "The same without what comes once or between tasks."),
}


def drawer(name: str) -> Callable[..., Any]:
    """What draws the picture of this name, imported now: Matplotlib takes a second, and a run does without."""
    return getattr(importlib.import_module(f"jaxcl.report.{PICTURES[name][0]}"), name)
