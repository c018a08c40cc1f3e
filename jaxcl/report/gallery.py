"""The pictures of a report, in their order: what draws each of them, its title, its caption."""

from collections.abc import Callable, Sequence

from matplotlib.figure import Figure

from jaxcl.report.classes import confusion, per_class_accuracy
from jaxcl.report.curves import loss
from jaxcl.report.pictures import accuracy_by_task, accuracy_matrix, average_accuracy, time_by_phase, time_of_steps
from jaxcl.report.runs import Group

# None where the runs do not tell what is to be drawn.
PICTURES: dict[str, tuple[Callable[[Sequence[Group]], Figure | None], str, str]] = {
    "average_accuracy": (
        average_accuracy,
        "Average {measure.name}",
        "Mean {measure.name} over the tasks seen so far, after each task. Bands: one standard deviation over seeds.",
    ),
    "accuracy_by_task": (
        accuracy_by_task,
        "{measure.name} on each task",
        "Each line is one task, from the moment it was trained. A line that {measure.forgets} is forgetting.",
    ),
    "accuracy_matrix": (
        accuracy_matrix,
        "{measure.name} matrix",
        "Mean over seeds, accuracies in percent. Above the stair: tasks not trained yet.",
    ),
    "loss": (
        loss,
        "Training loss",
        "As logged, one line a seed; of more than 300 points the means of neighbours. Dotted: a task begins.",
    ),
    "per_class_accuracy": (
        per_class_accuracy,
        "Accuracy on each class",
        "After the last task, mean over seeds, the classes in the order in which they came. Dotted: a task begins.",
    ),
    "confusion": (
        confusion,
        "Confusion",
        "After the last task: of the test rows of a class, the share that is taken for each class; mean over seeds.",
    ),
    "time_by_phase": (
        time_by_phase,
        "Time by phase",
        "Seconds, mean over seeds. Hatched: the thread of the buffer in host memory, working while the loop goes on.",
    ),
    "time_of_steps": (time_of_steps, "Time of the steps", "The same without what comes once or between tasks."),
}
