"""Curves sent on to trackers: nothing is lost, nothing is there twice, and trainings know nothing of it."""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings
from django.contrib.auth.models import User
from django.core.management import CommandError, call_command
from django.utils import timezone

from engine.core.events import LOG_NAME, EventLog
from jobs import checks, forwarding, parts
from jobs.ingest import Ingester
from jobs.models import Job, Status
from jobs.places import home, job_folder
from jobs.trackers import Away, Refused, missing
from tests.jobs.conftest import MakeJob
from tests.jobs.logs import metric_row
from tests.jobs.mlflow_server import Server, Store
from tests.jobs.tracker_packages import write_packages

WriteLog = Callable[..., EventLog]
NUM_NUMBERS = 9  # of a metric row, without its step


@pytest.fixture
def person(db: None) -> User:
    return User.objects.create_user("ada")  # nobody logs in here, and a password takes its time


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def server(store: Store) -> Iterator[Server]:
    server = Server(store)
    yield server
    server.close()


@pytest.fixture(autouse=True)
def nobody_named(monkeypatch: pytest.MonkeyPatch, bonsai_home: Path) -> None:
    monkeypatch.setattr(settings, "BONSAI_FORWARD", [])
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_TOKEN", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)
    (home() / forwarding.SINCE).unlink(missing_ok=True)


@pytest.fixture
def mlflow(server: Server, monkeypatch: pytest.MonkeyPatch) -> forwarding.Forwarder:
    """Who tells the server, as BONSAI_FORWARD says."""
    return named(monkeypatch, f"mlflow:{server.address}")


def named(monkeypatch: pytest.MonkeyPatch, *entries: str) -> forwarding.Forwarder:
    monkeypatch.setattr(settings, "BONSAI_FORWARD", list(entries))
    (target,), faults = forwarding.targets()
    assert not faults
    return forwarding.Forwarder(target)


def taken_in(job: Job, status: Status = Status.RUNNING, **changes: Any) -> Job:
    """The job after its log was taken into the database and it came to this state."""
    job.refresh_from_db()
    Ingester(job, job_folder(job.pk), job.lease_epoch).drain()
    ended = timezone.now() if status in forwarding.TERMINAL else None
    values = {"status": status, "ended_at": ended, "started_at": job.started_at or timezone.now(), **changes}
    Job.objects.filter(pk=job.pk).update(**values)
    job.refresh_from_db()
    return job


def steps(log: EventLog, first: int, last: int, **values: Any) -> None:
    for step in range(first, last + 1):
        log.metric(metric_row(step, **values))
        log.flush()


def cursor_of(forwarder: forwarding.Forwarder, job: Job) -> Path:
    return job_folder(job.pk) / "forward" / f"{forwarder.target.slug}.json"


# ── MLflow ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_stands_there_under_trainers_names(
    make_job: MakeJob, write_log: WriteLog, mlflow: forwarding.Forwarder, store: Store
) -> None:
    job = make_job(
        request={"data": {"source": "dataset:7"}, "model": {"source": "starter:tiny"}},
        recipe={
            "data": {"source": "file:/var/data/original.csv", "sha256": None},
            "model": {"source": "folder:/var/models/tiny"},
            "methods": [{"slug": "lora", "params": {"r": 8, "teacher": "folder:/var/models/big"}}],
            "settings": {"learning_rate": 1e-4, "packing": True},
        },
    )
    log = write_log(job, 2)
    log.emit("evaluation", {"eval_loss": 0.5, "eval_accuracy": 0.75, "samples": 32, "best": True}, step=2)
    steps(log, 3, 3, loss=float("nan"), grad_norm=float("inf"))
    log.close()
    assert mlflow.tell(taken_in(job, Status.SUCCEEDED, reason="completed", message="It is done.")) == 4

    run = store.only_run()
    assert {key for key, *_ in run["metrics"]} == {
        "samples", "num_input_tokens_seen", "epoch", "loss", "grad_norm", "learning_rate", "seconds", "tokens_per_second", "memory",
        "eval_loss", "eval_accuracy",
    }  # fmt: skip
    assert store.curve("loss")[:2] == [(1, 2.0), (2, 1.0)] and store.curve("eval_loss") == [(2, 0.5)]
    assert [step for step, value in store.curve("loss") if math.isnan(value)] == [3]
    assert math.isnan(store.curve("grad_norm")[2][1]), "the log holds no infinity, only that there was no number"
    assert run["params"] == {
        "data.source": "dataset:7", "model.source": "starter:tiny", "methods.0.slug": "lora", "methods.0.params.r": "8",
        "settings.learning_rate": "0.0001", "settings.packing": "True",
    }, "and no place on the disk"  # fmt: skip
    assert run["name"] == job.name and list(store.experiments) == ["Bonsai Studio"]
    assert run["tags"]["bonsai.job"] == str(job.pk) and run["tags"]["bonsai.address"].endswith(f"/runs/{job.pk}/")
    assert (run["status"], run["tags"]["bonsai.reason"]) == ("FINISHED", "completed")
    assert run["start_time"] <= run["end_time"] == round(1000 * job.ended_at.timestamp())  # type: ignore[union-attr]
    moments = [moment for name, _, moment, _ in run["metrics"] if name == "eval_loss"]
    assert abs(moments[0] / 1000 - time.time()) < 60
    assert not mlflow.open and not mlflow.has_news(job)


@pytest.mark.parametrize(("status", "theirs"), [(Status.FAILED, "FAILED"), (Status.CANCELLED, "KILLED")])
def test_another_end_is_told_too(
    status: Status, theirs: str, make_job: MakeJob, write_log: WriteLog, mlflow: forwarding.Forwarder, store: Store
) -> None:
    job = make_job()
    write_log(job, 1).close()
    mlflow.tell(taken_in(job, status))
    assert store.only_run()["status"] == theirs


def test_it_is_away_and_comes_back(
    make_job: MakeJob, write_log: WriteLog, mlflow: forwarding.Forwarder, store: Store, server: Server
) -> None:
    job = make_job()
    log = write_log(job, 5)
    assert mlflow.tell(taken_in(job)) == 5
    server.close()
    steps(log, 6, 9)
    for _ in range(2):
        with pytest.raises(Away, match="does not answer"):
            mlflow.tell(taken_in(job))
    steps(log, 10, 12)
    log.close()
    again = Server(store, server.port)
    try:
        assert mlflow.tell(taken_in(job, Status.SUCCEEDED)) == 7
    finally:
        again.close()
    assert [step for step, _ in store.curve("loss")] == list(range(1, 13))
    assert store.num_repeated == 0 and store.only_run()["status"] == "FINISHED"


@pytest.mark.parametrize("lost", ["runs/create", "runs/log-batch", "runs/update"])
def test_a_lost_answer_doubles_nothing(
    lost: str, make_job: MakeJob, write_log: WriteLog, mlflow: forwarding.Forwarder, store: Store
) -> None:
    """The server did what it was asked and nobody heard of it."""
    job = make_job(recipe={"settings": {"seed": 1}})
    write_log(job, 3).close()
    taken_in(job, Status.SUCCEEDED)
    carried_out = getattr(store, lost.replace("/", "_").replace("-", "_"))

    def once(body: dict[str, Any]) -> dict[str, Any]:
        if body.get("metrics") or lost != "runs/log-batch":
            store.lose_answers += not told
            told.append(1)
        return dict(carried_out(body))

    told: list[int] = []
    setattr(store, carried_out.__name__, once)
    with pytest.raises(Away):
        mlflow.tell(job)
    mlflow.tell(job)
    assert [step for step, _ in store.curve("loss")] == [1, 2, 3]
    assert store.num_repeated == (3 * NUM_NUMBERS if lost == "runs/log-batch" else 0)
    assert store.only_run()["status"] == "FINISHED"


def test_no_call_is_too_large(
    make_job: MakeJob, write_log: WriteLog, mlflow: forwarding.Forwarder, store: Store
) -> None:
    job = make_job(recipe={"notes": [f"{place}: " + "long " * 200 for place in range(230)], "odd name?": 1})
    log = write_log(job, 500, per_event=250)  # lines that hold more than one call may
    log.emit("evaluation", {f"eval_score of ({place})": place / 7 for place in range(1500)}, step=500)
    log.close()
    mlflow.tell(taken_in(job, Status.SUCCEEDED))
    sizes = [len(body.get("metrics", ())) for path, body in store.calls if path == "runs/log-batch"]
    assert sum(sizes) == 500 * NUM_NUMBERS + 1500 and max(sizes) == 1000
    assert [step for step, _ in store.curve("loss")] == list(range(1, 501)) and len(store.only_run()["params"]) == 231
    assert store.curve("eval_score of _12_") == [(500, 12 / 7)]


def test_a_cursor_that_was_not_written_doubles_nothing(
    make_job: MakeJob, write_log: WriteLog, mlflow: forwarding.Forwarder, store: Store
) -> None:
    """Killed between the answer and the disk."""
    job = make_job()
    log = write_log(job, 4)
    mlflow.tell(taken_in(job))
    mlflow.close(job.pk)
    cursor_of(mlflow, job).write_text("{", encoding="utf-8")
    steps(log, 5, 6)
    assert mlflow.tell(taken_in(job)) == 6
    assert [step for step, _ in store.curve("loss")] == list(range(1, 7)) and len(store.runs) == 1


@pytest.mark.parametrize(("rows", "word"), [(1, False), (2, False), (2, True)])
def test_a_log_whose_end_was_lost_and_written_anew(
    rows: int, word: bool, make_job: MakeJob, write_log: WriteLog, mlflow: forwarding.Forwarder, store: Store
) -> None:
    """After a loss of power the child repeats the lost steps, at other moments and perhaps with other rows to a line."""
    job = make_job()
    log = write_log(job, 6)
    log.emit("evaluation", {"eval_loss": 0.5}, step=6)
    steps(log, 7, 8)
    log.close()
    mlflow.tell(taken_in(job))
    mlflow.close(job.pk)
    path = job_folder(job.pk) / LOG_NAME
    offset = path.stat().st_size
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:4]))
    log = EventLog(path.parent, interval=1e9)
    if not word:
        assert mlflow.tell(taken_in(job)) == 0, "the child has not begun again yet"
    else:  # so long that a line ends just where the cursor stood
        log.emit("log", {"level": "info", "message": ""})
        begun = path.stat().st_size
        path.write_bytes(path.read_bytes().replace(b'"message":""', b'"message":"%b"' % (b"x" * (offset - begun))))
        log = EventLog(path.parent, interval=1e9)
    for step in range(5, 13):
        log.metric(metric_row(step))
        if step % rows == 0:
            log.flush()
        if step == 6:
            log.emit("evaluation", {"eval_loss": 0.5}, step=6)
    log.close()
    mlflow.tell(taken_in(job, Status.SUCCEEDED))
    assert [step for step, _ in store.curve("loss")] == list(range(1, 13))
    assert store.curve("eval_loss") == [(6, 0.5)] and store.num_repeated == 0


def test_damaged_lines_and_other_kinds_are_passed_over(
    make_job: MakeJob, write_log: WriteLog, mlflow: forwarding.Forwarder, store: Store
) -> None:
    job = make_job()
    log = write_log(job, 2)
    log.emit("log", {"level": "info", "message": "a word"})
    steps(log, 3, 3)
    log.close()
    path = job_folder(job.pk) / LOG_NAME
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"{\xff\n" + b"".join(lines[2:]) + lines[0] + b'{"seq": 9, "ti')
    Job.objects.filter(pk=job.pk).update(status=Status.RUNNING, log_offset=path.stat().st_size)
    job.refresh_from_db()
    assert mlflow.tell(job) == 2
    assert [step for step, _ in store.curve("loss")] == [1, 3]


def test_a_run_that_was_deleted_there_stays_deleted_until_somebody_asks(
    make_job: MakeJob, write_log: WriteLog, mlflow: forwarding.Forwarder, store: Store
) -> None:
    job = make_job()
    log = write_log(job, 2)
    mlflow.tell(taken_in(job))
    store.runs.clear()
    steps(log, 3, 3)
    log.close()
    with pytest.raises(Refused, match="RESOURCE_DOES_NOT_EXIST"):
        mlflow.tell(taken_in(job, Status.SUCCEEDED))
    assert not mlflow.has_news(job)
    said = StringIO()
    call_command("forward", job=[str(job.pk)], stdout=said)
    assert "sent 3 steps and measurements of 1 runs" in said.getvalue()
    assert [step for step, _ in store.curve("loss")] == [1, 2, 3]


@pytest.mark.parametrize(("status", "words"), [(401, "login"), (403, "403"), (500, "500"), (404, "404")])
def test_a_server_that_cannot_serve_is_away(
    status: int, words: str, make_job: MakeJob, write_log: WriteLog, mlflow: forwarding.Forwarder, store: Store
) -> None:
    job = make_job()
    write_log(job, 1).close()
    store.status = status
    with pytest.raises(Away, match=words):
        mlflow.tell(taken_in(job))
    assert mlflow.has_news(job)


def test_a_password_is_used_and_never_shown(
    make_job: MakeJob, write_log: WriteLog, server: Server, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    forwarder = named(monkeypatch, f"mlflow:http://ann:s%40cret@127.0.0.1:{server.port}/#My%20garden")
    job = make_job()
    write_log(job, 1).close()
    forwarder.tell(taken_in(job))
    assert store.headers["Authorization"] == "Basic YW5uOnNAY3JldA==" and list(store.experiments) == ["My garden"]
    shown = f"{forwarder.target} {forwarder.target!r} {cursor_of(forwarder, job)}"
    assert "cret" not in shown and "My garden" in shown
    engine, *_ = parts.parts("127.0.0.1", 1)
    assert engine.name == "engine" and not engine.secret and "BONSAI_FORWARD" in parts.SECRETS


# ── Weights & Biases, Trackio ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """What the one run at a tracker's package holds; the packages are importable meanwhile."""
    write_packages(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("HELD_BY_TRACKERS", str(tmp_path / "held"))
    loaded = {name for name in sys.modules if name.partition(".")[0] in ("wandb", "trackio")}
    assert not loaded, "nobody imports them before something is sent"
    yield lambda: [json.loads(line) for path in (tmp_path / "held").iterdir() for line in path.read_text().splitlines()]
    for name in [name for name in sys.modules if name.partition(".")[0] in ("wandb", "trackio")]:
        del sys.modules[name]


@pytest.mark.parametrize(("kind", "axis"), [("wandb", "train/global_step"), ("trackio", "step")])
def test_a_package_is_told_everything_once_also_by_a_process_that_is_killed(
    kind: str,
    axis: str,
    make_job: MakeJob,
    write_log: WriteLog,
    held: Callable[[], list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forwarder = named(monkeypatch, f"{kind}:garden")
    job = make_job(recipe={"settings": {"seed": 1}})
    log = write_log(job, 6)
    log.emit("evaluation", {"eval_loss": 0.5}, step=6)
    assert forwarder.tell(taken_in(job)) == 7
    assert len(held()) < 7, "something waits in the package"
    forwarder._release(job.pk)  # killed: what waits is lost, the lock is free
    monkeypatch.setenv("TRACKER_IS_DOWN", "1")
    steps(log, 7, 8)
    with pytest.raises(Away, match=r"ConnectionError: The tracker is down\.$"):
        forwarder.tell(taken_in(job))
    monkeypatch.delenv("TRACKER_IS_DOWN")
    steps(log, 9, 9, loss=float("nan"))
    log.close()
    forwarder.tell(taken_in(job, Status.FAILED, reason="diverged", message="It left the road."))
    rows = [row for row in held() if axis in row]
    assert [row[axis] for row in rows if "train/loss" in row] == list(range(1, 10))
    assert [(row[axis], row["eval/loss"]) for row in rows if "eval/loss" in row] == [(6, 0.5)]
    assert math.isnan(rows[-1]["train/loss"]) and rows[1]["train/num_input_tokens_seen"] == 200
    if kind == "wandb":
        end = held()[-1]
        assert [row["_step"] for row in rows] == list(range(10)) and end["exit_code"] == 1
        assert (end["bonsai.status"], end["config"]["settings.seed"]) == ("failed", 1)
    forwarder.tell(job, again=True)
    assert len([row for row in held() if axis in row]) == 10


# ── following ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def follower(forwarder: forwarding.Forwarder) -> forwarding.Follower:
    begun = forwarding.since()
    return forwarding.Follower(forwarder.target, begun[forwarder.target.slug], threading.Event())


def test_what_ended_before_it_was_set_up_is_sent_only_on_request(
    make_job: MakeJob, write_log: WriteLog, mlflow: forwarding.Forwarder, store: Store
) -> None:
    old, new, unborn = make_job(name="Old"), make_job(name="New"), make_job(name="Unborn")
    for job in (old, new):
        write_log(job, 2).close()
    taken_in(old, Status.SUCCEEDED)
    watcher = follower(mlflow)
    taken_in(new, Status.SUCCEEDED)
    for _ in range(2):
        watcher.look()
    assert [run["name"] for run in store.runs.values()] == ["New"]
    num_calls = len(store.calls)
    follower(mlflow).look()  # started again
    assert len(store.calls) == num_calls, "what was told is told"
    call_command("forward", stdout=StringIO())
    assert [run["name"] for run in store.runs.values()] == ["New", "Old"] and unborn.name == "Unborn"
    for run in store.runs.values():
        assert len(run["metrics"]) == 2 * NUM_NUMBERS
    assert store.num_repeated == 0


def test_a_paused_run_is_let_go_and_goes_on(
    make_job: MakeJob, write_log: WriteLog, mlflow: forwarding.Forwarder, store: Store
) -> None:
    job, watcher = make_job(), follower(mlflow)
    log = write_log(job, 2)
    taken_in(job)
    watcher.look()
    assert job.pk in watcher.forwarder.open
    assert mlflow.tell(job) is None, "one process at a time"
    log.emit("state", {"state": "paused", "message": ""})
    taken_in(job, Status.PAUSED)
    watcher.look()
    num_calls = len(store.calls)
    watcher.look()
    assert not watcher.forwarder.open and len(store.calls) == num_calls and store.only_run()["status"] == "RUNNING"
    steps(log, 3, 4)
    log.close()
    taken_in(job, Status.SUCCEEDED)
    watcher.look()
    assert [step for step, _ in store.curve("loss")] == [1, 2, 3, 4] and store.num_repeated == 0
    assert store.only_run()["status"] == "FINISHED"


def test_a_job_that_is_deleted_meanwhile_disturbs_nobody(
    make_job: MakeJob, write_log: WriteLog, mlflow: forwarding.Forwarder, store: Store
) -> None:
    gone, stays, watcher = make_job(name="Gone"), make_job(name="Stays"), follower(mlflow)
    for job in (gone, stays):
        write_log(job, 1).close()
        taken_in(job)
    watcher.look()
    Job.objects.filter(pk=gone.pk).delete()
    taken_in(stays, Status.SUCCEEDED)
    watcher.look()
    assert not watcher.forwarder.open
    assert {run["name"]: run["status"] for run in store.runs.values()} == {"Gone": "RUNNING", "Stays": "FINISHED"}


def test_a_long_backlog_keeps_no_other_run_waiting(
    make_job: MakeJob,
    write_log: WriteLog,
    mlflow: forwarding.Forwarder,
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(forwarding, "SHARE_SECONDS", 0.0)
    long, short, watcher = make_job(name="Long"), make_job(name="Short"), follower(mlflow)
    for job, num in ((long, 300), (short, 2)):
        write_log(job, num).close()
        taken_in(job, Status.SUCCEEDED)
    assert watcher.look(), "something is left"
    by_name = {run["name"]: run for run in store.runs.values()}
    assert 0 < len(by_name["Long"]["metrics"]) < 300 * NUM_NUMBERS and by_name["Long"]["status"] == "RUNNING"
    assert len(by_name["Short"]["metrics"]) == 2 * NUM_NUMBERS
    looks = 1
    while watcher.look():
        looks += 1
    assert looks <= 4 and [run["status"] for run in store.runs.values()] == ["FINISHED", "FINISHED"]
    assert len(by_name["Long"]["metrics"]) == 300 * NUM_NUMBERS and store.num_repeated == 0


@pytest.mark.django_db(transaction=True)
def test_the_process_follows_by_itself_and_waits_for_a_tracker(
    transactional_db: None, make_job: MakeJob, write_log: WriteLog, mlflow: forwarding.Forwarder, store: Store,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(forwarding, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(forwarding, "MOST_SECONDS", 0.05)
    store.status = 503
    stopping = threading.Event()
    process = threading.Thread(target=forwarding.follow, args=([mlflow.target], stopping))
    process.start()
    try:
        job = make_job()
        log = write_log(job, 3)
        taken_in(job)
        until(lambda: len(store.calls) > 2)
        assert not store.runs
        store.status = 0
        until(lambda: store.runs and len(store.curve("loss")) == 3)
        steps(log, 4, 5)
        log.close()
        taken_in(job, Status.SUCCEEDED)
        until(lambda: store.only_run()["status"] == "FINISHED")
    finally:
        stopping.set()
        process.join(10)
    assert [step for step, _ in store.curve("loss")] == [1, 2, 3, 4, 5] and store.num_repeated == 0


def until(holds: Callable[[], Any]) -> None:
    end = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


# ── the setting ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("entry", "what", "way_out"),
    [
        ("neptune:x", "of the kind “neptune”, which is unknown", "Write one of: mlflow:http://host:5000, wandb:"),
        ("mlflow", "names MLflow, and nothing is sent there. It names no address", "Write mlflow:http://host:5000."),
        ("mlflow:host:5000", "It names no address", "Write mlflow:http://host:5000."),
        ("mlflow:http://host:port", "nothing is sent there. Port could not", "Write mlflow:http://host:5000."),
        ("wandb:", "It names no project", "Write wandb:project."),
        ("trackio:", "It names no project", "Write trackio:project."),
    ],
)
def test_a_wrong_setting_is_said_in_sentences(
    entry: str, what: str, way_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "BONSAI_FORWARD", [entry, "mlflow:http://host:5000", ""])
    (message,) = checks.check_forwarding(None)
    assert what in message.msg and message.msg.endswith(".") and (message.hint or "").startswith(way_out)
    assert not message.is_serious(), "the studio runs without it"
    assert [str(target) for target in forwarding.targets()[0]] == [
        "MLflow at http://host:5000, experiment “Bonsai Studio”"
    ]


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_a_missing_package_is_named(package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / package).mkdir()  # a folder of results that has the package's name is no package
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(place for place in sys.path if "site-packages" not in place)])
    monkeypatch.setattr(settings, "BONSAI_FORWARD", [f"{package}:garden"])
    (message,) = checks.check_forwarding(None)
    assert f"the package {package} is not installed." in message.msg
    assert f"{sys.executable} -m pip install {package}" in (message.hint or "")
    assert package not in sys.modules and missing(package)


def test_without_the_setting_nobody_is_started_and_nothing_is_sent(monkeypatch: pytest.MonkeyPatch, db: None) -> None:
    assert [part.name for part in parts.parts("127.0.0.1", 1)] == ["engine", "web", "consumer"]
    assert checks.check_forwarding(None) == []
    with pytest.raises(CommandError, match="BONSAI_FORWARD names no tracker"):
        call_command("forward")
    monkeypatch.setattr(settings, "BONSAI_FORWARD", ["mlflow:http://host:5000"])
    begun = forwarding.since()
    assert [part.name for part in parts.parts("127.0.0.1", 1)] == ["engine", "web", "consumer", "forward"]
    monkeypatch.setattr(settings, "BONSAI_FORWARD", ["mlflow:http://host:5000", "mlflow:http://other:5000"])
    assert forwarding.since().items() > begun.items(), "the first keeps its beginning"
    monkeypatch.setattr(settings, "BONSAI_FORWARD", [])
    assert forwarding.since() == {} == json.loads((home() / forwarding.SINCE).read_bytes())


def test_a_job_that_is_not_there_is_said(mlflow: forwarding.Forwarder, db: None) -> None:
    for name in ("nonsense", "af5162a4-6b86-4d7a-9dd2-c392968b753d"):
        with pytest.raises(CommandError, match=f"There is no job {name}"):
            call_command("forward", job=[name])
