"""MLflow in a database of the run's folder: `mlflow ui --backend-store-uri sqlite:///DIR/mlflow/mlflow.db`.

Needs the packages mlflow-skinny, sqlalchemy and alembic, or mlflow, which has all of them.
"""

import logging
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

from jaxcl.runs.writers.base import Setting, Writer

EXPERIMENT = "jaxcl"
LONGEST = 6000  # characters of a parameter's value
MOST = 100  # parameters in one call


def mlflow(folder: pathlib.Path, settings: Mapping[str, Setting], step: int | None) -> Writer:
    """A continued run goes on in its own record; a scalar that is written again stands beside the first, with its own time."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # nothing leaves the machine
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    from mlflow.entities import Param
    from mlflow.tracking import MlflowClient

    place = (folder / "mlflow").resolve()
    place.mkdir(exist_ok=True)
    client = MlflowClient(tracking_uri=f"sqlite:///{place / 'mlflow.db'}")
    found = client.get_experiment_by_name(EXPERIMENT)
    where = found.experiment_id if found else client.create_experiment(EXPERIMENT, (place / "artifacts").as_uri())
    before = client.search_runs([where], max_results=1) if step is not None else []  # the newest first
    if before:
        client.update_run(before[0].info.run_id, status="RUNNING")
        return _Record(client, before[0].info.run_id)
    record = client.create_run(where, run_name=str(settings.get("name", "run"))).info.run_id
    params = [Param(name, str(value)[:LONGEST]) for name, value in settings.items()]
    for first in range(0, len(params), MOST):
        client.log_batch(record, params=params[first : first + MOST])
    return _Record(client, record)


class _Record:
    def __init__(self, client: Any, run: str) -> None:
        self._client, self._run = client, run

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self._client.log_batch(self._run, metrics=[Metric(name, x, now, step) for name, x in scalars.items()])

    def close(self) -> None:
        self._client.set_terminated(self._run)
