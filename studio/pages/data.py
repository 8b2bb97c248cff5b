"""Data: upload, look, say which column is which, delete."""

from __future__ import annotations

from typing import Any

from django.contrib import messages
from django.contrib.auth.decorators import login_required
from django.db.models import Count
from django.http import HttpResponse, HttpResponseRedirect, JsonResponse
from django.shortcuts import get_object_or_404, render
from django.urls import reverse
from django.views.decorators.http import require_GET, require_http_methods, require_POST

from jobs import datasets, plain
from jobs.access import datasets_for, may_change
from jobs.limits import in_words
from jobs.models import Dataset
from studio.pages import garden, words
from studio.pages.asking import PageRequest

FORMATS = "CSV, TSV, JSON, JSONL, Parquet or plain text"
LEVELS = {"error": "error", "warning": "warn", "note": "info"}


@login_required
@require_http_methods(["GET", "POST"])
def data(request: PageRequest) -> HttpResponse:
    """The list of data sets, and the place to drop a new one."""
    faults: list[dict[str, str]] = []
    if request.method == "POST":
        stored, faults = _store(request)
        wants_json = "application/json" in request.headers.get("Accept", "")
        if stored is not None:
            address = reverse("dataset", args=[stored.pk])
            return JsonResponse({"next": address}, status=201) if wants_json else HttpResponseRedirect(address)
        if wants_json:
            return JsonResponse({"faults": faults}, status=422)
    visible = datasets_for(request.user).annotate(num_runs=Count("jobs")).defer("preview", "findings", "facts")
    rows = sorted(visible, key=lambda row: row.owner_id is None)  # one's own first; each part newest first
    room = datasets.usage(request.user)
    return render(request, "pages/data.html", {
        "rows": rows, "own": [row for row in rows if row.owner_id == request.user.pk], "faults": faults, "formats": FORMATS,
        "largest": in_words(room["max_upload_bytes"]), "used": in_words(room["bytes"]), "quota": in_words(room["quota_bytes"]),
        "titles": {shape["name"]: shape["title"] for shape in plain.shapes()},
    }, status=422 if faults else 200)  # fmt: skip


def _store(request: PageRequest) -> tuple[Dataset | None, list[dict[str, str]]]:
    file = request.FILES.get("file")
    if file is None:
        return None, [{"where": "file", "what": "No file came with the form.", "why": "Nothing was chosen.",
                       "way_out": "Choose a file, or drop it on the box.", "code": "no_file"}]  # fmt: skip
    try:
        return datasets.store(request.user, file.name or "data", file.chunks()), []
    except plain.Refused as error:
        return None, plain.faults_of(error)


@login_required
@require_GET
def dataset(request: PageRequest, pk: str) -> HttpResponse:
    """One data set: what we think it is, how the model will see it, what was noticed."""
    row = get_object_or_404(datasets_for(request.user).annotate(num_runs=Count("jobs")), pk=pk)
    return _show(request, row)


def _show(request: PageRequest, row: Dataset, faults: list[dict[str, str]] | None = None) -> HttpResponse:
    seen = plain.rows_as_learned(row)
    facts: dict[str, Any] = row.facts or {}
    counts = sorted(zip(facts.get("labels") or [], facts.get("label_counts") or []), key=lambda pair: -pair[1])
    findings = [{**found, "icon": LEVELS.get(found.get("level", ""), "info")} for found in row.findings]
    fitting = [goal for goal in garden.goals() if row.shape in goal["data_shapes"]]
    return render(request, "pages/dataset.html", {
        "dataset": row, "title": plain.shape_title(row.shape), "rows": seen, "facts": facts, "findings": findings,
        "counts": counts[:12], "more_labels": max(0, len(counts) - 12), "most": counts[0][1] if counts else 0,
        "raw_rows": [[_cell(raw.get(column)) for column in row.columns] for raw in row.preview[:8]],
        "mine": may_change(request.user, row.owner_id), "shapes": _mapping_form(row), "faults": faults or [],
        "goals": fitting, "open_mapping": bool(faults) or "map" in request.GET,
        "running": row.jobs.filter(owner=request.user).order_by("-created")[:5] if getattr(row, "num_runs", 1) else [],
        "sentence": _sentence(row, counts),
    }, status=422 if faults else 200)  # fmt: skip


def _cell(value: Any) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= 160 else text[:159] + "…"


def _sentence(row: Dataset, counts: list[tuple[str, int]]) -> str:
    """What the data set is, in one sentence."""
    rows = words.count(row.num_rows, "row")
    if counts:
        return f"{rows}, each a text with one of {words.count(len(counts), 'label')}."
    return {
        "messages": f"{words.count(row.num_rows, 'conversation')} between a person and an assistant.",
        "instruction": f"{words.count(row.num_rows, 'request')}, each with the answer that is wanted.",
        "problems": f"{words.count(row.num_rows, 'problem')}, each with an answer that can be checked.",
        "preferences": f"{words.count(row.num_rows, 'question')}, each with a better and a worse answer.",
        "text": f"{words.count(row.num_rows, 'text')} to go on writing like.",
    }.get(row.shape, f"{rows}, and it is not clear yet what is to be learned from them.")


ROLE_WORDS = {
    "text": "The text to read", "label": "The label to learn", "messages": "The conversation", "instruction": "What is asked",
    "input": "What comes with the question", "output": "The answer to learn", "system": "The general instruction",
    "question": "The problem", "answer": "The answer to check against", "hint": "A hint that does not give the answer away",
    "solution": "A worked solution", "prompt": "What is asked", "chosen": "The better answer", "rejected": "The worse answer",
}  # fmt: skip


def _mapping_form(row: Dataset) -> list[dict[str, Any]]:
    """Shapes with their roles, each with the column that plays it now."""
    return [
        {**shape, "chosen": shape["name"] == row.shape, "fields": [
            {"role": role, "label": ROLE_WORDS.get(role, role), "column": row.mapping.get(role, ""), "needed": role in shape["roles"],
             "identifier": f"role-{shape['name']}-{role}"}
            for role in (*shape["roles"], *shape["optional"])
        ]}
        for shape in plain.shapes()
    ]  # fmt: skip


@login_required
@require_POST
def dataset_mapping(request: PageRequest, pk: str) -> HttpResponse:
    """Change which column plays which role."""
    row = get_object_or_404(datasets_for(request.user), pk=pk, owner=request.user)
    shape = next((shape for shape in plain.shapes() if shape["name"] == request.POST.get("shape")), None)
    if shape is None:
        return _show(
            request,
            row,
            [_fault("Say first what each row is.", "The columns follow from it.", "Choose one of the kinds.")],
        )
    mapping = {role: request.POST.get(f"{shape['name']}.{role}", "") for role in (*shape["roles"], *shape["optional"])}
    missing = [ROLE_WORDS.get(role, role).lower() for role in shape["roles"] if not mapping[role]]
    if missing:
        return _show(
            request,
            row,
            [
                _fault(
                    f"No column is chosen for {words.spoken(missing)}.",
                    f"“{shape['title']}” needs it.",
                    "Choose a column.",
                )
            ],
        )
    try:
        datasets.change_mapping(row, {role: column for role, column in mapping.items() if column})
    except plain.Refused as error:
        return _show(request, row, plain.faults_of(error))
    messages.success(request, "Noted. This is how the model will see your data from now on.")
    return HttpResponseRedirect(reverse("dataset", args=[row.pk]))


@login_required
@require_POST
def dataset_delete(request: PageRequest, pk: str) -> HttpResponse:
    """Delete a data set that no unfinished run needs."""
    row = get_object_or_404(datasets_for(request.user), pk=pk)
    if not may_change(request.user, row.owner_id):
        return _show(
            request,
            row,
            [_fault("This data set is not yours to delete.", "It comes with the studio.", "Leave it where it is.")],
        )
    name = row.name
    try:
        datasets.delete(row)
    except plain.Refused as error:
        return _show(request, row, plain.faults_of(error))
    messages.success(request, f"“{name}” is deleted.")
    return HttpResponseRedirect(reverse("data"))


def _fault(what: str, why: str, way_out: str) -> dict[str, str]:
    return {"where": "mapping", "what": what, "why": why, "way_out": way_out, "code": "mapping"}
