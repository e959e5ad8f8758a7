"""What raypipe asks of MLflow; the only file that imports it. Every call may be repeated with the same outcome.

One run is one MLflow run, found again by its tag `fed.run_key`. A version is one step of metrics; few versions
become LoggedModels, since the pages that list those fetch all of their metrics. What MLflow itself does not make
safe to repeat is looked up first: creating runs and models is not idempotent, and `log_outputs` answers a repeat
with an error of a unique constraint. Metrics are, when their timestamp is the same.

A dead server must be noticed in seconds and tried again by the caller, so the client's own retries (minutes) are
off. The fluent API is not used: it asks for the whole run at each call, which grows with the versions.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from getpass import getuser
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias, TypeVar

import numpy as np

for _key, _value in {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_UV_AUTO_DETECT": "false",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}.items():  # read when mlflow is imported
    os.environ.setdefault(_key, _value)

from mlflow import MlflowClient, set_registry_uri, set_tracking_uri  # noqa: E402
from mlflow.artifacts import download_artifacts  # noqa: E402
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus, Metric, Param, RunTag  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.models import Model, ModelSignature  # noqa: E402
from mlflow.types import Schema, TensorSpec  # noqa: E402
from sqlalchemy.exc import SQLAlchemyError  # noqa: E402

TROUBLE = (MlflowException, SQLAlchemyError, OSError)  # what an unreachable or failing server raises
METRICS_A_BATCH, PARAMS_A_BATCH = 1000, 100  # MLflow's limits
PARAM_LENGTH, TAG_LENGTH = 6000, 8000
CHARTS = "mlflow.loggedArtifacts"  # the tag by which the web page knows a JSON file for a table
STATUS = {"finished": "FINISHED", "killed": "KILLED", "failed": "FAILED"}
Shape: TypeAlias = tuple[int, ...]
T = TypeVar("T")

logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
logging.getLogger("alembic").setLevel(logging.WARNING)


@dataclass(frozen=True, slots=True)
class Point:
    """One value of one metric; `at` in seconds, and the same at each repetition."""

    name: str
    value: float
    at: float
    step: int


@dataclass(frozen=True, slots=True)
class RunPlace:
    """Where a run is in MLflow."""

    experiment_id: str
    run_id: str


@dataclass(frozen=True, slots=True)
class Kept:
    """What a LoggedModel holds; `files`: name -> a file to copy, or text."""

    name: str
    step: int  # the version
    params: Mapping[str, str]
    files: Mapping[str, Path | str]


def points(metrics: Mapping[str, float], at: float, step: int) -> list[Point]:
    """All metrics of one moment."""
    return [Point(name, value, at, step) for name, value in metrics.items()]


def tracking_home(home: Path | None = None) -> Path:
    """The folder of the embedded tracking store: the argument, RAYPIPE_HOME, or ~/.raypipe."""
    return (home or Path(os.environ.get("RAYPIPE_HOME") or Path.home() / ".raypipe")).expanduser().absolute()


class Sink:
    """A client of one tracking server or of the embedded store (an SQLite file and a folder in `home`)."""

    def __init__(self, uri: str | None = None, home: Path | None = None) -> None:
        """`uri`: None for MLFLOW_TRACKING_URI, or the embedded store where that is not set."""
        self.home = tracking_home(home)
        self.uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self.home}/mlflow.db"
        self.remote = self.uri.startswith(("http://", "https://"))
        if not self.remote:
            self.home.mkdir(parents=True, exist_ok=True)

    @cached_property
    def client(self) -> MlflowClient:
        """Connects when it is first asked for; an SQLite file is made by then."""
        if self.uri.startswith("sqlite:///"):
            _make_tables(Path(self.uri.removeprefix("sqlite:///").partition("?")[0]))
        return MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)

    def where(self, run: RunPlace | None = None) -> str:
        """The run's page on a server, or the embedded store's address; without user and password."""
        shown = hide_login(self.uri).rstrip("/")
        if not self.remote or run is None:
            return shown
        return f"{shown}/#/experiments/{run.experiment_id}/runs/{run.run_id}?workflowType=machine_learning"

    def experiment(self, name: str) -> str:
        """The experiment's id; made or restored when it is missing."""
        found = self.client.get_experiment_by_name(name)
        if found is None:
            place = None if self.remote else (self.home / "mlartifacts").as_uri()
            tags = {"mlflow.experimentKind": "custom_model_development"}
            return str(self.client.create_experiment(name, artifact_location=place, tags=tags))
        if found.lifecycle_stage == "deleted":
            self.client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)

    def find_run(self, experiment_id: str, tags: Mapping[str, str]) -> RunPlace | None:
        """The oldest run that has all these tags."""
        query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        found = self.client.search_runs([experiment_id], query, max_results=1, order_by=["attributes.start_time"])
        return RunPlace(experiment_id, str(found[0].info.run_id)) if found else None

    def run(self, experiment_id: str, name: str, at: float, tags: Mapping[str, str]) -> RunPlace:
        """The run with these tags, made where it is missing."""
        found = self.find_run(experiment_id, tags)
        if found:
            return found
        shown = {"mlflow.source.name": "raypipe", "mlflow.user": _user()} | dict(tags)
        made = self.client.create_run(experiment_id, start_time=_ms(at), tags=shown, run_name=name)
        return RunPlace(experiment_id, str(made.info.run_id))

    def params(self, run_id: str, params: Mapping[str, str], changed: str = "") -> None:
        """Log what is new. MLflow never changes a parameter: another value goes under `changed`/name."""
        there = self.client.get_run(run_id).data.params
        cut = {key: value[:PARAM_LENGTH] for key, value in params.items()}
        wanted = {
            f"{changed}/{key}" if key in there and there[key] != value else key: value for key, value in cut.items()
        }
        fresh = [Param(key, value) for key, value in wanted.items() if there.get(key) != value]
        for some in _chunks(fresh, PARAMS_A_BATCH):
            self.client.log_batch(run_id, params=some)

    def tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        self.client.log_batch(run_id, tags=[RunTag(key, value[:TAG_LENGTH]) for key, value in tags.items()])

    def metrics(self, run_id: str, values: Sequence[Point], model_id: str | None = None) -> None:
        """As few requests as the limit allows."""
        for some in _chunks(values, METRICS_A_BATCH):
            batch = [Metric(p.name, p.value, _ms(p.at), p.step, model_id=model_id) for p in some]
            self.client.log_batch(run_id, metrics=batch)

    def table(self, run_id: str, file: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Write or overwrite a table. `MlflowClient.log_table` appends, so that a repeat would double the rows."""
        self.client.log_text(run_id, json.dumps({"columns": list(columns), "data": [list(r) for r in rows]}), file)
        shown = json.loads(self.client.get_run(run_id).data.tags.get(CHARTS, "[]"))
        if (entry := {"path": file, "type": "table"}) not in shown:
            self.client.set_tag(run_id, CHARTS, json.dumps([*shown, entry]))

    def end(self, run_id: str, status: str, at: float) -> None:
        self.client.set_terminated(run_id, STATUS[status], end_time=_ms(at))

    def resume(self, run_id: str) -> None:
        self.client.update_run(run_id, status="RUNNING")

    def find_model(self, run: RunPlace, name: str) -> LoggedModel | None:
        """The oldest LoggedModel of this name from this run."""
        query = f"name = '{model_name(name)}' AND source_run_id = '{run.run_id}'"
        oldest = [{"field_name": "creation_timestamp", "ascending": True}]
        found = self.client.search_logged_models([run.experiment_id], query, max_results=1, order_by=oldest)
        return found[0] if found else None

    def model(self, run: RunPlace, kept: Kept) -> str:
        """A LoggedModel that holds the files; the id of the one that is there when it is whole."""
        model = self._model(run, kept)
        if model.status != LoggedModelStatus.READY:
            with TemporaryDirectory() as folder:
                self._complete(model.model_id, run, kept, Path(folder))
        return str(model.model_id)

    def torch_model(self, run: RunPlace, kept: Kept, module: Any, shapes: tuple[Mapping[str, Shape], Shape]) -> str:
        """A LoggedModel that `mlflow.pytorch.load_model` returns as the module itself; `shapes` of input and output.

        Serialised by pickle on purpose: the default (pt2) comes back as a GraphModule whose eval() and train() raise,
        so that it cannot be fine-tuned. Whoever must not unpickle takes the weights file from the same folder.
        Requirements and signature are given, since inferring them takes seconds.
        """
        import mlflow.pytorch
        import torch
        import torchvision

        model = self._model(run, kept)
        if model.status == LoggedModelStatus.READY:
            return str(model.model_id)
        own, place = str(model.model_id), str(model.artifact_location)
        kind = np.dtype("float32")
        named = len(shapes[0]) > 1  # one needs no name
        inputs = Schema([TensorSpec(kind, shape, name if named else None) for name, shape in shapes[0].items()])
        outputs = Schema([TensorSpec(kind, shapes[1])])
        logging.getLogger("mlflow.pytorch").setLevel(logging.ERROR)  # it warns of pickle
        with TemporaryDirectory() as folder:
            mlflow.pytorch.save_model(
                module,
                f"{folder}/model",
                mlflow_model=Model(model_uuid=own, run_id=run.run_id, model_id=own, artifact_path=place),
                serialization_format="pickle",
                signature=ModelSignature(inputs, outputs),
                pip_requirements=[f"{p.__name__}=={p.__version__.partition('+')[0]}" for p in (torch, torchvision)],
            )
            self._complete(own, run, kept, Path(folder) / "model")
        return own

    def register(self, name: str, model_id: str, run_id: str, description: str) -> str:
        """The number of this run's registered version, made of its LoggedModel where it is missing."""
        if not self.client.search_registered_models(f"name = '{name}'", max_results=1):
            self.client.create_registered_model(name)
        for found in self.client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'"):
            return str(found.version)
        source = f"models:/{model_id}"
        if not self.remote:  # MLflow would look that up in the process's default store
            source = self.client.get_logged_model(model_id).artifact_location
        made = self.client.create_model_version(name, source, run_id=run_id, model_id=model_id, description=description)
        if not self.remote:  # as a server does: the link on the model's page
            link = [{"name": name, "version": str(made.version)}]
            self.client.set_logged_model_tags(model_id, {"mlflow.modelVersions": json.dumps(link)})
        return str(made.version)

    def alias(self, name: str, alias: str) -> str | None:
        """The number of the registered version that an alias points to."""
        try:
            return str(self.client.get_model_version_by_alias(name, alias).version)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise

    def set_alias(self, name: str, alias: str, number: str) -> None:
        self.client.set_registered_model_alias(name, alias, number)

    def download(self, model_uri: str, folder: Path) -> Path:
        """The files of `models:/NAME@alias` or `models:/NAME/3` in a folder."""
        set_tracking_uri(self.uri)  # it looks the name up in the process's own store, whatever it is told
        set_registry_uri(self.uri)
        return Path(download_artifacts(model_uri, dst_path=str(folder)))

    def load_torch(self, folder: Path) -> Any:
        """The module of a downloaded model that was promoted or logged by mlflow.pytorch."""
        import mlflow.pytorch

        return mlflow.pytorch.load_model(str(folder))

    def _model(self, run: RunPlace, kept: Kept) -> LoggedModel:
        found = self.find_model(run, kept.name)
        return found or self.client.create_logged_model(
            run.experiment_id,
            name=model_name(kept.name),
            source_run_id=run.run_id,
            params=dict(kept.params),
            model_type="raypipe",
        )

    def _complete(self, model_id: str, run: RunPlace, kept: Kept, folder: Path) -> None:
        """Ready only when all of it is there, so that a model found ready needs nothing more."""
        for name, content in kept.files.items():
            if isinstance(content, Path):
                (folder / name).symlink_to(content.absolute())
            else:
                (folder / name).write_text(content)
        self.client.log_model_artifacts(model_id, str(folder))
        try:
            self.client.log_outputs(run.run_id, [LoggedModelOutput(model_id, kept.step)])
        except MlflowException as error:
            if not re.search("unique constraint|duplicate", str(error), re.IGNORECASE):
                raise
        self.client.finalize_logged_model(model_id, LoggedModelStatus.READY)


def model_name(name: str) -> str:
    """A LoggedModel's name may not hold a dot; a run's may."""
    return re.sub(r"[/:.%\"']", "-", name)


def hide_login(text: str) -> str:
    """The text without the user and password of any address in it."""
    return re.sub(r"//[^/@\s]*@", "//", text)


def one_line(error: Exception) -> str:
    """What went wrong, for people: the kind and the first line, without logins."""
    lines = str(error).splitlines() or [""]
    return hide_login(f"{type(error).__name__}: {lines[0]}")[:300]


def _make_tables(file: Path) -> None:
    """An SQLite store, once and whole.

    MLflow makes one in many steps. Where several processes do so at once all but one of them fail, or all.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with (file.parent / f".{file.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if file.exists():
            return
        part = file.with_name(f"{file.name}.part")
        part.unlink(missing_ok=True)
        uri = f"sqlite:///{part}"
        MlflowClient(tracking_uri=uri, registry_uri=uri).search_experiments(max_results=1)
        part.rename(file)


def _user() -> str:
    try:
        return getuser()
    except (OSError, KeyError):  # a container's user without a name
        return str(os.getuid())


def _ms(at: float) -> int:
    return round(at * 1000)


def _chunks(values: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (values[i : i + size] for i in range(0, len(values), size))
