"""Numbers, times and states as people say them."""

from __future__ import annotations

from typing import Any

from jobs.models import Job, Status


def number(value: float | int | None, digits: int = 3) -> str:
    """A number with as many digits as matter: 0.0002, 1.384, 22,713,216."""
    if value is None:
        return "–"
    if isinstance(value, int) or (abs(value) >= 1000 and float(value).is_integer()):
        return f"{int(value):,}"
    if value == 0:
        return "0"
    if abs(value) < 0.001 or (abs(value) >= 1e6 and not float(value).is_integer()):
        mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
        plain = f"{value:.10f}".rstrip("0")
        return (
            plain if abs(value) < 0.001 and len(plain) <= 8 else f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
        )
    return f"{value:.{digits}f}".rstrip("0").rstrip(".") if abs(value) < 100 else f"{value:,.1f}".removesuffix(".0")


def count(value: int | None, one: str, many: str = "") -> str:
    """A count with its noun: "1 row", "2,410 rows"."""
    value = value or 0
    return f"{value:,} {one if value == 1 else many or one + 's'}"


def short(value: float | int | None) -> str:
    """A large count in one breath: "22.7 million"."""
    if value is None:
        return "–"
    for size, name in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if abs(value) >= size:
            return f"{value / size:.3g} {name}"
    return f"{value / 1000:.3g} thousand" if abs(value) >= 10_000 else f"{value:,.0f}"


def size(num_bytes: float | int | None) -> str:
    """A size in bytes: "3.2 MB"."""
    if num_bytes is None:
        return "–"
    value = float(num_bytes)
    unit = "bytes"
    for unit in ("bytes", "KB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "bytes" or value >= 100 else f"{value:.1f} {unit}".replace(".0 ", " ")


def duration(seconds: float | None) -> str:
    """A time span to one meaningful unit: "40 seconds", "2 minutes", "1 h 20 min"."""
    if seconds is None:
        return "–"
    if seconds < 1.5:
        return "1 second"
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} minutes"
    hours, rest = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {rest} min" if rest else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"


def spoken(items: list[str], last: str = "and") -> str:
    """A list as a person reads it out: "text, label and id"."""
    if len(items) < 2:
        return "".join(items)
    return f"{', '.join(items[:-1])} {last} {items[-1]}"


STATUS_WORDS = {
    Status.QUEUED: "Waiting",
    Status.STARTING: "Starting",
    Status.RUNNING: "Running",
    Status.STOPPING: "Stopping",
    Status.PAUSED: "Paused",
    Status.LOST: "Interrupted",
    Status.SUCCEEDED: "Finished",
    Status.FAILED: "Failed",
    Status.CANCELLED: "Cancelled",
}
STATUS_ICONS = {
    Status.QUEUED: "queued",
    Status.STARTING: "running",
    Status.RUNNING: "running",
    Status.STOPPING: "stopped",
    Status.PAUSED: "paused",
    Status.LOST: "warn",
    Status.SUCCEEDED: "succeeded",
    Status.FAILED: "failed",
    Status.CANCELLED: "cancelled",
}


def progress(job: Job) -> str:
    """Where a run stands, in half a sentence: "42 % done, about 2 minutes left"."""
    status = Status(job.status)
    if status in (Status.STARTING, Status.RUNNING, Status.STOPPING) and job.total_steps:
        share = f"{100 * job.done_steps / job.total_steps:.0f} % done"
        if status is Status.STOPPING:
            return f"{share}, stopping"
        return f"{share}, about {duration(job.eta_seconds)} left" if job.eta_seconds is not None else share
    return {
        Status.QUEUED: "waits for its turn",
        Status.STARTING: "is starting",
        Status.PAUSED: f"paused after {count(job.done_steps, 'step')}",
        Status.LOST: "was interrupted and starts again by itself",
    }.get(status, STATUS_WORDS[status].lower())


def health(signal: dict[str, Any] | None) -> str:
    """How a run looks, from the last thing its watchers said."""
    if not signal or signal.get("action") in (None, "note", "save"):
        return "looks healthy"
    return "needs a look" if signal["action"] == "warn" else "was stopped by a watcher"


def headline(metrics: dict[str, Any] | None) -> str:
    """The newest measurement in plain words: "right 9 times of 10 on kept-back examples"."""
    metrics = metrics or {}
    accuracy = metrics.get("eval_accuracy")
    if isinstance(accuracy, int | float):
        return f"right {100 * accuracy:.0f} times of 100 on examples it had not seen"
    loss = metrics.get("eval_loss")
    if isinstance(loss, int | float):
        return f"held-out loss {number(float(loss))}"
    return ""
