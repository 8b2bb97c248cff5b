"""Compiled blocks: the same numbers as the plain path, code that is made once for all blocks and lengths, and a choice that says why."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from engine.bench.workbench import Workbench
from engine.core.control import Control
from engine.core.errors import EngineError, RecipeError
from engine.core.events import EventLog
from engine.core.facts import Facts, MachineFacts
from engine.core.method import Composition
from engine.core.recipe import Recipe, parse_recipe
from engine.io.machine import compiler_lacks
from engine.ops.check import require
from engine.ops.compiling import AT_LEAST, PAYS, choose_compile, compile_faults
from engine.ops.estimate import estimate
from engine.ops.train import prepare
from engine.tasks.segments import attend
from engine.train import checkpoint, loop
from engine.train.compiled import FILE, FOLDER, blocks_of, compiled
from tests.engine.tiny import Tiny, events, metric_rows

FULL: list[tuple[str, Mapping[str, Any]]] = [("full-finetuning", {})]
TOP: list[tuple[str, Mapping[str, Any]]] = [("lora", {"r": 4, "top_blocks": 1})]
LACKS = compiler_lacks("cpu")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own, and no folder of the compiler's in the temporary one."""
    monkeypatch.setenv("BONSAI_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    return tmp_path / "home"


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Blocks are cut into pieces of code, which then run as they are; returns the pieces that were made."""
    pieces: list[Any] = []

    def kept(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        pieces.append(graph)
        return graph.forward

    monkeypatch.setattr(loop, "compiled", functools.partial(compiled, backend=kept))
    return pieces


def trained(recipe: Recipe, folder: Path) -> tuple[list[dict[str, Any]], nn.Module]:
    folder.mkdir(exist_ok=True)
    run = prepare(require(recipe), folder, EventLog(folder), Control(folder))
    loop.train(run)
    run.log.flush()
    return metric_rows(folder), run.model


def losses(rows: list[dict[str, Any]]) -> list[float]:
    return [row["loss"] for row in rows]


@pytest.mark.parametrize(
    ("methods", "task", "settings", "pieces"),
    [
        (FULL, "instruct", {"gradient_checkpointing": "on", "precision": "bf16"}, 2),
        (FULL, "classify", {}, 2),
        (TOP, "causal_lm", {"frozen_cache": "on"}, 0),  # autograd follows nothing that the only block above is asked
    ],
    ids=["packed, recomputed, bf16", "padded, with dropout", "frozen part remembered"],
)
def test_pieces_of_blocks_compute_what_the_blocks_compute(
    methods: list[tuple[str, Mapping[str, Any]]],
    task: str,
    settings: dict[str, Any],
    pieces: int,
    tiny: Tiny,
    tmp_path: Path,
    cheap: list[Any],
) -> None:
    plain, _ = trained(tiny.recipe(methods, task=task, compile="off", **settings), tmp_path / "plain")
    assert not cheap
    quick, model = trained(tiny.recipe(methods, task=task, compile="on", **settings), tmp_path / "quick")
    assert losses(quick) == losses(plain)
    assert len(cheap) == pieces, "one piece before attention and one behind it serve every block and every length"
    assert "engine" not in {type(block).forward.__module__.partition(".")[0] for block in blocks_of(model)}
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is attend and "TORCHINDUCTOR_CACHE_DIR" not in os.environ


def test_what_the_compiler_keeps_lies_in_the_home_and_is_its_owners_alone(
    tiny: Tiny, tmp_path: Path, home: Path, cheap: list[Any]
) -> None:
    before = set(Path(tempfile.gettempdir()).glob("torchinductor*"))
    trained(tiny.recipe(FULL, compile="on", max_steps=1), tmp_path / "run")
    assert stat.S_IMODE((home / "cache" / FOLDER).stat().st_mode) == 0o700
    assert set(Path(tempfile.gettempdir()).glob("torchinductor*")) == before
    assert any("compiles the blocks" in event["message"] for event in events(tmp_path / "run", "log"))


def test_a_model_without_marked_blocks_runs_as_ever_and_says_so(
    tiny: Tiny, tmp_path: Path, cheap: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.train.compiled.blocks_of", lambda model: [])
    trained(tiny.recipe(FULL, compile="on", max_steps=1), tmp_path / "run")
    assert not cheap
    assert any("Nothing of this model is compiled" in event["message"] for event in events(tmp_path / "run", "log"))


def test_what_the_compiler_cannot_do_is_told_with_a_way_out(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        raise RuntimeError("no space left")

    monkeypatch.setattr(loop, "compiled", functools.partial(compiled, backend=broken))
    with pytest.raises(EngineError, match="switched off") as caught:
        trained(tiny.recipe(FULL, compile="on"), tmp_path / "run")
    assert caught.value.fault.code == "not_compiled" and caught.value.reason == "environment"


# ── the real compiler ─────────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def one_block(tiny: Tiny) -> Iterator[Path]:
    bench = Workbench()
    target = bench.folder / "one"
    config = LlamaConfig.from_pretrained(tiny.folder / "decoder", num_hidden_layers=1)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(target)
    for file in (tiny.folder / "decoder").glob("token*"):
        (target / file.name).write_bytes(file.read_bytes())
    yield target
    bench.close()


@pytest.mark.skipif(bool(LACKS), reason=f"Nothing can be compiled here: this machine lacks {LACKS}.")
def test_compiled_steps_learn_the_same_and_resume_to_the_same_bits(tiny: Tiny, tmp_path: Path, home: Path) -> None:
    """Fifty steps with rows of many lengths, by the real compiler; then the same from an earlier checkpoint, where the first row has another length."""
    with one_block(tiny) as model:
        plan = {
            "max_steps": 50,
            "epochs": 20,
            "evaluations": 1,
            "learning_rate": 1e-3,
            "checkpoint_every": 20,
        }
        recipes = {
            mode: (recipe := tiny.recipe(FULL, task="instruct", compile=mode, **plan)).model_copy(
                update={"model": recipe.model.model_copy(update={"source": f"folder:{model}"})}
            )
            for mode in ("off", "on")
        }
        plain, _ = trained(recipes["off"], tmp_path / "plain")
        quick, _ = trained(recipes["on"], tmp_path / "quick")
        folder = tmp_path / "killed"
        shutil.copytree(tmp_path / "quick", folder)
        *earlier, last = checkpoint.listed(folder)
        shutil.rmtree(last)  # as if the process had died before it was written
        assert earlier
        again, _ = trained(recipes["on"], folder)
    assert plain[0]["loss"] - plain[-1]["loss"] > 0.5, "it learns, so equal losses mean something"
    assert max(abs(a - b) for a, b in zip(losses(plain), losses(quick), strict=True)) <= 1e-4
    assert again == quick and (folder / FILE).exists()
    first, second = (checkpoint.load(checkpoint.listed(tmp_path / name)[-1]).trainables for name in ("quick", "killed"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert list((home / "cache" / FOLDER).rglob("*.so")), "code was made"


# ── the choice ────────────────────────────────────────────────────────────────────────────────────────────────────────


def machine(device: str, lacks: str = "") -> MachineFacts:
    return MachineFacts(
        device=device,
        device_name="This machine",
        memory_bytes=8 << 30,
        num_threads=2,
        has_bf16=True,
        compiler_lacks=lacks,
    )


def asked(
    tiny: Tiny, where: MachineFacts, mode: str = "auto", steps: int = 100, method: str = "lora"
) -> tuple[Recipe, Composition, Facts]:
    recipe = tiny.recipe([(method, {})], compile="off")
    checked = require(recipe)
    assert checked.facts is not None
    settings = recipe.settings.model_copy(update={"compile": mode, "max_steps": steps, "epochs": 1e9})
    return recipe.model_copy(update={"settings": settings}), checked.composition, replace(checked.facts, machine=where)


def test_auto_never_compiles_on_a_processor_and_says_why(tiny: Tiny) -> None:
    filled, (advice,) = choose_compile(*asked(tiny, machine("cpu"), steps=10**9))
    assert filled.settings.compile == advice.value == "off"
    assert "not reliably quicker" in advice.reason and "1.05" in advice.reason
    assert require(tiny.recipe(FULL)).recipe.settings.compile == "off", "and the resolved recipe says so"


def test_auto_compiles_on_a_gpu_where_a_run_wins_twice_the_cost(tiny: Tiny) -> None:
    pay = PAYS["cuda"]
    needed = AT_LEAST * pay.seconds / (1 - 1 / pay.faster)
    for steps in (10, 10**6, 10**8, 10**10):
        recipe, composition, facts = asked(tiny, machine("cuda"), steps=steps)
        filled, (advice,) = choose_compile(recipe, composition, facts)
        long_enough = estimate(recipe, composition, facts)["seconds_low"] >= needed
        assert filled.settings.compile == advice.value == ("on" if long_enough else "off")
        assert "70 s" in advice.reason
    assert long_enough, "the longest of them pays"


def test_without_a_compiler_auto_is_off_and_on_is_refused_in_a_sentence(tiny: Tiny) -> None:
    lacking = machine("cuda", "a compiler (gcc or clang)")
    filled, (advice,) = choose_compile(*asked(tiny, lacking, steps=10**10))
    assert filled.settings.compile == "off" and "lacks a compiler" in advice.reason
    (fault,) = compile_faults(*asked(tiny, lacking, mode="on"))
    assert (fault.where, fault.code) == ("settings.compile", "no_compiler") and "switch it off" in fault.way_out
    assert not compile_faults(*asked(tiny, machine("cuda"), mode="on"))


def test_a_method_that_changes_its_layers_declares_it_and_is_refused(tiny: Tiny) -> None:
    (fault,) = compile_faults(*asked(tiny, machine("cpu"), mode="on", method="increlora"))
    assert fault.code == "method_not_compiled" and "grow" in fault.why
    body = tiny.recipe([("increlora", {})], compile="off").model_dump(mode="json")
    body["settings"]["compile"] = "on"
    with pytest.raises(RecipeError):
        require(parse_recipe(body))


def test_a_compiler_is_looked_for_without_starting_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert compiler_lacks("cpu") == "a compiler (g++)"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert compiler_lacks("cuda") == "the package triton"
