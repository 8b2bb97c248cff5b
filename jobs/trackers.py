"""Where curves can be sent: MLflow over its REST API, Weights & Biases and Trackio through their own packages.

A tracker opens the run of a job, or finds it again, and is told points in the order of the log. That nothing stands there twice is seen to in
two ways: MLflow knows a number again by its name, step, moment and value; the other two say how many points they hold.
"""

from __future__ import annotations

import base64
import contextlib
import contextvars
import importlib
import importlib.util
import json
import math
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, ClassVar, Protocol
from urllib.parse import unquote, urlencode, urlsplit

from jobs.points import Point

MOST_METRICS, MOST_PARAMS = 1000, 100  # in one call of MLflow
MOST_LETTERS, MOST_TAG_LETTERS = 500, 5000  # of a parameter, as old servers of MLflow want it; of a tag
PATIENCE_SECONDS = 30.0  # with a server that has taken a call and says nothing
# Settings of Weights & Biases, where its version has them: what describes this machine instead of the run is not sent.
_QUIET = ("disable_git", "disable_code", "x_disable_stats", "x_disable_meta", "x_disable_machine_info")
_NOT_IN_A_KEY = re.compile(r"[^\w\-. :/]", re.ASCII)


class Away(Exception):
    """The tracker takes nothing at the moment, as a sentence. What it was to be told is told later."""


class Refused(Exception):
    """The tracker takes nothing of this run, as a sentence, and will not next time either."""


@dataclass(frozen=True, kw_only=True)
class About:
    """What a tracker is told of a job beside its curves."""

    job: str
    name: str
    address: str
    params: Mapping[str, str | int | float | bool]
    started: float
    folder: Path  # where a package may leave what it cannot send yet


@dataclass(frozen=True, kw_only=True)
class End:
    """How a job came to rest: succeeded, failed or cancelled, why, and when."""

    status: str
    reason: str
    message: str
    moment: float


class Run(Protocol):
    """One job at one tracker."""

    known: int | None  # how many points it held when it was opened; None: the tracker keeps no account

    def log(self, points: Sequence[Point], first: int) -> None:
        """Send points of the job, the first of them its point number `first`; they may have been sent before, and the answer lost."""

    def close(self) -> None:
        """Let go of the run; it may be opened again."""

    def end(self, end: End) -> None:
        """Say how the job ended. Everything has arrived when this returns."""


class Tracker(Protocol):
    """A place for runs, reached by one setting."""

    title: ClassVar[str]
    form: ClassVar[str]  # how it is written in BONSAI_FORWARD
    package: ClassVar[str]  # that must be installed, or nothing

    def __init__(self, where: str) -> None:
        """Raise ValueError with a sentence where `where` is no such place. Asks nobody."""

    def __str__(self) -> str:
        """The place in words, without a password."""

    def begin(self, about: About) -> Run:
        """Open the run of a job, or find it again; raises Away or Refused."""


class Mlflow:
    """An MLflow server (its REST API 2.0), and an experiment by name behind a #."""

    title: ClassVar[str] = "MLflow"
    form: ClassVar[str] = "mlflow:http://host:5000"
    package: ClassVar[str] = ""

    def __init__(self, where: str) -> None:
        parts = urlsplit(where)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("It names no address that begins with http:// or https://.")
        port = f":{parts.port}" if parts.port else ""  # raises ValueError itself where the port is no number
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        self.base = f"{parts.scheme}://{host}{port}{parts.path.rstrip('/')}"
        self.experiment = unquote(parts.fragment) or "Bonsai Studio"
        self._account = (unquote(parts.username), unquote(parts.password or "")) if parts.username else None

    def __str__(self) -> str:
        return f"MLflow at {self.base}, experiment “{self.experiment}”"

    def begin(self, about: About) -> MlflowRun:
        experiment = self._experiment_id()
        mine = {"experiment_ids": [experiment], "filter": f"tags.`bonsai.job` = '{about.job}'", "max_results": 1}
        found = self.call("runs/search", {**mine, "order_by": ["attributes.start_time ASC"]}).get("runs")
        if found:
            run = str(found[0]["info"]["run_id"])
        else:
            tags = {"bonsai.job": about.job, "bonsai.address": about.address, "mlflow.source.name": "Bonsai Studio"}
            wanted = {"experiment_id": experiment, "run_name": about.name, "start_time": _milliseconds(about.started)}
            run = str(self.call("runs/create", {**wanted, "tags": _pairs(tags)})["run"]["info"]["run_id"])
        params = {_key(name): str(value)[:MOST_LETTERS] for name, value in about.params.items()}
        with contextlib.suppress(Refused):  # of another version's words for the same recipe; the curves matter more
            for some in _pieces(_pairs(params), MOST_PARAMS):
                self.call("runs/log-batch", {"run_id": run, "params": some})
        return MlflowRun(self, run)

    def call(self, path: str, body: Mapping[str, Any] | None = None, **query: str) -> dict[str, Any]:
        """Ask the server; raises Away or Refused."""
        address = f"{self.base}/api/2.0/mlflow/{path}" + (f"?{urlencode(query)}" if query else "")
        data = None if body is None else json.dumps(body, allow_nan=False).encode()
        headers = {"Content-Type": "application/json", **self._login()}
        try:
            with urllib.request.urlopen(
                urllib.request.Request(address, data, headers), timeout=PATIENCE_SECONDS
            ) as answer:
                told = json.loads(answer.read() or b"{}")
        except urllib.error.HTTPError as error:
            raise self._refusal(error) from None
        except (OSError, HTTPException) as error:
            raise Away(f"It does not answer ({_first_line(getattr(error, 'reason', error))}).") from None
        except ValueError:
            raise Away("What answers there is no MLflow server.") from None
        return told if isinstance(told, dict) else {}

    def _experiment_id(self) -> str:
        try:
            found = self.call("experiments/get-by-name", experiment_name=self.experiment)["experiment"]
        except Refused:
            with contextlib.suppress(Refused):  # somebody may be quicker
                return str(self.call("experiments/create", {"name": self.experiment})["experiment_id"])
            try:
                found = self.call("experiments/get-by-name", experiment_name=self.experiment)["experiment"]
            except Refused as error:
                raise Away(str(error)) from None
        if found.get("lifecycle_stage") == "deleted":
            raise Away(f"The experiment “{self.experiment}” was deleted there. Restore it, or name another behind a #.")
        return str(found["experiment_id"])

    def _login(self) -> dict[str, str]:
        token = os.environ.get("MLFLOW_TRACKING_TOKEN")
        name, password = self._account or (
            os.environ.get("MLFLOW_TRACKING_USERNAME", ""),
            os.environ.get("MLFLOW_TRACKING_PASSWORD", ""),
        )
        if name:
            return {"Authorization": "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()}
        return {"Authorization": f"Bearer {token}"} if token else {}

    def _refusal(self, error: urllib.error.HTTPError) -> Exception:
        raw = error.read(100_000)
        try:
            body = json.loads(raw)
            code, words = str(body["error_code"]), _first_line(body.get("message", ""))
        except (ValueError, KeyError, TypeError):
            code, words = "", _first_line(raw.decode(errors="replace"))
        if error.code == 401:
            return Away("It wants a login: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD.")
        if code and 400 <= error.code < 500 and error.code not in (403, 408, 429):
            return Refused(f"It refuses ({code}): {words}")
        return Away(f"It answers with status {error.code}: {words}")


class MlflowRun:
    """A run at an MLflow server."""

    known: int | None = None

    def __init__(self, server: Mlflow, run: str) -> None:
        self._server, self._run = server, run

    def log(self, points: Sequence[Point], first: int) -> None:
        metrics = [
            {"key": _key(name), "value": _number(value), "timestamp": _milliseconds(point.moment), "step": point.step}
            for point in points
            for name, value in point.flat().items()
        ]
        for some in _pieces(metrics, MOST_METRICS):
            self._server.call("runs/log-batch", {"run_id": self._run, "metrics": some})

    def close(self) -> None:
        pass

    def end(self, end: End) -> None:
        status = {"succeeded": "FINISHED", "failed": "FAILED"}.get(end.status, "KILLED")
        tags = _pairs({"bonsai.reason": end.reason, "bonsai.message": end.message[:MOST_TAG_LETTERS]})
        self._server.call("runs/log-batch", {"run_id": self._run, "tags": tags})
        self._server.call("runs/update", {"run_id": self._run, "status": status, "end_time": _milliseconds(end.moment)})


class Wandb:
    """A project at Weights & Biases, with the id of the job as the id of the run."""

    title: ClassVar[str] = "Weights & Biases"
    form: ClassVar[str] = "wandb:project"
    package: ClassVar[str] = "wandb"

    def __init__(self, where: str) -> None:
        self.entity, _, self.project = where.rpartition("/")
        if not self.project:
            raise ValueError("It names no project.")

    def __str__(self) -> str:
        return f"Weights & Biases, project “{self.project}”"

    def begin(self, about: About) -> WandbRun:
        with _as_away():
            wandb = importlib.import_module("wandb")
            about.folder.mkdir(parents=True, exist_ok=True)
            run = wandb.init(
                project=self.project,
                entity=self.entity or None,
                id=about.job,
                name=about.name,
                notes=about.address,
                config={**about.params, "bonsai.job": about.job, "bonsai.address": about.address},
                resume="allow",
                reinit="create_new",
                dir=str(about.folder),
                settings=wandb.Settings(
                    console="off", silent=True, **{name: True for name in _QUIET if name in wandb.Settings.model_fields}
                ),
            )
            run.define_metric("train/global_step")
            run.define_metric("*", step_metric="train/global_step", step_sync=True)
            return WandbRun(run)


class WandbRun:
    """A run at Weights & Biases. Its own steps are the numbers of the points, so that it says itself how many it holds.

    Offline nobody can be asked: every time, a new folder gets the run from its beginning, and the newest one is whole.
    """

    def __init__(self, run: Any) -> None:
        self._run = run
        self.known: int | None = int(run.step)

    def log(self, points: Sequence[Point], first: int) -> None:
        with _as_away():
            for number, point in enumerate(points, first):
                row = {**point.in_folders(), "train/global_step": point.step}
                self._run.log(row, step=number, commit=True)

    def close(self) -> None:
        with _as_away():
            self._run.finish()

    def end(self, end: End) -> None:
        with _as_away():
            self._run.summary.update({"bonsai.status": end.status, "bonsai.reason": end.reason})
            self._run.summary.update({"bonsai.message": end.message})
            self._run.finish(exit_code=0 if end.status == "succeeded" else 1)


class Trackio:
    """A project of Trackio, on this machine or where its own settings (TRACKIO_SPACE_ID, TRACKIO_SERVER_URL) say."""

    title: ClassVar[str] = "Trackio"
    form: ClassVar[str] = "trackio:project"
    package: ClassVar[str] = "trackio"

    def __init__(self, where: str) -> None:
        self.project = where
        if not self.project:
            raise ValueError("It names no project.")

    def __str__(self) -> str:
        return f"Trackio, project “{self.project}”"

    def begin(self, about: About) -> TrackioRun:
        with _as_away():
            trackio = importlib.import_module("trackio")
            # A context of its own: otherwise the package ends the run that was begun before.
            run = contextvars.copy_context().run(
                trackio.init,
                project=self.project,
                name=f"{about.name} {about.job[:8]}",
                config={**about.params, "bonsai.job": about.job, "bonsai.address": about.address},
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
            return TrackioRun(run, self.project)


class TrackioRun:
    """A run of Trackio."""

    def __init__(self, run: Any, project: str) -> None:
        self._run, self._project = run, project
        self._storage = importlib.import_module("trackio.sqlite_storage").SQLiteStorage
        elsewhere = os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL")
        at_once = importlib.import_module("trackio.utils").get_storage_mode() == "sqlite"
        self.known: int | None = self._count() if at_once and not elsewhere else None
        self._told = self.known or 0

    def log(self, points: Sequence[Point], first: int) -> None:
        with _as_away():
            for point in points:
                self._run.log(point.in_folders(), step=point.step)
            self._told += len(points)

    def close(self) -> None:
        with _as_away():
            self._run.finish()

    def end(self, end: End) -> None:
        self.close()
        if self.known is not None and self._count() < self._told:  # the package only warns
            raise Away("It did not keep everything that it was told.")

    def _count(self) -> int:
        with _as_away():
            return int(self._storage.get_log_count(self._project, self._run.name, run_id=self._run.id))


TRACKERS: Mapping[str, type[Tracker]] = {"mlflow": Mlflow, "wandb": Wandb, "trackio": Trackio}


def missing(package: str) -> bool:
    """Whether a package is not installed; it is not imported. A folder that merely has its name is none."""
    try:
        found = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return True
    return found is None or found.origin is None


@contextlib.contextmanager
def _as_away() -> Iterator[None]:
    """Whatever a package raises is a tracker that takes nothing now."""
    try:
        yield
    except Exception as error:
        raise Away(f"{type(error).__name__}: {_first_line(error)}") from error


def _pieces(items: Sequence[Any], most: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + most] for start in range(0, len(items), most))


def _pairs(values: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"key": key, "value": value} for key, value in values.items()]


def _key(name: str) -> str:
    """A name as MLflow takes it."""
    return _NOT_IN_A_KEY.sub("_", name)[:250]


def _number(value: float) -> float | str:
    """A number as the JSON of protocol buffers has it."""
    return value if math.isfinite(value) else "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _milliseconds(moment: float) -> int:
    return round(1000 * moment)


def _first_line(words: object) -> str:
    return (str(words).strip().splitlines() or ["no reason given"])[0][:300]
