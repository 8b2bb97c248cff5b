"""Export: adapter, exact LoRA form, merged model, model card, reference logits; then the folder is sealed and certified."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine import __version__
from engine.client import Engine
from engine.core.artifact import HELDOUT, seal
from engine.core.control import write_json
from engine.core.errors import EngineError, bad_input
from engine.core.events import finite
from engine.core.facts import DataFacts
from engine.core.method import Composition
from engine.core.recipe import Recipe, parse_recipe_text
from engine.core.slots import Slot
from engine.io.facts import model_facts
from engine.io.tensors import load_tensors, save_tensors
from engine.tasks import task as task_named
from engine.tasks.base import Predictor, Task
from engine.train.parts import PartContext, Payload
from engine.train.run import Ending, Run, attach_parts, parts_by_slot
from engine.train.trainables import collect

ARTIFACT = "artifact"
NUM_REFERENCE, NUM_SAMPLES = 32, 6
MOST_HELDOUT, MOST_CHARACTERS = 2000, 600  # examples that are kept one by one, and of each text in them
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-1}


def export(run: Run, ending: Ending, *, certify: bool = True) -> Path:
    """Write the artifact of a finished run beside its place, rename it, certify it, and return its folder."""
    in_full_precision(run)
    used_best = run.load_best()
    final = {key: value for key, value in run.best.items() if key != "step"} if run.best else run.scores
    folder = run.folder / ARTIFACT
    beside = run.folder / f".{ARTIFACT}.tmp"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    _write_reference(run, beside)
    run.model.eval()
    samples = run.answer(NUM_SAMPLES)
    _write_heldout(run, beside)

    forms: dict[str, str] = {}
    several = len(run.slots.parametrizations) > 1
    for suffix, part in zip(_suffixes(run.composition), run.slots.parametrizations, strict=True):
        payload = part.export(run.model)
        if payload is not None:
            forms.update(_write_payload(payload, beside / f"adapter{suffix}", run, f"adapter{suffix}"))
            for name, form in () if several else payload.forms.items():  # alone, each holds one part of the model
                forms.update(_write_payload(form, beside / f"{name}{suffix}", run, f"{name}{suffix}"))
    folded = [part.merge(run.model) for part in run.slots.parametrizations]  # each one, even after a refusal
    merged = all(folded)
    if merged:
        run.task.export_model(run.model.float(), run.tokenizer, run.facts.data, beside / "merged")
        forms["merged"] = "transformers"

    baseline = _baseline(run)
    description = describe(run, ending, final, baseline, samples, forms, used_best)
    write_json(beside / "artifact.json", description)
    (beside / "recipe.yaml").write_text(run.recipe.to_yaml(), encoding="utf-8")
    (beside / "README.md").write_text(model_card(description), encoding="utf-8")
    seal(beside)
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)
    if not certify:
        return folder
    certificate = certify_in_clean_process(folder)
    run.log.emit(
        "artifact",
        {"path": ARTIFACT, "forms": sorted(forms), "certificate": "pass" if certificate.get("ok") else "fail"},
        step=run.clock.step,
    )
    return folder


def in_full_precision(run: Run) -> None:
    """Put what was learned on the base model as it lies on the disk, when a CPU trained in bf16: then nothing that is exported carries the rounding of
    training, and the certificate is as strict as after a run in fp32. A GPU keeps its bf16 model, whose weights mostly lie on the disk like that."""
    if not run.amp or run.device.type != "cpu":
        return
    learned = {name: parameter.detach().clone() for name, parameter in run.trainables.items()}
    states = {name: copy.deepcopy(part.state_dict()) for name, part in run.slots.names.items()}
    facts = run.facts
    del run.model, run.slots, run.trainables, run.optimizer  # never two models at once
    run.model = run.task.load_model(facts.model, facts.data, dtype=torch.float32, seed=run.settings.seed)
    _, run.slots = build_slots(run.recipe, facts, run.task)
    attach_parts(run.slots, run.task, run.model, run.encoded, run.tokenizer, run.recipe)
    for name, part in run.slots.names.items():
        if part in run.slots.parametrizations:
            part.load_state_dict(states[name])
    run.trainables = collect(run.model, run.slots.parametrizations, run.task.fresh(run.model))
    run.trainables.load(learned)
    run.amp = False
    run.sync()


def _suffixes(composition: Composition) -> list[str]:
    """What tells the adapter folders of several parametrizations apart: the slug, and a number where a method stands there twice."""
    slugs = [chosen.slug for chosen in composition.in_slot(Slot.PARAMETRIZATION)]
    if len(slugs) == 1:
        return [""]
    return [
        f"-{slug}" + (f"-{slugs[:place].count(slug) + 1}" if slugs.count(slug) > 1 else "")
        for place, slug in enumerate(slugs)
    ]


def _baseline(run: Run) -> dict[str, Any]:
    def untouched() -> torch.nn.Module:
        facts = run.facts
        model = run.task.load_model(facts.model, facts.data, dtype=torch.float32, seed=run.settings.seed)
        return model.to(run.device)

    with torch.random.fork_rng(devices=[]):
        return run.task.baseline(untouched, run.first_scores, run.encoded, run.tokenizer, run.facts, run.device)


def describe(
    run: Run,
    ending: Ending,
    final: dict[str, Any],
    baseline: dict[str, Any],
    samples: list[dict[str, str]],
    forms: dict[str, str],
    used_best: bool,
) -> dict[str, Any]:
    """The content of artifact.json."""
    facts = run.facts
    return {
        "kind": "model" if "merged" in forms else "adapter",
        "engine": __version__,
        "name": run.recipe.name,
        "task": run.recipe.task,
        "methods": [
            {
                "slug": c.slug,
                "title": c.method.card.title,
                "version": c.method.version,
                "params": c.params.model_dump(mode="json"),
                "default": c.index is None,
            }
            for c in run.composition.chosen
        ],
        "fingerprint": run.recipe.fingerprint(),
        "parents": [facts.model.source],
        "base": {
            "source": facts.model.source,
            "family": facts.model.family,
            "architecture": facts.model.architecture,
            "num_parameters": facts.model.num_parameters,
        },
        "data": {**asdict(facts.data), "num_train": len(run.encoded.train), "num_holdout": len(run.encoded.holdout)},
        "ending": asdict(ending),
        "best_step": run.best.get("step"),
        "used_best": used_best,
        "metrics": final,
        "before": run.first_scores,
        "baseline": baseline,
        "samples": samples,
        "forms": forms,
        "together": len(run.slots.parametrizations) > 1,  # the adapters make the trained model only when all are loaded
        "notes": run.encoded.notes,
        "num_trainable": run.trainables.num_elements(),
        "steps": run.clock.step,
        "seconds": round(run.clock.seconds, 2),
        "tokens": run.clock.tokens,
        "precision": run.settings.precision,
        "written_in": "bf16" if run.amp else "fp32",
        "seed": run.settings.seed,
    }


def model_card(description: dict[str, Any]) -> str:
    """README.md with the YAML head that model hubs read."""
    base, metrics, baseline = description["base"], description["metrics"], description["baseline"]
    methods = ", ".join(m["title"] for m in description["methods"] if not m["default"])
    numbers = "\n".join(
        f"| {key.removeprefix('eval_').replace('_', ' ')} | {value:.4f} | {_number(baseline.get(key))} |"
        for key, value in metrics.items()
        if isinstance(value, float) and key.startswith("eval_")
    )
    head = [
        "---",
        "library_name: transformers",
        f"base_model: {json.dumps(base['source'])}",
        f"pipeline_tag: {'text-classification' if description['task'] == 'classify' else 'text-generation'}",
        "tags: [bonsai-studio]",
        "---",
    ]
    forms = "\n".join(
        f"- `{form}/`: {_FORM_HELP.get(layout, layout)}" for form, layout in sorted(description["forms"].items())
    )
    return "\n".join(
        [
            *head,
            "",
            f"# {description['name'] or 'A model trained with Bonsai Studio'}",
            "",
            f"Trained from `{base['source']}` ({base['num_parameters']:,} parameters) with {methods}. {description['ending']['message']}",
            "",
            f"Learned from {description['data']['num_train']:,} examples; measured on {description['data']['num_holdout']:,} that were kept back. "
            f"{baseline.get('sentence', '')}",
            "",
            "| measure | this model | baseline |",
            "|---|---|---|",
            numbers,
            "",
            "## Files",
            "",
            forms,
            "- `recipe.yaml`: everything needed to train it again",
            "- `certificate.json`: what a clean process found when it loaded these files",
            "",
        ]
    )


_FORM_HELP = {
    "peft": "loads with `peft.PeftModel.from_pretrained` on top of the base model",
    "bonsai": "our own adapter file, `adapter.json` and `adapter.safetensors`",
    "transformers": "a complete model directory that plain transformers loads",
}


def certify_in_clean_process(folder: Path) -> dict[str, Any]:
    """Let a process that never saw the run load the export: a fork of the resident service, or a fresh interpreter."""
    path = folder / "certificate.json"
    service = os.environ.get("BONSAI_ENGINE_SOCKET")
    try:
        if service and Path(service).exists():
            Engine(service, timeout=1800).call("certify", artifact=str(folder))
        else:
            command = [sys.executable, "-m", "engine", "certify", str(folder)]
            subprocess.run(command, cwd=Path(__file__).parents[2], stdout=sys.stderr, timeout=1800, check=False)
    except (EngineError, OSError, subprocess.TimeoutExpired) as error:
        print(f"The certificate could not be made: {error}", file=sys.stderr)
    if not path.exists():
        sentence = "The export could not be loaded in a clean process."
        write_json(path, {"ok": False, "forms": [], "sentence": sentence})
    certificate: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return certificate


def load_predictor(folder: Path) -> Predictor:
    """The predictor of an artifact: from its merged model, or from base and adapter where nothing merges."""
    description = json.loads((folder / "artifact.json").read_text(encoding="utf-8"))
    task, model, tokenizer = load_model_of(folder, description)
    return task.predictor(model, tokenizer, data_facts_of(description))


def load_model_of(folder: Path, description: dict[str, Any]) -> tuple[Task, torch.nn.Module, Any]:
    """(task, model in eval mode, tokenizer) of an artifact that holds a model."""
    task: Task = task_named(description["task"])
    if not description["forms"] or description["kind"] in {"report", "dataset"}:
        raise bad_input(
            "artifact",
            "This result is no model.",
            f"It is a {description['kind'].replace('dataset', 'data set')}.",
            "Ask the result of a training instead.",
            "not_a_model",
        )
    if "merged" in description["forms"]:
        source = model_facts(f"folder:{folder / 'merged'}", task=description["task"])
        facts = data_facts_of(description)
        model = task.load_model(source, facts, dtype=torch.float32, seed=description["seed"])
        return task, model.eval(), task.load_tokenizer(source)
    adapted, tokenizer = load_adapted(folder, description)
    return task, adapted.eval(), tokenizer


def data_facts_of(description: dict[str, Any]) -> DataFacts:
    """The data facts that an artifact remembers."""
    data: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in description["data"].items()
        if key in DataFacts.__dataclass_fields__
    }
    return DataFacts(**data)


def load_adapted(folder: Path, description: dict[str, Any]) -> tuple[torch.nn.Module, Any]:
    """Base model plus our own adapter files, through the methods' own attach and restore."""
    from engine.core.facts import Facts
    from engine.io.facts import machine_facts

    recipe = parse_recipe_text((folder / "recipe.yaml").read_text(encoding="utf-8"))
    task = task_named(recipe.task)
    base, data = model_facts(recipe.model.source, task=recipe.task), data_facts_of(description)
    composition, slots = build_slots(
        recipe, Facts(task=recipe.task, model=base, data=data, machine=machine_facts()), task
    )
    model = task.load_model(base, data, dtype=torch.float32, seed=recipe.settings.seed)
    for part in slots.parametrizations:
        part.attach(model)
    collect(model, slots.parametrizations, task.fresh(model))
    for suffix, part in zip(_suffixes(composition), slots.parametrizations, strict=True):
        path = folder / f"adapter{suffix}"
        part.restore(model, read_payload(path))
        part.sync(model)
    return model, task.load_tokenizer(base)


def build_slots(recipe: Recipe, facts: Any, task: Task) -> tuple[Composition, Any]:
    """Build every part of a recipe that was checked before."""
    from engine.core.compose import compose, refuse

    composition, faults = compose(recipe)
    refuse(faults)
    built: dict[int, Sequence[Any]] = {}
    for place, chosen in enumerate(composition.chosen):
        ctx = PartContext(
            recipe=recipe, facts=facts, task=task, slug=chosen.slug, index=-1 if chosen.index is None else chosen.index
        )
        built[place] = list(chosen.method(chosen.params).parts(ctx))
    return composition, parts_by_slot(composition, built)


def read_payload(folder: Path) -> Payload:
    """Read an adapter folder, ours or peft's."""
    peft = (folder / "adapter_config.json").exists()
    config = json.loads((folder / ("adapter_config.json" if peft else "adapter.json")).read_text(encoding="utf-8"))
    tensors = load_tensors(folder / ("adapter_model.safetensors" if peft else "adapter.safetensors"), None)
    return Payload(layout="peft" if peft else "bonsai", config=config, tensors=tensors)


def _write_payload(payload: Payload, folder: Path, run: Run, name: str) -> dict[str, str]:
    folder.mkdir()
    peft = payload.layout == "peft"
    save_tensors(
        folder / ("adapter_model.safetensors" if peft else "adapter.safetensors"),
        {key: value.detach().cpu().contiguous() for key, value in payload.tensors.items()},
        metadata={"format": "pt"},
    )
    write_json(folder / ("adapter_config.json" if peft else "adapter.json"), payload.config)
    for file, content in payload.files.items():
        write_json(folder / file, content)
    run.tokenizer.save_pretrained(folder)
    return {name: payload.layout}


@torch.no_grad()
def _write_reference(run: Run, folder: Path) -> None:
    """Held-out inputs, the trained model's logits on them, before anything is merged."""
    unpacked = run.recipe.model_copy(update={"settings": run.settings.model_copy(update={"packing": False})})
    tensors: dict[str, Tensor] = {}
    run.model.eval()
    for number, start in enumerate(range(0, min(NUM_REFERENCE, len(run.encoded.holdout)), 8)):
        batch = run.task.collate(run.encoded.holdout[start : start + 8], run.tokenizer, unpacked)
        with run.autocast():
            logits, _ = run.task.forward_logits(run.model, {key: value.to(run.device) for key, value in batch.items()})
        tensors.update({f"{number}/{key}": value for key, value in batch.items()})
        tensors[f"{number}/logits"] = logits.float().cpu()
    save_tensors(folder / "reference.safetensors", tensors)


def _write_heldout(run: Run, folder: Path) -> None:
    """How each held-out example fares: what two runs on the same data are compared by."""
    run.model.eval()
    kept = slice(0, MOST_HELDOUT)
    encoded = replace(run.encoded, holdout=run.encoded.holdout[kept], holdout_rows=run.encoded.holdout_rows[kept])
    with torch.random.fork_rng(devices=[]), run.autocast():
        found = run.task.judged(run.model, encoded, run.tokenizer, run.recipe, run.device)
    for item in found:
        item |= {key: value[:MOST_CHARACTERS] for key, value in item.items() if isinstance(value, str)}
    write_json(folder / HELDOUT, finite(found))


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "–"
