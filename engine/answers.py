"""What the engine answers to each call; who answers, the resident process, a fork of it or a fresh one, is decided elsewhere."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine import __version__
from engine.core.errors import EngineError, Fault, RecipeError
from engine.core.method import TrainMethod
from engine.core.recipe import TrainSettings, parse_recipe
from engine.core.registry import catalogue
from engine.core.slots import Slot

Answer = dict[str, Any]


def answer_catalogue(request: Answer) -> Answer:
    """Everything a form or a page needs to know about methods, goals and settings."""
    from engine.io.facts import starter_models
    from engine.tasks import tasks

    return {
        "version": __version__,
        "methods": [method.describe() for method in catalogue().values()],
        "tasks": [
            {
                "name": t.name,
                "title": t.title,
                "sentence": t.sentence,
                "data_shapes": list(t.data_shapes),
                "roles": list(t.roles),
                "model_kinds": list(t.model_kinds),
            }
            for t in tasks().values()
        ],
        "settings": TrainSettings.model_json_schema(),
        "slots": [
            {"name": slot.value, "title": slot.words, "arity": slot.arity.value, "law": slot.law} for slot in Slot
        ],
        "models": starter_models(),
    }


def answer_ping(request: Answer) -> Answer:
    """Who is answering."""
    return {
        "pid": os.getpid(),
        "version": __version__,
        "num_train_methods": sum(issubclass(m, TrainMethod) for m in catalogue().values()),
    }


def answer_device(request: Answer) -> Answer:
    """The device that a run would use."""
    from dataclasses import asdict

    from engine.io.facts import machine_facts

    return {"device": asdict(machine_facts())}


def answer_check(request: Answer) -> Answer:
    """What a recipe would do, or everything that is wrong with it."""
    from engine.ops.check import check

    return check(parse_recipe(request.get("recipe"))).to_dict()


def answer_model_facts(request: Answer) -> Answer:
    """What the files of a model tell, without its weights."""
    from dataclasses import asdict

    from engine.io.facts import model_facts

    facts = asdict(model_facts(str(request.get("source")), task=request.get("task")))
    return {"facts": {key: value for key, value in facts.items() if key not in {"tensors", "linears"}}}


def answer_predict(request: Answer) -> Answer:
    """Ask the result of a run, as it is or through a method that stands between."""
    from engine.ops.serve import serve
    from engine.train.export import load_predictor

    artifact = Path(str(request["artifact"]))
    inputs, options = request.get("inputs", []), request.get("options", {})
    if request.get("method"):
        return serve(
            artifact,
            inputs,
            options,
            method=request["method"],
            session=Path(str(request["session"])),
            undo=request.get("undo"),
        )
    return {"answers": load_predictor(artifact).predict(inputs, **options)}


def answer_certify(request: Answer) -> Answer:
    """Load an export again with the official loaders and compare."""
    from engine.train.certificate import certify

    return {"certificate": certify(Path(str(request["artifact"])))}


def answer_compare(request: Answer) -> Answer:
    """The held-out scores and answers of several results, side by side."""
    from engine.ops.compare import compare

    return compare([Path(str(folder)) if folder else None for folder in request.get("artifacts", [])])


HERE: dict[str, Callable[[Answer], Answer]] = {"ping": answer_ping, "catalogue": answer_catalogue}
FORKED: dict[str, Callable[[Answer], Answer]] = {
    "check": answer_check,
    "model_facts": answer_model_facts,
    "predict": answer_predict,
    "certify": answer_certify,
    "compare": answer_compare,
    "device": answer_device,
}


def answer(request: Any) -> Answer:
    """Answer one request in this process, faults included."""
    try:
        name = str(request.get("call")) if isinstance(request, dict) else ""
        handler = HERE.get(name) or FORKED.get(name)
        if handler is None:
            raise EngineError(
                Fault(
                    where="call",
                    what=f"There is no call '{name}'.",
                    why="The engine does not know it.",
                    way_out=f"Use one of: {', '.join([*HERE, *FORKED, 'launch'])}.",
                    code="unknown_call",
                )
            )
        return {"ok": True, **handler(request)}
    except RecipeError as error:
        return {"ok": False, "reason": "bad_input", "faults": [fault.to_dict() for fault in error.faults]}
    except EngineError as error:
        return {"ok": False, "reason": error.reason, "faults": [error.fault.to_dict()]}
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        return {
            "ok": False,
            "reason": "bug",
            "faults": [
                Fault(
                    where="engine",
                    what="The engine met a fault of its own.",
                    why=f"{type(error).__name__}: {str(error)[:300]}",
                    way_out="Try again; if it happens twice, report it.",
                    code="bug",
                ).to_dict()
            ],
        }


def encode(body: Answer) -> bytes:
    """One answer as a line of JSON."""
    return json.dumps(body, allow_nan=False, ensure_ascii=False, separators=(",", ":"), default=str).encode() + b"\n"
