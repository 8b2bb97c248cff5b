"""Models: what a run can start from."""

from __future__ import annotations

from django import forms
from django.contrib import messages
from django.contrib.auth.decorators import login_required
from django.db.models import Count
from django.http import HttpResponse, HttpResponseForbidden, HttpResponseRedirect
from django.shortcuts import get_object_or_404, render
from django.urls import reverse
from django.views.decorators.http import require_GET, require_http_methods

from jobs import plain
from jobs.access import is_staff, models_for
from jobs.catalogue import engine
from jobs.models import ModelEntry
from studio.pages import garden, words
from studio.pages.asking import PageRequest

KINDS = {"encoder": "Reads texts", "decoder": "Writes texts", "encoder-decoder": "Turns one text into another"}


class ModelForm(forms.Form):
    """A model that staff offers to everyone."""

    place = forms.ChoiceField(choices=[("folder", "A folder on this machine"), ("hub", "The Hugging Face hub")])
    address = forms.CharField(max_length=900, strip=True)
    name = forms.CharField(max_length=200, strip=True)
    sentence = forms.CharField(max_length=400, required=False, strip=True)


@login_required
@require_http_methods(["GET", "POST"])
def models(request: PageRequest) -> HttpResponse:
    """The list of models; staff adds to it."""
    form = ModelForm()
    faults: list[dict[str, str]] = []
    if request.method == "POST":
        if not is_staff(request.user):
            return HttpResponseForbidden(
                "Only staff may offer models, because everyone here can start from them.", content_type="text/plain"
            )
        form = ModelForm(request.POST)
        row, faults = _add(form)
        if row is not None:
            messages.success(request, f"“{row.name}” can now be chosen for new runs.")
            return HttpResponseRedirect(reverse("model", args=[row.pk]))
    rows = list(models_for(request.user).defer("facts"))
    return render(request, "pages/models.html", {
        "rows": rows, "kinds": KINDS, "form": form, "faults": faults, "staff": is_staff(request.user),
        "goals": {kind: [goal["title"] for goal in garden.goals() if kind in goal["model_kinds"]] for kind in KINDS},
    }, status=422 if faults else 200)  # fmt: skip


def _add(form: ModelForm) -> tuple[ModelEntry | None, list[dict[str, str]]]:
    if not form.is_valid():
        return None, [{"where": name, "what": f"“{name.capitalize()}” is not filled in.", "why": str(errors[0]), "way_out": ""}
                      for name, errors in form.errors.items()]  # fmt: skip
    asked = form.cleaned_data
    source = f"{asked['place']}:{asked['address']}"
    if ModelEntry.objects.filter(source=source, owner=None).exists():
        return None, [{"where": "address", "what": "This model is offered already.", "why": "Another entry has the same source.",
                       "way_out": "Use that entry."}]  # fmt: skip
    try:
        facts = engine().call("model_facts", source=source)["facts"]
    except plain.Refused as error:
        return None, plain.faults_of(error)
    row = ModelEntry.objects.create(
        name=asked["name"], source=source, sentence=asked["sentence"], kind=facts["kind"], family=facts["family"],
        num_parameters=facts["num_parameters"], facts=facts,
    )  # fmt: skip
    return row, []


@login_required
@require_GET
def model(request: PageRequest, pk: str) -> HttpResponse:
    """One model: what it is, what it can learn, who used it."""
    row = get_object_or_404(models_for(request.user).annotate(num_runs=Count("jobs")), pk=pk)
    facts = row.facts or {}
    shown = [
        ("What it does", KINDS.get(row.kind, row.kind)), ("Family", row.family), ("Layers", facts.get("num_layers")),
        ("Width", facts.get("hidden_size")), ("Words it knows", facts.get("vocab_size")), ("Longest text", facts.get("max_positions")),
        ("Number format", facts.get("dtype")), ("Ready for conversations", "Yes" if facts.get("has_chat_template") else "No, a plain layout is used"),
    ]  # fmt: skip
    return render(request, "pages/model.html", {
        "model": row, "facts": [(name, words.number(value) if isinstance(value, int) else value) for name, value in shown if value],
        "goals": [goal for goal in garden.goals() if row.kind in goal["model_kinds"]],
        "runs": row.jobs.filter(owner=request.user).order_by("-created")[:5], "staff": is_staff(request.user),
    })  # fmt: skip
