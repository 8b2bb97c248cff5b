"""Half fine-tuning and Half-Reset on a real pretrained Llama: what learns, what stands still, what is taken home."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.core.errors import EngineError
from engine.core.facts import Facts
from engine.core.recipe import parse_recipe
from engine.io.facts import model_facts
from engine.methods.hft import HalfFineTuning, HalfTuning
from engine.ops.check import require
from engine.ops.transform import transform
from engine.parts.blocks import find_blocks
from engine.tasks import task
from engine.train.parts import PartContext, Payload
from engine.train.trainables import Trainables, collect
from tests.engine.tiny import Tiny


def prepared(
    model: Path, tiny: Tiny, task_name: str = "causal_lm", **params: Any
) -> tuple[nn.Module, HalfTuning, PartContext]:
    """The loaded model, the part attached to it, and the part's context, as the train operation makes them."""
    inputs = {**tiny.inputs(task_name), "model": {"source": f"folder:{model}"}}
    checked = require(parse_recipe({**inputs, "methods": [{"slug": "hft", "params": params}]}))
    assert checked.facts is not None
    ctx = PartContext(recipe=checked.recipe, facts=checked.facts, task=task(task_name), slug="hft", index=0)
    resolved = HalfFineTuning.Params.model_validate(checked.recipe.methods[0].params)
    (part,) = HalfFineTuning(resolved).parts(ctx)
    assert isinstance(part, HalfTuning)
    loaded = ctx.task.load_model(ctx.facts.model, ctx.facts.data, dtype=torch.float32, seed=1)
    part.attach(loaded)
    return loaded, part, ctx


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> Path:
    folder = shared_data / "stories260k"
    if not folder.is_dir():
        pytest.skip("The shared data has no stories260k.")
    return folder


@pytest.fixture(scope="module")
def domains(shared_data: Path, stories: Path) -> dict[str, Tensor]:
    """Token windows [N, 96] of the model's own domain and of another one: the first rows to learn from, the last to measure."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(stories)
    texts = {
        "old": (stories / "tinystories_sample.txt").read_text(encoding="utf-8"),
        "new": (shared_data / "domain_science_darwin" / "text.txt").read_text(encoding="utf-8")[20_000:220_000],
    }
    windows = {}
    for name, text in texts.items():
        ids = torch.tensor(tokenizer(text)["input_ids"])
        windows[name] = ids[: len(ids) // 96 * 96].reshape(-1, 96)
    return windows


def train(
    model: nn.Module, trainables: Trainables, windows: Tensor, steps: int, rate: float = 2e-3, seed: int = 0
) -> torch.optim.AdamW:
    """Real AdamW steps, with weight decay, on batches of eight windows."""
    optimizer = torch.optim.AdamW(list(trainables), lr=rate, weight_decay=0.1)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        batch = windows[torch.randint(0, len(windows), (8,), generator=generator)]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@torch.no_grad()
def loss_of(model: nn.Module, windows: Tensor) -> float:
    return float(model(input_ids=windows, labels=windows).loss)


def copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# ── what learns ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_locked_tensors_are_bit_identical_after_real_steps(
    stories: Path, domains: dict[str, Tensor], tiny: Tiny
) -> None:
    model, part, ctx = prepared(stories, tiny)
    before = copies(model)
    trainables = collect(model, [part], ())
    optimizer = train(model, trainables, domains["new"], 12)
    claimed = HalfFineTuning.claims(part.params, ctx.facts)
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == claimed == {name for name, _ in trainables.items()}
    assert len(moved) < len(before)
    held = {id(parameter) for parameter in optimizer.state}
    assert held == {id(parameter) for name, parameter in model.named_parameters() if name in claimed}
    floats = sum(value.numel() for state in optimizer.state.values() for value in state.values() if value.dim() > 0)
    assert 4 * floats == 8 * HalfFineTuning.num_trainable(
        part.params, ctx.facts
    )  # two fp32 moments per number that learns
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name not in claimed)


def test_every_layer_of_the_real_llama_has_two_of_four(stories: Path, tiny: Tiny) -> None:
    for number in range(1, 9):
        model, part, _ = prepared(stories, tiny, round=number)
        learning = set(part.trainables(model))
        for layer in range(5):
            names = [f"model.layers.{layer}.self_attn.{kind}_proj.weight" for kind in "qkvo"]
            assert sum(name in learning for name in names) == 2
            norms = [f"model.layers.{layer}.{kind}_layernorm.weight" for kind in ("input", "post_attention")]
            assert sum(name in learning for name in norms) == 1
        forward = [name for name in learning if ".mlp." in name]
        assert len(forward) == 8  # of 15: five layers cannot be halved exactly
        assert {"model.embed_tokens.weight", "model.norm.weight"} <= learning


def test_rounds_differ_and_repeat(stories: Path, tiny: Tiny) -> None:
    def names(**params: Any) -> frozenset[str]:
        return HalfFineTuning.claims(HalfFineTuning.Params(**params), facts)

    _, _, ctx = prepared(stories, tiny)
    facts = ctx.facts
    assert names(round=1) == names(round=1) != names(round=2)
    assert names(round=1, mask_seed=1) != names(round=1, mask_seed=2)
    assert names() == names(round=1)


@pytest.mark.parametrize(("task_name", "model"), [("causal_lm", "decoder"), ("classify", "encoder")])
@pytest.mark.parametrize("granularity", ["category", "layer", "model"])
@pytest.mark.parametrize("outside", ["trained", "frozen"])
def test_claims_without_weights_equal_what_attach_trains(
    tiny: Tiny, task_name: str, model: str, granularity: str, outside: str
) -> None:
    loaded, part, ctx = prepared(tiny.folder / model, tiny, task_name, granularity=granularity, outside=outside)
    claimed = HalfFineTuning.claims(part.params, ctx.facts)
    assert set(part.trainables(loaded)) == claimed
    assert HalfFineTuning.num_trainable(part.params, ctx.facts) == sum(
        p.numel() for p in part.trainables(loaded).values()
    )
    learning = {name for name, parameter in loaded.named_parameters() if name in claimed and parameter.requires_grad}
    assert learning == claimed
    assert all("embed" not in name for name in claimed) == (outside == "frozen")
    layout = find_blocks(ctx.facts.model.tensors)
    assert part.plan.frozen | claimed >= {n for block in layout.blocks for m in block.modules() for n in m.tensors}


def test_a_new_classifier_learns_beside_the_half(tiny: Tiny) -> None:
    model, part, ctx = prepared(tiny.folder / "encoder", tiny, "classify", outside="frozen")
    trainables = collect(model, [part], ctx.task.fresh(model))
    fresh = {name for name, _ in trainables.items() if name.startswith("fresh.")}
    assert any("classifier" in name for name in fresh)
    with torch.no_grad():
        for parameter in trainables:
            parameter.add_(0.25)
    payload = part.export(model)
    again, other, _ = prepared(tiny.folder / "encoder", tiny, "classify", outside="frozen")
    other.restore(again, payload)
    for name, parameter in again.named_parameters():
        assert torch.allclose(parameter, model.get_parameter(name), atol=1e-6), name


def gpt2(folder: Path, tiny: Tiny) -> Path:
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(tiny.folder / "decoder")
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=4, n_head=4, n_positions=64, vocab_size=len(tokenizer))
    GPT2LMHeadModel(config).save_pretrained(folder / "gpt2")
    tokenizer.save_pretrained(folder / "gpt2")
    return folder / "gpt2"


def test_fused_matrices_are_refused_by_category_and_drawn_by_layer_otherwise(tiny: Tiny, tmp_path: Path) -> None:
    folder = gpt2(tmp_path, tiny)
    with pytest.raises(EngineError) as refused:
        prepared(folder, tiny, granularity="category")
    assert "attn.c_attn" in str(refused.value) and "'layer'" in str(refused.value)
    model, part, _ = prepared(folder, tiny)
    assert part.plan.granularity == "layer"
    layers = {name.split(".")[2] for name in part.trainables(model) if ".h." in name}
    assert len(layers) == 2
    for name, _ in model.named_parameters():
        if ".h." in name:
            assert (name in part.trainables(model)) == (name.split(".")[2] in layers)


def test_a_model_without_layers_is_refused(stories: Path, tiny: Tiny) -> None:
    from dataclasses import replace

    _, _, ctx = prepared(stories, tiny)
    bare = replace(ctx.facts.model, tensors={"weight": (3, 3)}, linears={})
    verdict = HalfFineTuning.supports(
        Facts(task="causal_lm", model=bare, data=ctx.facts.data, machine=ctx.facts.machine)
    )
    assert not verdict.ok and verdict.why and verdict.way_out


def test_the_round_is_counted_on_from_the_result_it_starts_from(tiny: Tiny, tmp_path: Path) -> None:
    merged = tmp_path / "artifact" / "merged"
    merged.parent.mkdir()
    merged.symlink_to(tiny.folder / "decoder", target_is_directory=True)
    description = {"methods": [{"slug": "hft", "params": {"round": 4}}, {"slug": "clip", "params": {}}]}
    (tmp_path / "artifact" / "artifact.json").write_text(json.dumps(description), encoding="utf-8")
    _, part, ctx = prepared(merged, tiny)
    assert ctx.recipe.methods[0].params["round"] == 5 == part.plan.round_number
    _, part, ctx = prepared(tiny.folder / "decoder", tiny)
    assert ctx.recipe.methods[0].params["round"] == 1


# ── what is taken home ────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_export_is_the_difference_and_restores_the_model(
    stories: Path, domains: dict[str, Tensor], tiny: Tiny
) -> None:
    model, part, _ = prepared(stories, tiny)
    train(model, collect(model, [part], ()), domains["new"], 6)
    payload = part.export(model)
    assert payload.layout == "bonsai" and payload.tensors.keys() == part.trainables(model).keys()
    with safe_open(stories / "model.safetensors", framework="pt") as file:  # read again, past the engine
        for name, delta in payload.tensors.items():
            assert torch.equal(delta, model.get_parameter(name).detach() - file.get_tensor(name))
    json.dumps(payload.config, allow_nan=False)
    assert payload.config["round"] == 1 and set(payload.config["frozen"]).isdisjoint(payload.config["trained"])
    assert payload.config["ratios"]["attention"]["count"] == 0.5
    assert payload.config["ratios"]["feed_forward"]["count"] == pytest.approx(8 / 15)

    again, other, _ = prepared(stories, tiny)
    other.restore(again, payload)
    probe = domains["old"][:2]
    with torch.no_grad():
        assert torch.allclose(again(input_ids=probe).logits, model(input_ids=probe).logits, atol=1e-4)
    assert part.merge(model)

    third, wrong, _ = prepared(stories, tiny, round=2)
    with pytest.raises(EngineError, match="another half"):
        wrong.restore(third, Payload(layout="bonsai", config={}, tensors=payload.tensors))


@pytest.mark.effects
def test_half_forgets_less_than_full_and_learns_nearly_as_much(stories: Path, domains: dict[str, Tensor]) -> None:
    """Baseline: full fine-tuning with the same steps; 3 seeds of data order and mask; the card expects a 20 to 60 % smaller rise, we see 18 %."""
    from transformers import AutoModelForCausalLM

    from engine.parts.blocks import blocks_of, draw_half

    learned, held = domains["new"][:-60], domains["new"][-60:]
    start = loss_of(AutoModelForCausalLM.from_pretrained(stories), domains["old"])
    rise: dict[str, float] = {}
    new: dict[str, float] = {}
    for kind in ("full", "category", "layer"):
        scores = []
        for seed in range(3):
            model = AutoModelForCausalLM.from_pretrained(stories)
            names = {name for name, _ in model.named_parameters()}
            if kind != "full":
                layout = blocks_of(model)
                half = draw_half(layout, seed=seed, round_number=1, ratio=0.5, granularity=kind)  # type: ignore[arg-type]
                names = half.chosen | set(layout.outside)
            chosen = {name: parameter for name, parameter in model.named_parameters() if name in names}
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in chosen)
            train(model, Trainables(chosen), learned, 200, rate=5e-4, seed=seed)
            scores.append((loss_of(model, domains["old"]) - start, loss_of(model, held)))
        rise[kind], new[kind] = (sum(column) / 3 for column in zip(*scores, strict=True))
    assert rise["category"] < 0.9 * rise["full"]
    assert new["category"] < 1.1 * new["full"]
    assert rise["category"] < rise["layer"]


# ── Half-Reset ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def tuned(stories: Path, domains: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Llama after a short full fine-tuning on the new domain."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("tuned") / "tuned"
    model = AutoModelForCausalLM.from_pretrained(stories)
    train(model, Trainables(dict(model.named_parameters())), domains["new"][:-40], 80, rate=1e-3)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(stories).save_pretrained(folder)
    return folder


def reset(tuned: Path, base: Path, out: Path, **params: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    record = transform("half-reset", params, [tuned, base], out)
    return load_file(out / "model.safetensors"), record


def test_half_reset_mixes_whole_tensors(tuned: Path, stories: Path, tmp_path: Path) -> None:
    mixed, record = reset(tuned, stories, tmp_path / "mixed")
    after, before = load_file(tuned / "model.safetensors"), load_file(stories / "model.safetensors")
    back = set(record["report"]["reset"])
    assert mixed.keys() == after.keys() and record["report"]["kept"]["attention"]["count"] == 0.5
    for name, tensor in mixed.items():
        assert torch.equal(tensor, before[name] if name in back else after[name])
        assert not torch.equal(before[name], after[name])
    learned = HalfFineTuning.claims(HalfFineTuning.Params(round=1), _facts(stories))
    assert back == {name for name in mixed if name not in learned}, "the mask is that of half fine-tuning"
    assert json.loads((tmp_path / "mixed" / "transform.json").read_text())["method"] == "half-reset"
    assert model_facts(f"folder:{tmp_path / 'mixed'}", task="causal_lm").num_parameters == 260_032


def _facts(folder: Path) -> Facts:
    model = model_facts(f"folder:{folder}", task="causal_lm")
    return Facts(task="causal_lm", model=model, data=None, machine=None)  # type: ignore[arg-type]


def test_half_reset_lands_between_on_both_domains(
    tuned: Path, stories: Path, domains: dict[str, Tensor], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    held = {"old": domains["old"], "new": domains["new"][-40:]}

    def losses(folder: Path) -> dict[str, float]:
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        return {name: loss_of(model, windows) for name, windows in held.items()}

    base, full = losses(stories), losses(tuned)
    assert full["new"] < base["new"] - 0.3 and full["old"] > base["old"] + 0.1, "training must matter for this test"
    mixed = []
    for seed in range(3):
        reset(tuned, stories, tmp_path / f"mixed-{seed}", mask_seed=seed)
        mixed.append(losses(tmp_path / f"mixed-{seed}"))
    mean = {name: sum(one[name] for one in mixed) / 3 for name in held}
    assert full["new"] < mean["new"] < base["new"]
    assert base["old"] < mean["old"] < full["old"]


def test_everything_and_nothing_are_the_two_ends(tuned: Path, stories: Path, tmp_path: Path) -> None:
    after, before = load_file(tuned / "model.safetensors"), load_file(stories / "model.safetensors")
    kept, _ = reset(tuned, stories, tmp_path / "kept", ratio=1.0)
    assert all(torch.equal(kept[name], after[name]) for name in after)
    gone, _ = reset(tuned, stories, tmp_path / "gone", ratio=0.0)
    assert all(torch.equal(gone[name], before[name]) for name in before if ".layers." in name)
    assert torch.equal(gone["model.embed_tokens.weight"], after["model.embed_tokens.weight"])


def test_a_sharded_base_with_another_prefix_and_type_is_understood(tuned: Path, stories: Path, tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    tensors = {
        name.removeprefix("model."): t.to(torch.bfloat16)
        for name, t in load_file(stories / "model.safetensors").items()
    }
    files: dict[str, dict[str, Tensor]] = {"one.safetensors": {}, "two.safetensors": {}}
    for place, (name, tensor) in enumerate(tensors.items()):
        files[list(files)[place % 2]][name] = tensor
    for name, part in files.items():
        save_file(part, sharded / name)
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    mixed, record = reset(tuned, sharded, tmp_path / "mixed")
    for name in record["report"]["reset"]:
        assert mixed[name].dtype == torch.float32
        assert torch.equal(mixed[name], tensors[name.removeprefix("model.")].float())


def refusals(
    tuned: Path, stories: Path, tiny: Tiny, tmp_path: Path
) -> Iterator[tuple[str, list[Path], dict[str, Any], str]]:
    (tmp_path / "empty").mkdir()
    outside = tmp_path / "crooked"
    outside.mkdir()
    (outside / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "../tuned/model.safetensors"}})
    )
    yield "half-reset", [tuned, tiny.folder / "decoder"], {}, "do not belong together"
    yield "half-reset", [tuned, tiny.folder / "encoder"], {}, "do not belong together"
    yield "half-reset", [tuned], {}, "needs two models"
    yield "half-reset", [tuned, tmp_path / "empty"], {}, "holds no model"
    yield "half-reset", [tuned, outside], {}, "outside of the folder"
    yield "half-reset", [tuned, stories], {"ratio": 2.0}, "'ratio' is 2.0"
    yield "hft", [tuned, stories], {}, "no transformation called"


def test_what_cannot_be_mixed_is_refused_in_a_sentence(tuned: Path, stories: Path, tiny: Tiny, tmp_path: Path) -> None:
    for slug, sources, params, said in refusals(tuned, stories, tiny, tmp_path):
        with pytest.raises(EngineError, match=said) as refused:
            transform(slug, params, sources, tmp_path / "out")
        assert refused.value.fault.why and refused.value.fault.way_out
        assert not list(tmp_path.glob("*out*")), "nothing half-written stays behind"
    (tmp_path / "out").mkdir()
    with pytest.raises(EngineError, match="already"):
        transform("half-reset", {}, [tuned, stories], tmp_path / "out")
