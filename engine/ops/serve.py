"""Answering through a method that stands between a result and those who ask it, with a state that lives on between requests.

A session is a folder beside the artifact, which itself never changes:
    state.safetensors, state.json      what was learned while serving
    before.safetensors, before.json    the same, one request earlier: the way back
    lock                               one request at a time
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.core.compose_work import predict_method
from engine.core.control import write_json
from engine.core.errors import bad_input
from engine.io.tensors import load_tensors, save_tensors
from engine.train.checkpoint import join_state, split_state
from engine.train.export import data_facts_of, load_model_of
from engine.train.run import seed_everything

STATE, BEFORE = "state", "before"


def serve(
    artifact: Path,
    inputs: Sequence[Any],
    options: Mapping[str, Any],
    *,
    method: Mapping[str, Any],
    session: Path,
    undo: str | None = None,
) -> dict[str, Any]:
    """{"answers": […], "serving": {numbers about what was learned}}.

    method: {"slug", "params"} of a PredictMethod; session: the folder of its state; undo: "all" forgets everything that was learned while
    serving, "last" what the last request taught. The state is written when the answers are complete: a request that fails teaches nothing.
    """
    chosen = predict_method(method)
    description = json.loads((artifact / "artifact.json").read_text(encoding="utf-8"))
    session.mkdir(parents=True, exist_ok=True)
    with _alone(session):
        if undo == "all":
            _forget(session)
        elif undo == "last":
            _step_back(session)
        task, model, tokenizer = load_model_of(artifact, description)
        if chosen.needs.tasks and task.name not in chosen.needs.tasks:
            raise bad_input(
                "method",
                f"{chosen.card.title} cannot serve this result.",
                f"It is made for the goal {' or '.join(chosen.needs.tasks)}, and this result is for {task.name}.",
                "Ask the result as it is.",
                "does_not_fit",
            )
        params, faults = chosen.parse(dict(method.get("params") or {}), "method.params")
        if faults:
            from engine.core.errors import RecipeError

            raise RecipeError(faults)
        seed_everything(int(description["seed"]))
        predictor = chosen(params).predictor(model, tokenizer, data_facts_of(description), task)
        stamp = {
            "artifact": json.loads((artifact / "manifest.json").read_text())["id"],
            "params": params.model_dump(mode="json"),
        }
        _load(predictor, session, stamp)
        answers = predictor.predict(inputs, **options) if inputs else []
        if inputs:
            _save(predictor, session, stamp)
        return {"answers": answers, "serving": predictor.status()}


def _load(predictor: Any, session: Path, stamp: Mapping[str, Any]) -> None:
    path = session / f"{STATE}.json"
    if not path.exists():
        return
    values = json.loads(path.read_text(encoding="utf-8"))
    if values["stamp"] != stamp:
        raise bad_input(
            "method.params",
            "What was learned so far belongs to other settings.",
            "A state can only go on with the settings, and the result, that it began with.",
            "Ask with the settings from before, or forget what was learned first.",
            "other_state",
        )
    tensors = load_tensors(session / f"{STATE}.safetensors", values["hashes"])
    predictor.load_state_dict(join_state("serving", tensors, values["values"]))


def _save(predictor: Any, session: Path, stamp: Mapping[str, Any]) -> None:
    tensors, values = split_state("serving", predictor.state_dict())
    beside = session / "next.safetensors"
    hashes = save_tensors(beside, {name: value.detach().cpu().contiguous() for name, value in tensors.items()})
    if (session / f"{STATE}.json").exists():
        (session / f"{STATE}.safetensors").replace(session / f"{BEFORE}.safetensors")
        (session / f"{STATE}.json").replace(session / f"{BEFORE}.json")
    else:
        for name in (f"{BEFORE}.json", f"{BEFORE}.safetensors"):
            (session / name).unlink(missing_ok=True)
    beside.replace(session / f"{STATE}.safetensors")
    write_json(session / f"{STATE}.json", {"stamp": dict(stamp), "values": values, "hashes": hashes})


def _forget(session: Path) -> None:
    for stem in (STATE, BEFORE):
        for ending in ("json", "safetensors"):
            (session / f"{stem}.{ending}").unlink(missing_ok=True)


def _step_back(session: Path) -> None:
    """The state before the last request; without one, nothing was learned before it."""
    for ending in ("safetensors", "json"):
        earlier = session / f"{BEFORE}.{ending}"
        if earlier.exists():
            earlier.replace(session / f"{STATE}.{ending}")
        else:
            (session / f"{STATE}.{ending}").unlink(missing_ok=True)


@contextmanager
def _alone(session: Path) -> Iterator[None]:
    """One request at a time: each goes on from what the one before has learned."""
    with (session / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
