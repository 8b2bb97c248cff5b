"""Uploads: a stream becomes a private file, the file is looked at, and only what can be learned from becomes a row."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import unicodedata
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from django.contrib.auth.models import User
from django.db import transaction
from django.db.models import Count, Sum

from engine.core.errors import EngineError, Fault, RecipeError, bad_input
from engine.io.datasets import SHAPES
from jobs import inspection
from jobs.limits import in_words, limit
from jobs.models import TERMINAL, Dataset
from jobs.places import home, made_of

MAX_NAME = 120
PREVIEW_ROWS = 20
PREVIEW_CHARS = 2000  # of one cell; a page shows a glance, the file keeps everything


def folder_of(dataset_id: uuid.UUID) -> Path:
    """Where the file of a data set lies. The identifier is ours, so no text from outside is part of the path."""
    return home() / "data" / str(dataset_id)


def shown_name(filename: str) -> str:
    """What a person called the file, fit to be shown: the last part of the path, one line, of bounded length. Never used as a path."""
    last = re.split(r"[/\\]", filename)[-1]
    plain = "".join(" " if unicodedata.category(char)[0] in "CZ" else char for char in last)
    plain = " ".join(plain.split()).lstrip(".")
    stem, dot, ending = plain.rpartition(".")
    if len(plain) > MAX_NAME:
        plain = f"{stem[: MAX_NAME - len(ending) - 2]}….{ending}" if dot and len(ending) <= 10 else plain[:MAX_NAME]
    return plain or "data"


def store(owner: User, filename: str, chunks: Iterable[bytes], *, name: str = "") -> Dataset:
    """Keep an upload exactly as it came and tell what it holds; on any refusal nothing is left behind."""
    dataset_id = uuid.uuid4()
    folder = folder_of(dataset_id)
    _check_room(owner, 0)
    folder.mkdir(parents=True, mode=0o700)
    try:
        size, digest = _write(owner, folder / "original.incoming", chunks)
        seen = inspection.look(folder / "original.incoming", shown_name(filename))
        facts = seen["facts"]
        path = folder / f"original.{facts['format']}"
        os.replace(folder / "original.incoming", path)
        with transaction.atomic():
            User.objects.select_for_update().get(
                pk=owner.pk
            )  # two uploads at once must not both find the last free megabyte
            _check_room(owner, size)
            return Dataset.objects.create(
                id=dataset_id,
                owner=owner,
                name=shown_name(name or filename),
                path=str(path),
                format=facts["format"],
                bytes=size,
                sha256=digest,
                **described(facts, seen),
            )
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def change_mapping(dataset: Dataset, mapping: Mapping[str, str]) -> Dataset:
    """Choose which column plays which role, and look at the file again with it; every column that does not exist is named at once."""
    columns = ", ".join(dataset.columns)
    faults = [
        Fault(
            where=f"mapping.{role}",
            what=f"There is no column '{column}'.",
            why=f"The columns of this data are: {columns}.",
            way_out="Choose one of them.",
            code="missing_column",
        )
        for role, column in mapping.items()
        if column not in dataset.columns
    ]
    known = {role: None for shape in SHAPES.values() for role in (*shape.roles, *shape.optional)}
    faults += [
        Fault(
            where=f"mapping.{role}",
            what=f"There is no role called '{role}'.",
            why="A role says what a column is for.",
            way_out=f"Use some of: {', '.join(known)}.",
            code="unknown_role",
        )
        for role in mapping
        if role not in known
    ]
    if not faults and len(set(mapping.values())) < len(mapping):
        faults.append(
            Fault(
                where="mapping",
                what="One column plays two roles.",
                why="The model would be shown the answer with the question.",
                way_out="Choose a different column for each role.",
                code="column_twice",
            )
        )
    if faults:
        raise RecipeError(faults)
    seen = inspection.look(Path(dataset.path), dataset.name, mapping)
    changes = described(seen["facts"], seen)
    for name, value in changes.items():
        setattr(dataset, name, value)
    dataset.save(update_fields=list(changes))
    return dataset


def delete(dataset: Dataset) -> None:
    """Delete the row and its file; refused while a job still needs it."""
    busy = dataset.jobs.exclude(status__in=TERMINAL).count()
    if busy:
        raise bad_input(
            "dataset",
            "This data is in use.",
            f"{busy} {'job has' if busy == 1 else 'jobs have'} not ended yet and read it.",
            "Wait for them or cancel them, then delete it.",
            "in_use",
        )
    folder = folder_of(dataset.id)
    dataset.delete()
    shutil.rmtree(folder, ignore_errors=True)
    if dataset.sha256 and not Dataset.objects.filter(sha256=dataset.sha256).exists():
        for kept in made_of(dataset.sha256):
            shutil.rmtree(kept, ignore_errors=True) if kept.is_dir() else kept.unlink(missing_ok=True)


def usage(owner: User) -> dict[str, int]:
    """How much of their quota a person uses."""
    row = Dataset.objects.filter(owner=owner).aggregate(bytes=Sum("bytes", default=0), num=Count("id"))
    return {
        "bytes": row["bytes"],
        "datasets": row["num"],
        "quota_bytes": limit("BONSAI_DATA_QUOTA_BYTES"),
        "max_datasets": limit("BONSAI_MAX_DATASETS"),
        "max_upload_bytes": limit("BONSAI_MAX_UPLOAD_BYTES"),
    }


def _write(owner: User, path: Path, chunks: Iterable[bytes]) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    most, room = limit("BONSAI_MAX_UPLOAD_BYTES"), usage(owner)
    left = room["quota_bytes"] - room["bytes"]
    with path.open("xb") as file:
        for chunk in chunks:
            size += len(chunk)
            if size > most:
                raise EngineError(
                    Fault(
                        where="file",
                        what="This file is too large.",
                        why=f"One file may have at most {in_words(most)} here.",
                        way_out="Send a part of the rows, or compress the table as Parquet.",
                        code="too_large",
                    )
                )
            if size > left:
                raise _no_room(room)
            digest.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    if not size:
        raise bad_input(
            "file",
            "This file is empty.",
            "It has no byte at all, so there is nothing to learn from.",
            "Save the table again and send the new file.",
            "empty_file",
        )
    return size, digest.hexdigest()


def _check_room(owner: User, size: int) -> None:
    room = usage(owner)
    if room["bytes"] + size > room["quota_bytes"]:
        raise _no_room(room)
    if room["datasets"] >= room["max_datasets"]:
        raise bad_input(
            "file",
            "You have as many data sets as one person may keep.",
            f"That is {room['max_datasets']}.",
            "Delete one that you no longer need.",
            "quota",
        )


def _no_room(room: Mapping[str, int]) -> EngineError:
    return bad_input(
        "file",
        "There is no room left for this file.",
        f"Your data takes {in_words(room['bytes'])} of {in_words(room['quota_bytes'])} already.",
        "Delete data that you no longer need.",
        "quota",
    )


def described(facts: Mapping[str, Any], seen: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_rows": facts["num_rows"],
        "shape": facts["shape"],
        "columns": facts["columns"],
        "mapping": facts["mapping"],
        "labels": facts["labels"],
        "facts": {key: value for key, value in facts.items() if key not in {"path", "source"}},
        "findings": seen["findings"],
        "preview": [_glance(row) for row in seen["preview"][:PREVIEW_ROWS]],
    }


def _glance(value: Any) -> Any:
    if isinstance(value, str):
        return value if len(value) <= PREVIEW_CHARS else value[:PREVIEW_CHARS] + "…"
    if isinstance(value, dict):
        return {key: _glance(item) for key, item in value.items()}
    return [_glance(item) for item in value] if isinstance(value, list) else value
