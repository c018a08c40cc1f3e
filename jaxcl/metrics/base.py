"""What a metric is given."""

import dataclasses

import jax

from jaxcl.errors import UserError


@dataclasses.dataclass(frozen=True)
class EvalRows:
    """Test rows of a device, b of them; those that are padding hold anything and do not count.

    Attributes:
      outputs: of the model by name, `[b, ...]`.
      label: int32 `[b]`.
      task: int32 `[b]`, the task that each row tests.
      task_classes: bool `[b, K]`, the classes of that task.
      target: float32 `[b, ...]` by name, what is to be reconstructed; {} where rows are classified.
      ranking: float32 `[b, K]`, by which the strategy ranks the classes; None where rows are reconstructed.
    """

    outputs: dict[str, jax.Array]
    label: jax.Array
    task: jax.Array
    task_classes: jax.Array
    target: dict[str, jax.Array]
    ranking: jax.Array | None

    @property
    def scores(self) -> jax.Array:
        """`ranking`, for metrics of classification.

        Raises:
          UserError: rows are reconstructed.
        """
        if self.ranking is None:
            raise UserError("eval.metrics: a metric of classification is not allowed where images are reconstructed")
        return self.ranking
