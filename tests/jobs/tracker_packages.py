"""Packages with the part of the interfaces of wandb and trackio that forwarding relies on, written into a folder that is then importable.

They keep what they are told in the folder that HELD_BY_TRACKERS names, as the real ones do on a disk or a server, and what was logged but not
written when a process is killed is lost. As with the real ones: wandb drops a row whose step is below the next one and tells that step when a
run is opened again; trackio finds a run by its name and counts its rows.
"""

from __future__ import annotations

from pathlib import Path

SHARED = '''
import json, os, pathlib

def place(*names):
    folder = pathlib.Path(os.environ["HELD_BY_TRACKERS"])
    folder.mkdir(exist_ok=True)
    return folder / ("-".join(names).replace(" ", "_") + ".jsonl")

def held(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

class Queue:
    """Rows that are written when the run is finished, or by and by: here every second one."""

    def __init__(self, path):
        self.path, self.waiting = path, []

    def put(self, row):
        self.waiting.append(row)
        if len(self.waiting) > 2:
            self.write(self.waiting[:-1])
            del self.waiting[:-1]

    def write(self, rows):
        with self.path.open("a") as file:
            file.writelines(json.dumps(row) + "\\n" for row in rows)

    def finish(self):
        self.write(self.waiting)
        self.waiting = []
'''

WANDB = (
    SHARED
    + """
class Settings:
    model_fields = {"console": None, "silent": None, "disable_git": None, "x_disable_stats": None}

    def __init__(self, **values):
        assert values.keys() <= self.model_fields.keys(), values

class Summary(dict):
    pass

class Run:
    def __init__(self, path, config):
        self.config, self.summary, self._queue = config, Summary(), Queue(path)
        self.step = max((row["_step"] + 1 for row in held(path) if "_step" in row), default=0)

    def define_metric(self, name, step_metric=None, step_sync=None):
        pass

    def log(self, row, step=None, commit=None):
        assert commit and step is not None
        if step >= self.step:
            self._queue.put({**row, "_step": step})
            self.step = step + 1

    def finish(self, exit_code=None):
        self._queue.finish()
        self._queue.write([{"exit_code": exit_code, "config": self.config, **self.summary}])

def init(*, project, entity, id, name, notes, config, resume, reinit, dir, settings):
    assert (resume, reinit) == ("allow", "create_new") and os.path.isdir(dir)
    if os.environ.get("TRACKER_IS_DOWN"):
        raise ConnectionError("The tracker is down.\\nA second line.")
    return Run(place("wandb", project, id), config)
"""
)

TRACKIO = (
    SHARED
    + """
import uuid

current = []

class Run:
    def __init__(self, path, name, config):
        self.id, self.name, self._queue = uuid.uuid4().hex, name, Queue(path)

    def log(self, row, step=None):
        self._queue.put({**row, "step": step})

    def finish(self):
        self._queue.finish()

def init(project, name, config, resume, embed, auto_log_gpu, auto_log_cpu):
    assert resume == "allow" and not any(key.startswith("_") for key in config)
    if os.environ.get("TRACKER_IS_DOWN"):
        raise ConnectionError("The tracker is down.\\nA second line.")
    return Run(place("trackio", project, name), name, config)
"""
)

COUNTING = """
from trackio import held, place

class SQLiteStorage:
    @staticmethod
    def get_log_count(project, run=None, run_id=None):
        return len(held(place("trackio", project, run)))
"""


def write_packages(folder: Path) -> None:
    """Make `import wandb` and `import trackio` find these, once `folder` is on the path."""
    for name, text in {
        "wandb/__init__.py": WANDB,
        "trackio/__init__.py": TRACKIO,
        "trackio/sqlite_storage.py": COUNTING,
        "trackio/utils.py": 'def get_storage_mode():\n    return "sqlite"\n',
    }.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
