"""Results: what came out of a run, how good it is, trying it, and taking it home."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from django.contrib import messages
from django.contrib.auth.decorators import login_required
from django.core.paginator import Paginator
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.shortcuts import get_object_or_404, render
from django.urls import reverse
from django.views.decorators.http import require_GET, require_POST

from jobs import downloads
from jobs.access import artifacts_for, may_change
from jobs.catalogue import engine
from jobs.models import Artifact
from jobs.plain import Refused, faults_of
from studio.pages import garden, telling
from studio.pages.report import report_of
from studio.pages.verdict import rows, verdict

RESULTS_A_PAGE = 20
MAX_CHARS = 20_000
PREDICT_SECONDS = 120.0
SERVE_SECONDS = 110.0
MAX_TEXTS = 64
SERVING = "predict"  # the role of methods that stand between a result and those who ask it
CERTIFY_SECONDS = 1800.0
LENGTHS = {"short": ("A sentence", 40), "medium": ("A paragraph", 120), "long": ("A page", 400)}
DARING = {"plain": ("Always the likeliest word", 0.0), "free": ("With some surprise", 0.8)}
LAYOUTS = {
    "transformers": ("Ready to use", "The whole model with what it has learned folded in. Any program that reads transformers models loads it."),
    "peft": ("Small add-on (LoRA)", "Only what was learned, in the form that peft reads. It is used together with the model it was learned on."),
    "jsonl": ("The rows", "A data set with one JSON object a line. It can be chosen as data of a new run, or opened by any program."),
    "delta": ("Only the changes", "What differs from the base model, packed small. It is used together with that very model."),
    "bonsai": ("What was learned, exactly", "The numbers that changed, in the studio's own form. For keeping, and for going on in the studio."),
}  # fmt: skip
ORDER = ("transformers", "peft", "bonsai", "delta", "jsonl")


@login_required
@require_GET
def results(request: HttpRequest) -> HttpResponse:
    """Everything that runs have made, the newest first."""
    found = artifacts_for(request.user).select_related("job__model", "job__dataset").defer("files").order_by("-created")
    page = Paginator(found, RESULTS_A_PAGE).get_page(request.GET.get("page"))
    shown = [
        {"artifact": row, "job": row.job, "verdict": verdict(row.description), "methods": telling.leading(row.job)}
        for row in page.object_list
    ]
    return render(request, "results/list.html", {"page": page, "rows": shown})


@login_required
@require_GET
def result(request: HttpRequest, pk: uuid.UUID) -> HttpResponse:
    """One result, its verdict first."""
    return _show(request, _visible(request, pk))


@login_required
@require_POST
def result_predict(request: HttpRequest, pk: uuid.UUID) -> HttpResponse:
    """Ask the trained model something, and show what it says."""
    artifact = _visible(request, pk)
    text = request.POST.get("text", "").strip()
    answered = {"text": text, **_ask(artifact, text, request.POST)}
    if request.headers.get("HX-Request"):
        return render(request, "results/answer.html", {"answered": answered, "artifact": artifact})
    return _show(request, artifact, answered)


@login_required
@require_POST
def result_serve(request: HttpRequest, pk: uuid.UUID) -> HttpResponse:
    """Ask many texts at once through a method that goes on learning while it answers; or undo what it learned."""
    artifact = _visible(request, pk)
    served = _serve(request, artifact)
    if request.headers.get("HX-Request"):
        return render(request, "results/serving.html", {"served": served, "artifact": artifact})
    return _show(request, artifact, served=served)


@login_required
@require_POST
def result_check(request: HttpRequest, pk: uuid.UUID) -> HttpResponse:
    """Check the exported files once more, in a clean process, and keep what it found."""
    artifact = _visible(request, pk)
    problem = "" if may_change(request.user, artifact.job.owner_id) else "This result belongs to somebody else."
    if not problem:
        try:
            answer = engine(timeout=CERTIFY_SECONDS).call("certify", artifact=artifact.folder)
        except Refused as error:
            problem = " ".join(
                str(part) for fault in faults_of(error)[:1] for part in (fault["what"], fault["why"], fault["way_out"])
            )
        else:
            artifact.certificate = answer["certificate"]
            artifact.save(update_fields=["certificate"])
    if request.headers.get("HX-Request"):
        return render(
            request,
            "results/certificate.html",
            {**_certificate(artifact), "artifact": artifact, "problem": problem, "checked_now": True},
        )
    if problem:
        messages.warning(request, problem)
    else:
        messages.success(request, artifact.certificate["sentence"])
    return HttpResponseRedirect(reverse("result", args=[artifact.pk]))


def _visible(request: HttpRequest, pk: uuid.UUID) -> Artifact:
    rows_of_person = artifacts_for(request.user).select_related("job__dataset", "job__model", "job__again_of")
    return get_object_or_404(rows_of_person, pk=pk)


def _show(
    request: HttpRequest,
    artifact: Artifact,
    answered: Mapping[str, Any] | None = None,
    served: Mapping[str, Any] | None = None,
) -> HttpResponse:
    job, description = artifact.job, artifact.description
    failed = any(found and found.get("faults") for found in (answered, served))
    return render(request, "results/result.html", {
        "artifact": artifact, "job": job, "about": description, "verdict": verdict(description), "measures": rows(description),
        "same_before": (description.get("before") or {}).get("eval_loss") == (description.get("baseline") or {}).get("eval_loss"),
        "lead": telling.lead(job), "model": telling.model_name(job), "methods": telling.methods(job), "writes": _writes(description),
        "samples": (description.get("samples") or [])[:6], "lengths": LENGTHS, "daring": DARING, "answered": answered,
        "ways": _ways(request, artifact), "served": served, "answers": _answers(description), "report": report_of(description), "learns": telling.learns(job),
        "forms": _forms(request, artifact), "rest": _rest(request, artifact), **_certificate(artifact),
    }, status=422 if failed else 200)  # fmt: skip


# -- trying it ---------------------------------------------------------------------------------------------------------------------


def _answers(description: Mapping[str, Any]) -> bool:
    """Whether it is a model that can be asked something."""
    return any(layout in ("transformers", "peft", "bonsai") for layout in (description.get("forms") or {}).values())


def _writes(description: Mapping[str, Any]) -> bool:
    """Whether it answers with text; otherwise it chooses one of its labels."""
    return not (description.get("data") or {}).get("labels")


def _ask(artifact: Artifact, text: str, form: Mapping[str, Any]) -> dict[str, Any]:
    """The answer, ready for the page: labels with their shares, or a text; or the faults."""
    if not text:
        return _fault("There is nothing to read.", "The field is empty.", "Write a text, or take one of the examples.")
    if len(text) > MAX_CHARS:
        return _fault(
            "This text is too long.",
            f"It has {len(text):,} characters; {MAX_CHARS:,} are allowed.",
            "Try a shorter piece of it.",
        )
    if not Path(artifact.folder).is_dir():
        return _fault(
            "The files of this result are gone.",
            "They were deleted from the disk.",
            "Run it again; the recipe is kept.",
        )
    options: dict[str, Any] = {}
    if _writes(artifact.description):
        options = {
            "max_new_tokens": LENGTHS.get(form.get("length", ""), LENGTHS["medium"])[1],
            "temperature": DARING.get(form.get("daring", ""), DARING["plain"])[1],
        }
    try:
        found = engine(timeout=PREDICT_SECONDS).call(
            "predict", artifact=artifact.folder, inputs=[text], options=options
        )
    except Refused as error:
        return {"faults": faults_of(error)}
    answer = found["answers"][0]
    if "scores" in answer:
        scores = sorted(answer["scores"], key=lambda score: -score["score"])
        return {
            "label": answer["label"],
            "score": answer["score"],
            "scores": scores[:6],
            "more": max(0, len(scores) - 6),
            "sure": _sure(answer["score"]),
        }
    return {"said": answer.get("text", ""), "num_tokens": answer.get("num_tokens"), "cut": answer.get("ended") is False}


def _ways(request: HttpRequest, artifact: Artifact) -> list[garden.Plant]:
    """Methods through which this result could answer; only its owner may let it learn."""
    if not (_answers(artifact.description) and may_change(request.user, artifact.job.owner_id)):
        return []
    task = str(artifact.description.get("task", ""))
    offered = [garden.Plant(card) for card in telling.known().get("methods", []) if card["role"] == SERVING]
    return [plant for plant in offered if plant.suits(task)]


def _serve(request: HttpRequest, artifact: Artifact) -> dict[str, Any]:
    """Answers with what was learned, ready for the page; or the faults."""
    way = next((plant for plant in _ways(request, artifact) if plant.slug == request.POST.get("way")), None)
    if way is None:
        return _fault(
            "This way of answering is not to be had.",
            "It does not fit this result, or the result is somebody else's.",
            "Ask it as it is.",
        )
    texts = [line.strip() for line in request.POST.get("texts", "").splitlines() if line.strip()]
    undo = {"last": "last", "forget": "all"}.get(request.POST.get("go", ""))
    if undo:
        texts = []
    elif not texts or len(texts) > MAX_TEXTS or sum(map(len, texts)) > MAX_CHARS:
        return _fault(
            f"There are {len(texts)} texts.", f"From 1 to {MAX_TEXTS} are possible at once, with {MAX_CHARS:,} characters together.",
            "Write each text on a line of its own.",
        )  # fmt: skip
    asked: dict[str, Any] = {
        "method": {"slug": way.slug},
        "session": str(downloads.serving_folder(artifact, way.slug)),
        "inputs": texts,
    }
    if undo:
        asked["undo"] = undo
    try:
        found = engine(timeout=SERVE_SECONDS).call("predict", artifact=artifact.folder, **asked)
    except Refused as error:
        return {"faults": faults_of(error)}
    answers = [{"text": text, **answer} for text, answer in zip(texts, found["answers"], strict=True)]
    return {"answers": answers, "status": found["serving"], "undone": undo, "way": way}


def _fault(what: str, why: str, way_out: str) -> dict[str, Any]:
    return {"faults": [{"where": "text", "what": what, "why": why, "way_out": way_out, "code": "bad_text"}]}


def _sure(score: float) -> str:
    return (
        "It is quite sure."
        if score >= 0.9
        else "It is fairly sure."
        if score >= 0.6
        else "It is not sure; look at the others too."
    )


# -- the certificate -----------------------------------------------------------------------------------------------------------------


def _certificate(artifact: Artifact) -> dict[str, Any]:
    found = artifact.certificate or {}
    forms = []
    for form in found.get("forms", []):
        layout = _layout(artifact, form.get("form", ""))
        forms.append({**form, "title": LAYOUTS[layout][0] if layout else form.get("form", "")})
    return {
        "certificate": found,
        "checked_forms": forms,
        "state_of_check": "none" if not found else "good" if found.get("ok") else "bad",
    }


def _layout(artifact: Artifact, form: str) -> str:
    layout = str((artifact.description.get("forms") or {}).get(form, ""))
    return layout if layout in LAYOUTS else ""


# -- taking it home ------------------------------------------------------------------------------------------------------------------


def _forms(request: HttpRequest, artifact: Artifact) -> list[dict[str, Any]]:
    """Each form with its size, what it is for, and the lines that load it."""
    found = []
    for form in downloads.forms_of(artifact):
        layout = _layout(artifact, form)
        title, sentence = LAYOUTS.get(layout, (telling.capital(form), ""))
        inside = sum(entry.get("bytes", 0) for name, entry in artifact.files.items() if name.startswith(f"{form}/"))
        found.append({
            "form": form, "layout": layout, "title": title, "sentence": sentence, "bytes": inside, "code": _code(artifact, form, layout),
            "href": f"/api/v1/artifacts/{artifact.pk}/download/{form}",
        })  # fmt: skip
    return sorted(
        found, key=lambda one: (ORDER.index(one["layout"]) if one["layout"] in ORDER else len(ORDER), one["form"])
    )


def _code(artifact: Artifact, form: str, layout: str) -> str:
    """Python that loads the unpacked folder; what the person called the run only ever stands inside a string."""
    folder = f"{downloads.file_stem(artifact.job)}-{form}"
    labels = (artifact.description.get("data") or {}).get("labels") or []
    head, pipe = (
        ("AutoModelForSequenceClassification", "text-classification")
        if labels
        else ("AutoModelForCausalLM", "text-generation")
    )
    if layout == "transformers":
        return f'from transformers import pipeline\n\nmodel = pipeline("{pipe}", model="{folder}")\nprint(model("Write a text here"))'
    if layout == "peft":
        scheme, _, name = str((artifact.description.get("base") or {}).get("source", "")).partition(":")
        base = f'"{name}"' if scheme == "hub" else '"base-model"'
        sized = f", num_labels={len(labels)}" if labels else ""
        hint = "" if scheme == "hub" else "  # the folder of the model it was learned on"
        return (
            f"from peft import PeftModel\nfrom transformers import AutoTokenizer, {head}\n\n"
            f"base = {head}.from_pretrained({base}{sized}){hint}\n"
            f'model = PeftModel.from_pretrained(base, "{folder}")\ntokenizer = AutoTokenizer.from_pretrained("{folder}")'
        )
    if layout == "bonsai":
        return f'from safetensors.torch import load_file\n\nlearned = load_file("{folder}/adapter.safetensors")'
    return ""


def _rest(request: HttpRequest, artifact: Artifact) -> str:
    """How a program asks the same model: one line for a shell."""
    address = request.build_absolute_uri(f"/api/v1/artifacts/{artifact.pk}/predict")
    body = '{"inputs": ["Write a text here"]}'
    return f"curl {address} \\\n  -H \"Authorization: Bearer $BONSAI_TOKEN\" \\\n  -H 'Content-Type: application/json' \\\n  -d '{body}'"
