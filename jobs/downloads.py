"""Files that leave the studio: in ranges, with an ETag, and only through the permission of the page they belong to.

Callers look the row up through jobs.access first; nothing here takes a path or a name from outside.
"""

from __future__ import annotations

import asyncio
import csv
import hashlib
import io
import json
import os
import re
import secrets
import time
import zipfile
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from django.core.handlers.asgi import ASGIRequest
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.http.response import HttpResponseBase
from django.utils.http import content_disposition_header
from django.utils.text import slugify

from engine.core.artifact import MANIFEST
from engine.core.errors import EngineError, Fault, bad_input
from engine.core.recipe import parse_recipe
from jobs.models import Artifact, Event, Job
from jobs.places import home, job_folder
from jobs.tensorboard import event_file

BESIDE = ("recipe.yaml", "README.md", "certificate.json")  # what travels with every form
CHUNK = 1 << 18
KEEP_ZIPS_SECONDS = 7 * 24 * 3600
METRICS = (
    "epoch", "samples", "tokens", "loss", "grad_norm", "grad_norm_corrected", "noise_scale", "clipped_share", "learning_rate", "seconds",
    "tokens_per_second", "memory",
)  # fmt: skip
CSV_HEAD = ("seq", "time", "kind", "step", *METRICS, "message", "data")
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def file_response(
    request: HttpRequest, path: Path, *, name: str, etag: str, content_type: str = "application/octet-stream"
) -> HttpResponseBase:
    """Send a file: whole (200), in part (206), unchanged (304) or not in that part (416)."""
    size = path.stat().st_size
    strong = f'"{etag}"'
    common = {
        "ETag": strong,
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, no-cache",
        "X-Content-Type-Options": "nosniff",
        "Content-Disposition": content_disposition_header(True, name) or "attachment",
    }
    known = {tag.strip() for tag in request.headers.get("If-None-Match", "").split(",")}
    if strong in known or "*" in known:
        return HttpResponse(status=304, headers=common)
    span = _span(request, size, strong)
    if span == "outside":
        return HttpResponse(status=416, headers={**common, "Content-Range": f"bytes */{size}"})
    first, last = span if isinstance(span, tuple) else (0, size - 1)
    headers = {**common, "Content-Length": str(last - first + 1)}
    status = 200
    if isinstance(span, tuple):
        status, headers["Content-Range"] = 206, f"bytes {first}-{last}/{size}"
    if request.method == "HEAD":
        return HttpResponse(status=status, headers=headers, content_type=content_type)
    pieces = _pieces(path.open("rb"), first, last - first + 1)
    # Under ASGI Django gathers a synchronous iterator in memory first, which a model of some gigabytes would not survive.
    body = _asynchronous(pieces) if isinstance(request, ASGIRequest) else pieces
    return StreamingHttpResponse(body, status=status, headers=headers, content_type=content_type)


def forms_of(artifact: Artifact) -> list[str]:
    """Which forms this result can be taken home in."""
    return sorted(str(form) for form in artifact.description.get("forms", {}))


def serving_folder(artifact: Artifact, slug: str) -> Path:
    """Where a method that learns while serving keeps what it learned: beside the result, and gone with its job."""
    return Path(artifact.folder).parent / "serving" / re.sub(r"[^a-z0-9-]", "-", slug.lower())[:80]


def artifact_response(request: HttpRequest, artifact: Artifact, form: str) -> HttpResponseBase:
    """One form of a result as a zip archive, with its recipe, model card and certificate beside it."""
    if form not in forms_of(artifact):
        offered = ", ".join(forms_of(artifact)) or "none"
        raise bad_input(
            "form",
            f"This result has no form called '{form}'.",
            f"It comes as: {offered}.",
            "Choose one of those; the page of the result says why a form is missing.",
            "no_such_form",
        )
    path = zipped(artifact, form)
    etag = hashlib.sha256(f"{path.name} {path.stat().st_size}".encode()).hexdigest()[:32]
    return file_response(
        request, path, name=f"{file_stem(artifact.job)}-{form}.zip", etag=etag, content_type="application/zip"
    )


def zipped(artifact: Artifact, form: str) -> Path:
    """The archive of one form, made at the first request and kept for a week after its last use.

    Weights do not compress, so they are stored as they are; each file is hashed on its way in and compared with the manifest.
    """
    store = job_folder(artifact.job_id) / "downloads"  # goes when the job is deleted
    store.mkdir(mode=0o700, parents=True, exist_ok=True)
    # The certificate is about the content but not part of it, so it has a say in the archive's name too.
    certificate = hashlib.sha256(json.dumps(artifact.certificate, sort_keys=True).encode()).hexdigest()[:8]
    target = store / f"{artifact.id}-{artifact.content_id[:16]}-{certificate}-{form}.zip"
    if target.exists():
        os.utime(target)
        return target
    _sweep()
    beside = store / f".{secrets.token_hex(8)}.tmp"
    try:
        _write_zip(artifact, form, beside)
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)
    return target


def recipe_response(request: HttpRequest, job: Job) -> HttpResponse:
    """The recipe as it runs, complete, as YAML that `python -m engine run` and the studio read."""
    text = parse_recipe(job.recipe).to_yaml()
    return HttpResponse(
        text,
        content_type="application/yaml; charset=utf-8",
        headers={
            "ETag": f'"{job.fingerprint[:32]}"',
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "private, no-cache",
            "Content-Disposition": content_disposition_header(True, f"{file_stem(job)}-recipe.yaml") or "attachment",
        },
    )


def events_response(request: HttpRequest, job: Job) -> StreamingHttpResponse:
    """All events as a table, one line for each optimizer step and each other event."""
    lines = csv_lines(job)
    body = _asynchronous(lines) if isinstance(request, ASGIRequest) else lines
    return StreamingHttpResponse(
        body,
        content_type="text/csv; charset=utf-8",
        headers={
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "private, no-cache",
            "Content-Disposition": content_disposition_header(True, f"{file_stem(job)}-events.csv") or "attachment",
        },
    )


def tensorboard_response(request: HttpRequest, job: Job) -> StreamingHttpResponse:
    """The curves as an event file that TensorBoard opens."""
    pieces = event_file(job)
    # TensorBoard knows an event file by "tfevents" in its name.
    name = f"{file_stem(job)}-events.out.tfevents.{int(job.created.timestamp())}.bonsai"
    return StreamingHttpResponse(
        _asynchronous(pieces) if isinstance(request, ASGIRequest) else pieces,
        content_type="application/octet-stream",
        headers={
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "private, no-cache",
            "Content-Disposition": content_disposition_header(True, name) or "attachment",
        },
    )


def csv_lines(job: Job) -> Iterator[bytes]:
    """The lines of the events table; texts that a spreadsheet would run as a formula are made harmless."""
    yield _csv_line(CSV_HEAD)
    for event in Event.objects.filter(job=job, seq__lte=job.last_seq).order_by("seq").iterator(chunk_size=50):
        moment = datetime.fromtimestamp(event.time, UTC).isoformat(timespec="milliseconds")
        if event.kind == "metric":
            for row in event.data.get("rows", []):
                yield _csv_line(
                    (
                        event.seq,
                        moment,
                        event.kind,
                        row.get("step", event.step),
                        *(row.get(name) for name in METRICS),
                        "",
                        "",
                    )
                )
        else:
            rest = json.dumps(event.data, ensure_ascii=False)
            yield _csv_line(
                (event.seq, moment, event.kind, event.step, *("" for _ in METRICS), event.data.get("message", ""), rest)
            )


def neutral(cell: Any) -> Any:
    """A cell that no spreadsheet runs: text that starts like a formula gets an apostrophe, numbers stay numbers."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell


def file_stem(job: Job) -> str:
    """A file name made from the job's name."""
    return slugify(job.name)[:60] or "result"


def _csv_line(cells: tuple[Any, ...]) -> bytes:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\r\n").writerow([neutral(cell) for cell in cells])
    return buffer.getvalue().encode()


def _span(request: HttpRequest, size: int, etag: str) -> tuple[int, int] | str:
    """The bytes asked for: (first, last), "outside" the file, or "whole" when the request does not ask for one plain range."""
    asked = re.fullmatch(r"bytes=([0-9]{0,19})-([0-9]{0,19})", request.headers.get("Range", ""))
    if asked is None or asked.groups() == ("", "") or request.headers.get("If-Range", etag) != etag:
        return "whole"
    first, last = asked.groups()
    if not first:  # the last n bytes
        return (max(0, size - int(last)), size - 1) if int(last) and size else "outside"
    if last and int(last) < int(first):
        return "whole"
    return (int(first), min(int(last or size), size - 1)) if int(first) < size else "outside"


def _pieces(file: BinaryIO, first: int, length: int) -> Iterator[bytes]:
    with file:
        file.seek(first)
        while length > 0 and (piece := file.read(min(CHUNK, length))):
            length -= len(piece)
            yield piece


async def _asynchronous(pieces: Iterator[bytes]) -> AsyncIterator[bytes]:
    try:
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            yield piece
    finally:
        close = getattr(pieces, "close", None)
        if close is not None:
            await asyncio.to_thread(close)


def _write_zip(artifact: Artifact, form: str, target: Path) -> None:
    folder, root = Path(artifact.folder), f"{file_stem(artifact.job)}-{form}"
    sealed: dict[str, dict[str, Any]] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    with target.open("xb") as raw, zipfile.ZipFile(raw, "w", zipfile.ZIP_STORED) as archive:
        for name, entry in sorted(sealed.items()):
            if name.startswith(f"{form}/"):
                _add(archive, folder / name, f"{root}/{name.removeprefix(f'{form}/')}", entry["sha256"])
        inside = set(archive.namelist())
        for name in BESIDE:
            if (folder / name).is_file() and f"{root}/{name}" not in inside:
                _add(archive, folder / name, f"{root}/{name}", sealed.get(name, {}).get("sha256"))


def _add(archive: zipfile.ZipFile, path: Path, name: str, sha256: str | None) -> None:
    entry = zipfile.ZipInfo(name)  # a fixed date: the same result gives the same archive, byte for byte
    entry.external_attr = 0o644 << 16
    digest = hashlib.sha256()
    try:
        entry.file_size = path.stat().st_size  # tells the archive when it needs the layout for large files
        with path.open("rb") as source, archive.open(entry, "w") as out:
            while piece := source.read(CHUNK):
                digest.update(piece)
                out.write(piece)
    except FileNotFoundError:
        raise _damaged(path.name, "is missing") from None
    if sha256 is not None and digest.hexdigest() != sha256:
        raise _damaged(path.name, "has changed since it was made")


def _damaged(name: str, how: str) -> EngineError:
    return EngineError(
        Fault(
            where=name,
            what="This result is damaged, so it is not handed out.",
            why=f"Its file {name} {how}.",
            way_out="Run the job again; the recipe is kept.",
            code="damaged_artifact",
        ),
        "environment",
    )


def _sweep() -> None:
    """Remove archives that nobody fetched for a week, and what a crash left behind."""
    now = time.time()
    for path in (home() / "jobs").glob("*/downloads/*"):
        age = KEEP_ZIPS_SECONDS if path.suffix == ".zip" else 3600
        try:
            if now - path.stat().st_mtime > age:
                path.unlink()
        except FileNotFoundError:  # another request swept it
            continue
