"""A child without an engine, for tests of the supervisor's process handling: python fake_child.py FOLDER MANNER.

It holds the folder's lock, writes a real log, obeys control.json and leaves a result, or misbehaves as told.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from engine.core.control import DISK_REFUSED, Control, write_json
from engine.core.events import EventLog
from tests.jobs.logs import artifact_in, metric_row

NUM_STEPS = 40


def main(folder: Path, manner: str) -> None:
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(3)
        (folder / "result.json").unlink(missing_ok=True)
        with (folder / "launches").open("a") as file:
            file.write(f"{os.getpid()}\n")
        log, control = EventLog(folder, interval=0.0), Control(folder)
        control.listen_for_sigterm()
        if manner == "deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        log.emit("state", {"state": "starting", "message": "Reading."})
        if manner == "refused":
            finish(folder, log, "failed", "bad_input", "The label column is missing.")
        if manner == "full disk":
            sys.exit(DISK_REFUSED)
        log.emit("state", {"state": "running", "message": "Learning."})
        first = log._metric_step + 1 if log._metric_step > 0 else 1
        slow = 0.02 if manner == "works" else 0.05
        for step in range(first, NUM_STEPS + 1 if manner != "deaf" else 10**6):
            time.sleep(slow)
            log.metric(metric_row(step))
            if step == 20:
                log.emit("checkpoint", {"path": "checkpoints/step-20", "best": True}, step=step)
            if manner == "crashes" and step % 10 == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            if manner == "crashes at once":
                os.kill(os.getpid(), signal.SIGSEGV)
            request = control.poll()
            if request in ("pause", "cancel") and manner != "deaf":
                finish(
                    folder, log, "paused" if request == "pause" else "cancelled", request, f"{request} at step {step}."
                )
            if request == "stop" and manner != "deaf":
                break
        artifact_in(folder)
        finish(folder, log, "succeeded", "stopped" if step < NUM_STEPS else "completed", "Learned.")


def finish(folder: Path, log: EventLog, outcome: str, reason: str, message: str) -> None:
    log.emit("state", {"state": "done", "message": message})
    log.close()
    write_json(folder / "result.json", {"outcome": outcome, "reason": reason, "message": message, "faults": []})
    sys.exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
