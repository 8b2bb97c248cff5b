"""Look at an uploaded file in a process of its own, with little memory and little time.

Parsers of tables have had holes and a small file can unpack into a huge one. Whatever happens here ends this process, never the web.
    python -m jobs.inspection FILE NAME [MAPPING AS JSON]     prints {"ok": true, "facts", "preview", "findings"} or {"ok": false, "reason", "faults"}
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from engine.core.errors import EngineError, Fault, RecipeError, bad_input

MAX_SECONDS = 120
MAX_MEMORY = 6 << 30  # of address space: Arrow reserves much more than it uses
MAX_CHARS = 2_000_000_000  # a few kilobytes of Parquet can stand for more than anyone reads
ROOT = Path(__file__).resolve().parent.parent


def look(path: Path, filename: str, mapping: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What the file holds: {"facts", "preview", "findings"}; an EngineError or RecipeError with sentences when it cannot be used.

    mapping: role -> column as a person chose it; None means: guess.
    """
    # An own environment: the child needs no secret of the web process.
    environment = {
        "PATH": os.environ.get("PATH", ""),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PYTHONUTF8": "1",
    }
    command = [
        sys.executable,
        "-m",
        "jobs.inspection",
        str(path),
        filename,
        json.dumps(dict(mapping) if mapping is not None else None),
    ]
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=MAX_SECONDS, env=environment, cwd=ROOT, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise _unlookable(f"Reading it took longer than {MAX_SECONDS} seconds.") from None
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        raise _unlookable("Reading it ended the reader: it needs too much memory, or is damaged.") from None
    if answer["ok"]:
        return answer
    faults = [Fault(**fault) for fault in answer["faults"]]
    raise RecipeError(faults) if len(faults) > 1 else EngineError(faults[0], answer["reason"])


def main(path: str, filename: str, mapping: str = "null") -> dict[str, Any]:
    """The child's end."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_SECONDS, MAX_SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from engine.io.datasets import inspect

    try:
        inspection = inspect(Path(path), filename, mapping=json.loads(mapping))
    except RecipeError as error:
        return {"ok": False, "reason": error.reason, "faults": [fault.to_dict() for fault in error.faults]}
    except EngineError as error:
        return {"ok": False, "reason": error.reason, "faults": [error.fault.to_dict()]}
    except (MemoryError, RecursionError):
        return {
            "ok": False,
            "reason": "bad_input",
            "faults": [_unlookable("It unpacks into more than memory holds.").fault.to_dict()],
        }
    if inspection.facts.mean_chars * inspection.facts.num_rows > MAX_CHARS:
        too_much = _unlookable(f"It unpacks into more than {MAX_CHARS / 1e9:g} billion characters of text.")
        return {"ok": False, "reason": "bad_input", "faults": [too_much.fault.to_dict()]}
    return {
        "ok": True,
        "facts": _plain(inspection.facts),
        "preview": _plain(inspection.preview),
        "findings": _plain(inspection.findings),
    }


def _unlookable(why: str) -> EngineError:
    return bad_input(
        "file",
        "This file could not be read.",
        why,
        "Save the table again as CSV, and send a part of the rows if it is very large.",
        "unreadable_file",
    )


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(*sys.argv[1:])))
