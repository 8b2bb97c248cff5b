"""The conformance list over every method that stands between a finished result and those who ask it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.core.errors import EngineError
from engine.core.method import PredictMethod
from engine.core.registry import catalogue
from engine.ops.folder import run_folder
from engine.ops.serve import serve
from tests.engine.tiny import Tiny, lay

METHODS = [method for method in catalogue().values() if issubclass(method, PredictMethod)]
pytestmark = pytest.mark.parametrize("method", METHODS, ids=[method.card.slug for method in METHODS])
ASKED = {
    "classify": ["The bread was late.", "Where is my order?", "I want to pay.", "The lamp is broken.", "Thank you!"]
}


@pytest.fixture(scope="module")
def artifacts(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished result for each goal that is asked for."""
    made = {}
    for task in {(method.needs.tasks or ("causal_lm",))[0] for method in METHODS}:
        folder = lay(tmp_path_factory.mktemp(task), tiny.recipe([("full-finetuning", {})], task=task, max_steps=3))
        assert run_folder(folder)["outcome"] == "succeeded"
        made[task] = folder / "artifact"
    return made


def test_it_serves_deterministically_and_never_touches_the_artifact(
    method: type[PredictMethod], artifacts: dict[str, Path], tmp_path: Path
) -> None:
    task = (method.needs.tasks or ("causal_lm",))[0]
    artifact, ref = artifacts[task], {"slug": method.card.slug, "params": method.presets["tiny"]}
    before = {path: path.stat().st_mtime_ns for path in artifact.rglob("*")}
    texts = ASKED.get(task, ["Once there was a", "The old boat"])
    one = [serve(artifact, texts, {}, method=ref, session=tmp_path / "one") for _ in range(2)]
    other = [serve(artifact, texts, {}, method=ref, session=tmp_path / "other") for _ in range(2)]
    assert one == other
    assert len(one[0]["answers"]) == len(texts)
    json.dumps(one, allow_nan=False)
    forgotten = serve(artifact, texts, {}, method=ref, session=tmp_path / "one", undo="all")
    assert forgotten["answers"] == one[0]["answers"]
    assert before == {path: path.stat().st_mtime_ns for path in artifact.rglob("*")}


def test_every_number_out_of_range_is_refused(
    method: type[PredictMethod], artifacts: dict[str, Path], tmp_path: Path
) -> None:
    artifact = artifacts[(method.needs.tasks or ("causal_lm",))[0]]
    for name, field in method.Params.model_fields.items():
        extra = field.json_schema_extra
        assert isinstance(extra, dict)
        if "high" in extra:
            wrong = {"slug": method.card.slug, "params": {name: float(extra["high"]) * 2 + 1}}  # type: ignore[arg-type]
            with pytest.raises(EngineError, match=name):
                serve(artifact, ["x"], {}, method=wrong, session=tmp_path / name)


def test_card_speaks_to_a_lay_person(method: type[PredictMethod]) -> None:
    card = method.card
    assert card.pick_when.lower().startswith("pick this when") and card.pick_when.endswith(".")
    assert card.summary.endswith(".") and {"tiny", "paper"} <= method.presets.keys()
    json.dumps(method.describe(), allow_nan=False)
    method.Params.model_validate(method.presets["paper"])
