"""Certificates: a clean process loads an export with the official loaders and compares its logits with those of the trained model."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.core.artifact import MANIFEST, damaged_files
from engine.core.control import write_json
from engine.io.facts import model_facts
from engine.io.tensors import DamagedFile, load_tensors
from engine.train.export import TOLERANCE, load_adapted


def certify(folder: Path) -> dict[str, Any]:
    """Check every form of an artifact and write certificate.json; returns the certificate.

    Each form reports: loader, max_error (largest absolute difference of logits), scale (largest absolute logit of the trained model),
    top1_agreement (share of places where the best answer is the same), ok. Hashes of all files are compared with the manifest first.
    """
    description = json.loads((folder / "artifact.json").read_text(encoding="utf-8"))
    damaged = damaged_files(folder)
    forms: list[dict[str, Any]] = []
    models = {form: layout for form, layout in sorted(description["forms"].items()) if layout in _LOADERS}
    reference: dict[str, Tensor] = {}
    try:
        reference = load_tensors(folder / "reference.safetensors", None) if models else {}
    except DamagedFile as error:
        damaged = sorted({*damaged, "reference.safetensors"})
        forms.append({"form": "reference", "loader": "", "ok": False, "sentence": str(error)})
    tolerance = TOLERANCE[description.get("written_in", description["precision"])]
    for form, layout in models.items() if reference else []:
        forms.append(_check_form(folder, description, form, layout, reference, tolerance))
    ok = (bool(forms) or not models) and not damaged and all(form["ok"] for form in forms)
    sealed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    certificate = {
        "ok": ok,
        "sentence": _sentence(ok, damaged, forms),
        "damaged": damaged,
        "forms": forms,
        "tolerance": tolerance,
        "checked": round(time.time(), 3),
        "content_id": sealed["id"],
        "hashes": {name: entry["sha256"] for name, entry in sealed["files"].items()},
        "num_prompts": sum(tensor.shape[0] for name, tensor in reference.items() if name.endswith("/input_ids")),
        "versions": _versions(),
    }
    write_json(folder / "certificate.json", certificate)
    return certificate


def _check_form(
    folder: Path, description: dict[str, Any], form: str, layout: str, reference: dict[str, Tensor], tolerance: float
) -> dict[str, Any]:
    part = (
        description.get("together") and form != "merged"
    )  # then all adapters are loaded, through the methods' own restore
    loader, name = _LOADERS["bonsai" if part else layout]
    try:
        model = loader(folder, form, description).eval()
        error, scale, same, total = 0.0, 0.0, 0, 0
        for batch, expected in _batches(reference):
            logits = _official_logits(model, batch, description["task"])
            error = max(error, float((logits - expected).abs().max()))
            scale = max(scale, float(expected.abs().max()))
            same += int((logits.argmax(-1) == expected.argmax(-1)).sum())
            total += expected.shape[0]
    except Exception as problem:  # whatever a loader raises is the finding
        return {
            "form": form,
            "loader": name,
            "ok": False,
            "sentence": f"Loading or running it failed: {type(problem).__name__}: {problem}"[:500],
        }
    agreement = same / max(1, total)
    ok = error <= tolerance * max(1.0, scale) and agreement >= (1.0 if tolerance < 1e-3 else 0.97)
    return {
        "form": form,
        "loader": name,
        "max_error": error,
        "scale": scale,
        "top1_agreement": agreement,
        "ok": ok,
        "sentence": f"{name} gives the same best answer at {agreement:.1%} of {total} places; the largest difference is {error:.2g}.",
    }


def _load_merged(folder: Path, form: str, description: dict[str, Any]) -> nn.Module:
    return _auto(description).from_pretrained(
        folder / form, dtype=torch.float32, local_files_only=True, use_safetensors=True
    )


def _load_peft(folder: Path, form: str, description: dict[str, Any]) -> nn.Module:
    from peft import PeftModel

    facts = model_facts(description["base"]["source"], task=description["task"])
    labels = {"num_labels": len(description["data"]["labels"])} if description["task"] == "classify" else {}
    base = _auto(description).from_pretrained(
        facts.path, dtype=torch.float32, local_files_only=True, use_safetensors=True, **labels
    )
    model: nn.Module = PeftModel.from_pretrained(base, folder / form)
    return model


def _load_own(folder: Path, form: str, description: dict[str, Any]) -> nn.Module:
    return load_adapted(folder, description)[0]


_Loader = Callable[[Path, str, dict[str, Any]], nn.Module]
_LOADERS: dict[str, tuple[_Loader, str]] = {
    "transformers": (_load_merged, "transformers"),
    "peft": (_load_peft, "peft"),
    "bonsai": (_load_own, "bonsai"),
}


def _auto(description: dict[str, Any]) -> Any:
    import transformers

    return (
        transformers.AutoModelForSequenceClassification
        if description["task"] == "classify"
        else transformers.AutoModelForCausalLM
    )


def _batches(reference: dict[str, Tensor]) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    for number in sorted({int(name.split("/")[0]) for name in reference}):
        batch = {name.split("/")[1]: value for name, value in reference.items() if name.startswith(f"{number}/")}
        yield batch, batch.pop("logits")


@torch.no_grad()
def _official_logits(model: nn.Module, batch: dict[str, Tensor], task: str) -> Tensor:
    """The plain forward pass of the loaded model, read at the places that the trained model was read at."""
    inputs = {
        key: batch[key] for key in ("input_ids", "attention_mask", "token_type_ids", "position_ids") if key in batch
    }
    logits: Tensor = model(**inputs).logits.float()
    labels = batch["labels"]
    if labels.dim() == 1:  # one label a text
        return logits
    return logits[:, :-1][labels[:, 1:] != -100]


def _sentence(ok: bool, damaged: list[str], forms: list[dict[str, Any]]) -> str:
    if damaged:
        more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
        what = (
            f"{damaged[0]}{more} differ from what was exported"
            if more
            else f"{damaged[0]} differs from what was exported"
        )
        return f"{what}: do not use this copy, download it again or train again."
    bad = next((form for form in forms if not form["ok"]), None)
    if bad is not None:
        return f"The form '{bad['form']}' does not answer like the trained model. {bad['sentence']}"
    if not ok:
        return "Nothing could be checked."
    if not forms:
        return "Every file is exactly as it was written."
    names = [f"'{form['form']}'" for form in forms]
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return f"A clean process loaded {listed} and got the answers of the trained model."


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "peft", "safetensors")}
