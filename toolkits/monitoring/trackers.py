"""Where a run's figures go beside metrics.jsonl: TensorBoard always, wandb or mlflow on request.

Both write files under OUT and nothing to the network, unless their own environment variables (WANDB_MODE,
MLFLOW_TRACKING_URI) say otherwise.
"""

import importlib
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from ..foundation.errors import MachineError


class Tracker(Protocol):
    """Takes the figures of a run."""

    name: str

    def scalars(self, step: int, figures: Mapping[str, float]) -> None:
        """Take figures of one step by name."""

    def close(self, *, succeeded: bool) -> None:
        """Write what is not written yet."""


class TensorBoard:
    """TensorBoard event files in `folder`."""

    name = "TensorBoard"

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), flush_secs=10)

    def scalars(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self, *, succeeded: bool) -> None:
        self._writer.close()


class Wandb:
    """A run of wandb in OUT/wandb, to be sent later with `wandb sync`; WANDB_MODE=online sends it at once."""

    name = "wandb"

    def __init__(self, output: Path, *, run: str, group: str, settings: Mapping[str, Any]) -> None:
        os.environ.setdefault("WANDB_MODE", "offline")
        wandb = _package("wandb")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "temper"),
            dir=str(output),
            name=run,
            group=group,  # the starts of one run
            config=dict(settings),
            settings=wandb.Settings(console="off", silent=True),
        )

    def scalars(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def close(self, *, succeeded: bool) -> None:
        self._run.finish(exit_code=0 if succeeded else 1)


class Mlflow:
    """A run of mlflow in the files of OUT/mlruns; MLFLOW_TRACKING_URI names another place."""

    name = "mlflow"

    def __init__(self, output: Path, *, run: str, group: str, settings: Mapping[str, Any]) -> None:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # mlflow 3 prefers a database and insists
        mlflow = _package("mlflow")
        self._metric = mlflow.entities.Metric
        place = os.environ.get("MLFLOW_TRACKING_URI") or (output.absolute() / "mlruns").as_uri()
        self._client = mlflow.MlflowClient(tracking_uri=place)
        wanted = os.environ.get("MLFLOW_EXPERIMENT_NAME", "temper")
        found = self._client.get_experiment_by_name(wanted)
        experiment = found.experiment_id if found else self._client.create_experiment(wanted)
        self._run = self._client.create_run(experiment, run_name=run, tags={"group": group}).info.run_id
        for name, value in settings.items():
            self._client.log_param(self._run, name, value)

    def scalars(self, step: int, figures: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(name, value, now, step) for name, value in figures.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def close(self, *, succeeded: bool) -> None:
        self._client.set_terminated(self._run, "FINISHED" if succeeded else "FAILED")


KINDS: dict[str, Callable[..., Tracker]] = {"wandb": Wandb, "mlflow": Mlflow}


def require_tracker(choice: str) -> None:
    """Raise MachineError when the package that --tracker `choice` needs is not here."""
    if choice in KINDS:
        _package(choice)


def open_trackers(choice: str, *, output: Path, run: str, group: str, settings: Mapping[str, Any]) -> list[Tracker]:
    """Return TensorBoard's tracker and that of `choice` (wandb, mlflow or none).

    `run` names this start and `group` all starts of its run; `settings` are kept with the figures.
    """
    trackers: list[Tracker] = [TensorBoard(output / "tensorboard" / run)]
    if choice in KINDS:
        try:
            trackers.append(KINDS[choice](output, run=run, group=group, settings=settings))
        except MachineError:
            raise
        except Exception as error:
            raise MachineError(
                f"--tracker {choice} cannot start: {error}; mend what its environment variables say, or leave it out"
            ) from error
    return trackers


def _package(name: str) -> ModuleType:
    # Both report home about themselves unless told not to, also when the run itself stays in files.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MachineError(
            f"--tracker {name} needs a package that is not here ({error}): pip install 'temper-mcore[{name}]'"
        ) from None
