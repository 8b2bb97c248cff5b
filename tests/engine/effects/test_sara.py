"""What the card of SaRA promises, measured: small weights hardly matter, training them forgets less, and the rank term lowers the rank."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.bench.workbench import Workbench, step
from engine.core.facts import ModelFacts
from engine.methods.sara import RankTerm, SaRA, SmallWeights
from engine.parts.selection import lowest, magnitudes
from engine.train.parts import Loss
from engine.train.run import Run
from tests.engine.attached import Attached, facts_for

pytestmark = pytest.mark.effects


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


# ── a real small language model ───────────────────────────────────────────────────────────────────────────────────────


@torch.inference_mode()
def own_stories(folder: Path, count: int = 24) -> Tensor:
    """Token rows that the untouched model wrote: the kind of text that it knows."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.manual_seed(5)
    start = torch.full((count, 1), tokenizer.bos_token_id)
    rows: Tensor = model.generate(
        start, attention_mask=torch.ones_like(start), do_sample=True, temperature=0.8, top_k=0, max_new_tokens=140,
        pad_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    return rows


@torch.inference_mode()
def loss_on(model: nn.Module, rows: Tensor) -> float:
    model.eval()
    logits = model(input_ids=rows).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item()


def test_the_smallest_weights_hardly_matter(shared_data: Path, effect_row: Callable[..., None]) -> None:
    from transformers import AutoModelForCausalLM

    folder = shared_data / "stories260k"
    rows = own_stories(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    weights = {
        name: parameter for name, parameter in model.named_parameters() if parameter.dim() == 2 and "layers" in name
    }
    kept = {name: weight.detach().clone() for name, weight in weights.items()}
    count = round(0.1 * sum(weight.numel() for weight in kept.values()))
    before = loss_on(model, rows)

    def rise(places: dict[str, Tensor]) -> float:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(kept[name].flatten().index_fill(0, places[name], 0.0).view_as(weight))
        return loss_on(model, rows) - before

    small = rise(lowest(magnitudes(kept), count, torch.Generator()))
    random = []
    for seed in (1, 2, 3):
        generator = torch.Generator().manual_seed(seed)
        lots = {name: torch.rand(weight.shape, generator=generator) for name, weight in kept.items()}
        random.append(rise(lowest({name: lambda lot=lot: lot for name, lot in lots.items()}, count, generator)))
    effect_row(
        slug="sara",
        behaviour="Rise of the loss on its own stories when a tenth of a 260,000-parameter story model is set to zero: the smallest tenth against a random tenth",
        baseline="a random tenth of the same matrices",
        ours=f"+{small:.4f} (before {before:.3f})",
        theirs=f"+{spread(random)} (seeds 1, 2, 3)",
        verdict="holds" if small < 0.1 * min(random) else "not seen at this size",
        paper="the smallest 10 to 20 % do not matter",
    )
    assert small < 0.1 * min(random)


def test_forgetting_of_a_story_model_that_learns_a_novel(shared_data: Path, effect_row: Callable[..., None]) -> None:
    """Adapts at equal numbers, steps and rate, at two rates; the better way would lose less on stories for what it gains on the novel."""
    folder = shared_data / "stories260k"
    rows = own_stories(folder)
    bench = Workbench()
    text = (shared_data / "domain_novel_bronte" / "text.txt").read_text(encoding="utf-8")
    paragraphs = [" ".join(piece.split()) for piece in text.split("\n\n")]
    novel = bench.folder / "novel.jsonl"
    novel.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in paragraphs[:2000] if len(piece) > 80))

    def trained(select: str, seed: int) -> Run:
        recipe = bench.recipe(
            f"folder:{folder}", f"file:{novel}", [("sara", {"select": select}), ("cosine", {})], max_steps=80, epochs=50,
            batch_size=8, max_length=128, holdout=0.05, seed=seed, precision="fp32", learning_rate=2e-3,
        )  # fmt: skip
        run = bench.run(recipe)
        run.begin()
        while run.clock.step < run.clock.total_steps:
            step(run, run.next_batches())
        return run

    found: dict[str, list[tuple[float, float]]] = {}
    start = end = 0
    for select in ("smallest", "largest", "random"):
        for seed in (17, 18):
            run = trained(select, seed)
            new = run.task.evaluate(run.model, run.encoded, run.tokenizer, run.recipe, run.device)["eval_loss"]  # type: ignore[attr-defined]
            found.setdefault(select, []).append((new, loss_on(run.model, rows)))
            if select == "smallest":
                part = run.slots.parametrizations[0]
                assert isinstance(part, SmallWeights)
                start, end = sum(map(len, part.entries.values())), part.num_learning()
    bench.close()
    said = {
        name: f"novel {spread([new for new, _ in values])}, stories {spread([own for _, own in values])}"
        for name, values in found.items()
    }
    own = {name: statistics.mean(old for _, old in values) for name, values in found.items()}
    new = {name: statistics.mean(loss for loss, _ in values) for name, values in found.items()}
    holds = own["smallest"] < min(own["largest"], own["random"]) and new["smallest"] < max(
        new["largest"], new["random"]
    )
    effect_row(
        slug="sara",
        behaviour="A 260,000-parameter story model learns a novel with a tenth of its weights, equal rate and steps: loss on the novel, and on stories",
        baseline="the largest and random weights, as many",
        ours=f"{said['smallest']} (seeds 17, 18)",
        theirs=f"largest: {said['largest']}; random: {said['random']}",
        verdict="holds" if holds else "opposite",
        paper="best of the three (Table 2, images)",
        note="80 steps of 8 x 128, rate 2e-3, with second choice and rank term. Also tried with one seed, without the two: rates 1e-3 and 3e-3 over 100 steps, and "
        "the same share in each layer. Always the same order: small weights lose most of the stories, also when read off at an equal loss on the novel. "
        f"After the second choice {end / start:.0%} of the first {start:,} still learn (paper: 15 to 20 %).",
    )
    assert new["smallest"] < min(new["largest"], new["random"]) + 0.05  # it learns no less than the others
    assert 0 < end < start


# ── a small net on digits: five old classes, then five new ones ───────────────────────────────────────────────────────


class Digits:
    """The digits of scikit-learn, and a net [64, 128, 128, 10] that has learned the classes 0 to 4."""

    def __init__(self, seed: int) -> None:
        from sklearn.datasets import load_digits

        data = load_digits()
        self.x, self.y = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
        self.train, self.old = torch.arange(len(self.y)) % 5 != 0, self.y < 5
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
        self.learn(self.old, 800, torch.optim.AdamW(self.net.parameters(), lr=2e-3, weight_decay=0.0))

    def learn(
        self, rows: Tensor, steps: int, optimizer: Any, sync: Callable[[], None] = int, term: Callable[[], Any] = int
    ) -> None:
        places = (rows & self.train).nonzero()[:, 0]
        for _ in range(steps):
            batch = places[torch.randint(len(places), (64,))]
            (nn.functional.cross_entropy(self.net(self.x[batch]), self.y[batch]) + term()).backward()
            optimizer.step()
            optimizer.zero_grad()
            sync()

    @torch.no_grad()
    def loss(self, rows: Tensor) -> float:
        places = rows & ~self.train
        return nn.functional.cross_entropy(self.net(self.x[places]), self.y[places]).item()


FACTS = ModelFacts(
    source="digits", path="", family="mlp", kind="encoder", architecture="MLP", num_parameters=26_122, num_layers=3, hidden_size=128,
    vocab_size=0, max_positions=0, dtype="F32", tied_embeddings=False, has_chat_template=False,
    tensors={"0.weight": (128, 64), "2.weight": (128, 128), "4.weight": (10, 128)},
    linears={"0": (128, 64), "2": (128, 128), "4": (10, 128)},
)  # fmt: skip


def adapted(seed: int, rate: float, rank_loss: float = 0.0, **params: Any) -> tuple[float, float, Tensor, Tensor]:
    """(loss on new classes, rise on old ones, change of the middle matrix, its chosen part) after 200 steps on the new classes alone."""
    digits = Digits(seed)
    before, original = digits.loss(digits.old), digits.net[2].weight.detach().clone()
    one = Attached(digits.net, SaRA(SaRA.Params(**params)), facts_for(FACTS, "classify"), seed=seed)
    part = one.part
    assert isinstance(part, SmallWeights)
    rank = RankTerm(part, rank_loss, 64, torch.Generator().manual_seed(seed))
    nothing = Loss(total=torch.zeros(()), weight=1.0)
    torch.manual_seed(seed)
    digits.learn(
        ~digits.old, 200, torch.optim.AdamW(list(one.trainables), lr=rate, weight_decay=0.0), lambda: part.sync(digits.net),
        lambda: rank.term(digits.net, {}, nothing, 1.0),
    )  # fmt: skip
    weight, entries = digits.net[2].weight.detach(), part.entries["2.weight"]
    chosen = torch.zeros(weight.numel()).index_copy(0, entries.index.long(), entries.whole()).view_as(weight)
    return digits.loss(~digits.old), digits.loss(digits.old) - before, weight - original, chosen


def rise_when_learned(seed: int, rate: float, select: str, goal: float) -> float:
    """How far the loss on old classes has risen when that on the new ones first reaches `goal`; infinite when it never does in 400 steps."""
    digits = Digits(seed)
    before = digits.loss(digits.old)
    one = Attached(digits.net, SaRA(SaRA.Params(select=select)), facts_for(FACTS, "classify"), seed=seed)
    optimizer = torch.optim.AdamW(list(one.trainables), lr=rate, weight_decay=0.0)
    torch.manual_seed(seed)
    for _ in range(40):
        digits.learn(~digits.old, 10, optimizer, lambda: one.part.sync(digits.net))
        if digits.loss(~digits.old) <= goal:
            return digits.loss(digits.old) - before
    return float("inf")


def test_small_weights_forget_less_than_large_or_random_ones(effect_row: Callable[..., None]) -> None:
    seeds, rate, ways, goal = (1, 2, 3), 3e-3, ("smallest", "largest", "random"), 1.5
    found = {select: [adapted(seed, rate, select=select)[:2] for seed in seeds] for select in ways}
    equal = {select: [rise_when_learned(seed, rate, select, goal) for seed in seeds] for select in ways}
    said = {
        name: f"new {spread([new for new, _ in values])}, old +{spread([old for _, old in values])}"
        for name, values in found.items()
    }
    old = {name: statistics.mean(rise for _, rise in values) for name, values in found.items()}
    rise = {name: statistics.mean(values) for name, values in equal.items()}
    effect_row(
        slug="sara",
        behaviour="A net that knows five digits learns five others with a tenth of its weights, 200 steps, equal rate: loss on new digits, rise on old ones",
        baseline="the largest and random weights, as many",
        ours=f"{said['smallest']} (seeds 1, 2, 3)",
        theirs=f"largest: {said['largest']}; random: {said['random']}",
        verdict="holds" if old["smallest"] < min(old["largest"], old["random"]) else "opposite",
        paper="VLHI 1.16, largest 1.00, random 0.97 (Table 2, without the two tricks)",
        note="Rate 3e-3. At 1e-3 and 3e-4 the smallest also forget least after 200 steps, but have learned least by then.",
    )
    effect_row(
        slug="sara",
        behaviour=f"The same net: rise of the loss on old digits at the moment when that on the new ones reaches {goal}",
        baseline="the largest and random weights, as many",
        ours=f"+{spread(equal['smallest'])} (seeds 1, 2, 3)",
        theirs=f"largest: +{spread(equal['largest'])}; random: +{spread(equal['random'])}",
        verdict="holds" if rise["smallest"] < min(rise["largest"], rise["random"]) else "opposite",
        note="The same order at rate 1e-3, and at the losses 2.0, 1.2 and 1.0. Above 3.0, early on, there is no difference to random ones.",
    )
    assert old["smallest"] < 0.9 * old["random"] and old["smallest"] < 0.6 * old["largest"]
    assert rise["smallest"] < 0.9 * rise["random"] and rise["smallest"] < 0.6 * rise["largest"]


def effective_rank(matrix: Tensor) -> float:
    """exp of the entropy of the singular values."""
    share = torch.linalg.svdvals(matrix)
    share = share / share.sum()
    return float(torch.exp(-(share * share.clamp_min(1e-12).log()).sum()))


def test_the_rank_term_lowers_the_effective_rank(effect_row: Callable[..., None]) -> None:
    seeds, strengths = (1, 2), (0.0, 5e-4, 2e-2)
    delta: dict[float, list[float]] = {}
    part: dict[float, list[float]] = {}
    for strength in strengths:
        for seed in seeds:
            _, _, change, chosen = adapted(seed, 3e-3, rank_loss=strength)
            delta.setdefault(strength, []).append(effective_rank(change))
            part.setdefault(strength, []).append(effective_rank(chosen))
    mean = {strength: (statistics.mean(delta[strength]), statistics.mean(part[strength])) for strength in strengths}
    effect_row(
        slug="sara",
        behaviour="Effective rank of the chosen weights (W * mask, what the rank term sees) of a 128 x 128 matrix after 200 steps",
        baseline="no rank term",
        ours=f"{spread(part[5e-4])} at 5e-4, {spread(part[2e-2])} at 2e-2 (seeds 1, 2)",
        theirs=spread(part[0.0]),
        verdict="holds" if mean[5e-4][1] < mean[0.0][1] else "opposite",
    )
    effect_row(
        slug="sara",
        behaviour="Effective rank of the change W - W0 of a 128 x 128 matrix after 200 steps",
        baseline="no rank term",
        ours=f"{spread(delta[5e-4])} at the paper's 5e-4, {spread(delta[2e-2])} at 2e-2 (seeds 1, 2)",
        theirs=spread(delta[0.0]),
        verdict="holds" if mean[5e-4][0] < mean[0.0][0] else "opposite",
        note="The term pulls W * mask, not the change; at the paper's strength it first takes away the small full-rank start, which is itself a change. "
        "Forty times stronger it lowers both, the change by little.",
    )
    assert mean[2e-2][1] < mean[5e-4][1] < mean[0.0][1]
    assert mean[2e-2][0] < mean[5e-4][0] and mean[2e-2][0] < mean[0.0][0]
