"""IncreLoRA: LoRA whose rank grows layer by layer, where a score says that more would help (arXiv 2308.12043)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any, Literal

import torch
from torch import Tensor, nn

from engine.core.errors import Fault, bad_input
from engine.core.facts import Facts
from engine.core.method import Card, Cost, Figure, Needs, Suggestion, TrainMethod, Verdict
from engine.core.params import HyperParams, dial
from engine.core.recipe import Recipe
from engine.core.slots import Slot
from engine.parts.adapters import PEFT_PREFIX, fresh_tensors, load_fresh, lora_config
from engine.parts.growing import RESERVE, GrowingLinear
from engine.parts.targets import ALL, TARGETS_HELP, linear, linear_verdict, rank_faults, replace, target_faults, targets
from engine.train.parts import Loss, LossTerm, Parametrization, PartContext, Payload, Remap, StepReport

FIRST, EVERY, UNTIL = 0.05, 0.04, 0.5  # shares of the run: first score is trusted, allocation every, derived plan ends


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """When pieces are handed out: at steps after `warmup` that `interval` divides, to `top_h` layers each, until `target_total` are active."""

    warmup: int
    interval: int
    top_h: int
    incre_rank: int
    start_total: int
    target_total: int
    total_steps: int

    def at(self, step: int) -> bool:
        return step > self.warmup and step % self.interval == 0

    @property
    def number(self) -> int:
        return ceil((self.target_total - self.start_total) / (self.top_h * self.incre_rank))

    @property
    def first(self) -> int:
        return (self.warmup // self.interval + 1) * self.interval

    @property
    def last(self) -> int:
        return self.first + (self.number - 1) * self.interval

    def sentence(self) -> str:
        several = self.number > 1
        when = (
            f"at steps {self.first:,} to {self.last:,}, every {self.interval:,}"
            if several
            else f"at step {self.first:,}"
        )
        return (
            f"Of {self.target_total:,} pieces {self.start_total:,} are active from the start; the others are handed out in {self.number:,} "
            f"round{'s' if several else ''} {when}, to {self.top_h:,} layer{'s' if self.top_h > 1 else ''} at a time."
        )


def plan_rounds(params: Any, num_layers: int, total_steps: int) -> Rounds:
    """Fill what was left open from the length of the run: a derived plan ends in its first half. Refuses a plan that the run cannot finish."""
    incre = params.incre_rank or max(1, params.target_rank // 2)
    start, target = num_layers * params.lora_r, num_layers * params.target_rank
    warmup = params.init_warmup if params.init_warmup is not None else max(1, round(FIRST * total_steps))
    interval = params.interval or max(1, round(EVERY * total_steps))
    room = int(UNTIL * total_steps) // interval - warmup // interval  # rounds in the first half
    top_h = min(num_layers, params.top_h or ceil((target - start) / (max(1, room) * incre)))
    rounds = Rounds(warmup=warmup, interval=interval, top_h=top_h, incre_rank=incre, start_total=start, target_total=target,
                    total_steps=total_steps)  # fmt: skip
    if rounds.last >= total_steps:
        raise bad_input(
            "settings.epochs",
            f"The last of {rounds.number:,} allocations would come at step {rounds.last:,}, and this run has {total_steps:,}.",
            "Pieces that arrive at the end learn nothing; the last allocation should come well before.",
            "Train longer, leave first allocation, interval and layers per round open, or hand out more at a time.",
            "too_few_steps",
        )
    return rounds


class IncrementalRank(Parametrization):
    """Growing layers, their scores, and the allocation of further pieces."""

    def __init__(self, ctx: PartContext, layers: list[str], params: IncreLoRA.Params) -> None:
        self.ctx, self.names, self.params = ctx, layers, params
        self.layers: list[GrowingLinear] = []
        self.rounds: Rounds | None = None
        self.importance = torch.zeros(len(layers))  # I, smoothed score
        self.uncertainty = torch.zeros(len(layers))  # U, smoothed distance of the score from I
        self.history: list[dict[str, Any]] = []
        self.pieces, self.chance = ctx.generator("pieces"), ctx.generator("winners")

    # ── structure ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def attach(self, model: nn.Module) -> None:
        p = self.params
        divisor = p.target_rank if p.scale == "fixed" else None
        plain = [linear(model, name) for name in self.names]
        self.layers = [GrowingLinear(module, alpha=p.alpha, divisor=divisor) for module in plain]
        for name, layer in zip(self.names, self.layers, strict=True):
            replace(model, name, layer)
            layer.append(*layer.draw(p.lora_r, self.pieces), True)
            self._refill(layer)
        device = self.layers[0].weight.device
        self.importance, self.uncertainty = self.importance.to(device), self.uncertainty.to(device)

    def begin(self, run: Any) -> None:
        """Once before the first step: the length of the run is known, so the rounds can be planned."""
        self.rounds = plan_rounds(self.params, len(self.layers), run.clock.total_steps)
        run.log.emit("log", {"level": "info", "message": self.rounds.sentence()})
        self._listen(1)

    def _refill(self, layer: GrowingLinear) -> None:
        """Put fresh pieces in reserve, as many as one allocation takes and the layer has room for."""
        size = min(self._incre, self._limit(layer) - layer.rank)
        if self.params.advance and size > 0:
            layer.append(*layer.draw(size, self.pieces), False)

    @property
    def _incre(self) -> int:
        return self.params.incre_rank or max(1, self.params.target_rank // 2)

    @staticmethod
    def _limit(layer: GrowingLinear) -> int:
        return min(layer.in_features, layer.out_features)

    def trainables(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return {
            f"{name}.{number}.{leaf}": parameter
            for name, layer in zip(self.names, self.layers, strict=True)
            for number, bundle in enumerate(layer.bundles)
            for leaf, parameter in bundle.named_parameters()
        }

    @property
    def total(self) -> int:
        """Active pieces of all layers."""
        return sum(layer.rank for layer in self.layers)

    # ── growing ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def adapt(self, report: StepReport) -> Remap | None:
        """Smooth the scores of this step and, when a round is due, hand out pieces."""
        if self.rounds is None:
            raise RuntimeError("The rounds are planned in `begin`, which did not run.")
        remap = None
        if self.total < self.rounds.target_total:
            if self.layers[0].listening:
                self._smooth()
            if self.rounds.at(report.step):
                remap = self._allocate(report.step)
            self._listen(report.step + 1)
        report.extra["total_rank"] = self.total
        report.extra["num_trainable"] = sum(
            p.numel() for layer in self.layers for b in layer.bundles for p in b.parameters()
        )
        return remap

    def _listen(self, step: int) -> None:
        """Score a step when it is its turn, and always where a round follows; never again once everything is handed out."""
        assert self.rounds is not None
        growing = self.total < self.rounds.target_total
        turn = growing and (step % self.params.score_every == 0 or self.rounds.at(step))
        for layer in self.layers:
            layer.listening = turn
            layer.forget()

    @torch.no_grad()
    def _smooth(self) -> None:
        """I = b1 I + (1 - b1) s;  U = b2 U + (1 - b2) |s - I|; a layer that no gradient reached scores 0."""
        p, none = self.params, self.importance.new_zeros(())
        score = torch.stack([none if layer.score is None else layer.score.float() for layer in self.layers])  # [layers]
        self.importance = p.beta1 * self.importance + (1 - p.beta1) * score
        self.uncertainty = p.beta2 * self.uncertainty + (1 - p.beta2) * (score - self.importance).abs()

    def _ranking(self) -> list[int]:
        """Layers by priority I * U, largest first; equal ones in the order of the model. For the control: by chance."""
        if self.params.winners == "random":
            order: list[int] = torch.randperm(len(self.layers), generator=self.chance).tolist()
            return order
        priority = (self.importance * self.uncertainty).tolist()
        return sorted(range(len(self.layers)), key=lambda i: (-priority[i], i))

    def _allocate(self, step: int) -> Remap:
        """Activate pieces in the `top_h` best layers, never beyond the target; what learns newly starts a schedule of its own."""
        assert self.rounds is not None
        left = self.rounds.target_total - self.total
        gains: dict[int, int] = {}
        for i in self._ranking():
            gain = min(self._incre, left, self._limit(self.layers[i]) - self.layers[i].rank)
            if gain > 0 and len(gains) < self.rounds.top_h:
                gains[i], left = gain, left - gain
        replaced: dict[str, nn.Parameter] = {}
        tensors: dict[str, tuple[str | None, Tensor | None]] = {}
        removed: list[str] = []
        for i, (name, layer) in enumerate(zip(self.names, self.layers, strict=True)):
            if i in gains:
                self._activate(name, layer, gains[i], replaced, tensors)
                if left > 0:
                    self._refill(layer)
                    if (bundle := layer.reserve) is not None:
                        replaced |= {
                            f"{name}.{len(layer.bundles) - 1}.{leaf}": p for leaf, p in bundle.named_parameters()
                        }
            if left == 0 and layer.reserve is not None:  # e = 0 from now on means: they are not needed any more
                removed += [f"{name}.{len(layer.bundles) - 1}.{leaf}" for leaf in ("a", "b")]
                layer.pop()
        total = self.total
        self.history.append(
            {"step": step, "total_rank": total, "gains": {self.names[i]: gains[i] for i in sorted(gains)}}
        )
        return Remap(replaced=replaced, tensors=tensors, removed=tuple(removed), born=step)

    def _activate(
        self,
        name: str,
        layer: GrowingLinear,
        gain: int,
        replaced: dict[str, nn.Parameter],
        tensors: dict[str, tuple[str | None, Tensor | None]],
    ) -> None:
        """Turn `gain` pieces of the reserve into learning ones. Their a and b keep values, optimizer state and group; e is born."""
        if layer.reserve is None:  # without advance learning pieces are drawn when they are needed
            bundle = layer.append(*layer.draw(gain, self.pieces), True)
            replaced |= {f"{name}.{len(layer.bundles) - 1}.{leaf}": p for leaf, p in bundle.named_parameters()}
            return
        old = layer.pop()
        a, b, size = old.a.detach(), old.b.detach(), len(old)
        bundle = layer.append(a[:gain].clone(), b[:, :gain].clone(), True, e=RESERVE)
        here = f"{name}.{len(layer.bundles) - 1}"
        if gain == size:
            bundle.a, bundle.b = old.a, old.b
        else:  # the last round may have fewer pieces left than wait here
            index = torch.arange(a.shape[0] * a.shape[1]).view_as(a)[:gain]
            replaced[f"{here}.a"], tensors[f"{here}.a"] = bundle.a, (f"{here}.a", index)
            index = torch.arange(b.shape[0] * b.shape[1]).view_as(b)[:, :gain]
            replaced[f"{here}.b"], tensors[f"{here}.b"] = bundle.b, (f"{here}.b", index)
        assert bundle.e is not None
        replaced[f"{here}.e"] = bundle.e

    # ── state ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def state_dict(self) -> dict[str, Any]:
        return {
            "shape": {name: layer.shape() for name, layer in zip(self.names, self.layers, strict=True)},
            "rounds": asdict(self.rounds) if self.rounds is not None else None,
            "listening": self.layers[0].listening,
            "history": [dict(entry) for entry in self.history],
            "importance": self.importance,
            "uncertainty": self.uncertainty,
            "pieces": self.pieces.get_state(),
            "chance": self.chance.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give every layer the bundles it had; what they hold comes with the trainables."""
        for name, layer in zip(self.names, self.layers, strict=True):
            layer.rebuild(state["shape"][name])
            layer.listening = state["listening"]
        self.rounds = Rounds(**state["rounds"]) if state["rounds"] is not None else None
        self.history = [dict(entry) for entry in state["history"]]
        self.importance = state["importance"].to(self.importance)
        self.uncertainty = state["uncertainty"].to(self.uncertainty)
        self.pieces.set_state(state["pieces"])
        self.chance.set_state(state["chance"])

    # ── taking it home ────────────────────────────────────────────────────────────────────────────────────────────────

    def merge(self, model: nn.Module) -> bool:
        for name, layer in zip(self.names, self.layers, strict=True):
            replace(model, name, layer.plain())
        return True

    def export(self, model: nn.Module) -> Payload:
        """A LoRA with a rank and a strength for every layer, and the history of the allocation beside it."""
        fresh = self.ctx.task.fresh(model)
        tensors = {PEFT_PREFIX + name: tensor for name, tensor in fresh_tensors(model, fresh).items()}
        ranks: dict[str, int] = {}
        alphas: dict[str, float] = {}
        for name, layer in zip(self.names, self.layers, strict=True):
            a, b = layer.low_rank()
            tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"], tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"] = a, b
            ranks[name], alphas[name] = a.shape[0], layer.scale * a.shape[0]  # peft divides by the rank again
        p = self.params
        config = lora_config(
            model, self.ctx.facts.model, self.names, fresh, r=p.target_rank, lora_alpha=p.alpha, lora_dropout=0.0,
            rank_pattern=ranks, alpha_pattern=alphas,
        )  # fmt: skip
        told = {
            "ranks": {name: layer.rank for name, layer in zip(self.names, self.layers, strict=True)},
            "total_rank": self.total,
            "rounds": asdict(self.rounds) if self.rounds is not None else None,
            "history": self.history,
        }
        return Payload(layout="peft", config=config, tensors=tensors, files={"allocation.json": told})

    def restore(self, model: nn.Module, payload: Payload) -> None:
        for name, layer in zip(self.names, self.layers, strict=True):
            scale = payload.config["alpha_pattern"][name] / payload.config["rank_pattern"][name]
            a, b = (payload.tensors[f"{PEFT_PREFIX}{name}.lora_{leaf}.weight"] for leaf in "AB")
            layer.load(a, b, scale)
        load_fresh(model, payload.tensors, self.ctx.task.fresh(model), PEFT_PREFIX)


class Orthogonality(LossTerm):
    """weight * mean over all A and B of how far their pieces are from being orthonormal."""

    def __init__(self, part: IncrementalRank, weight: float) -> None:
        self.part, self.weight = part, weight

    def term(self, model: nn.Module, batch: Mapping[str, Tensor], loss: Loss, share: float) -> Tensor:
        if self.weight == 0.0:
            return loss.total.new_zeros(())
        with torch.autocast(loss.total.device.type, enabled=False):
            disorder = torch.stack([layer.disorder() for layer in self.part.layers]).mean() / 2
        return self.weight * share * disorder


class IncreLoRA(TrainMethod):
    """Incremental parameter allocation."""

    card = Card(
        slug="increlora",
        title="Growing-rank LoRA (IncreLoRA)",
        pick_when="Pick this when the budget of numbers that may change is tiny, and you want the computer to hand it out, piece by piece, to the layers "
        "that turn out to matter.",
        summary="Every layer starts with the smallest possible addition. While the model learns, a score says which layers would gain most from more, "
        "and those get another piece, round after round, until the budget is spent in the first half of the run. The result is an ordinary LoRA file "
        "in which every layer has a size of its own.",
        paper="IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient Fine-tuning",
        year=2023,
        arxiv="2308.12043",
        algorithm=(
            "Beside each frozen weight W [out, in] stand rank-one pieces: Delta = (alpha / rank) * sum_j b_j e_j a_j; rank counts the active pieces.",
            "Start with one active piece a layer: a, b ~ N(0, 0.02^2), e = 0, so nothing changes yet.",
            "Keep further pieces in reserve: their a and b already learn, with e fixed at 1e-5, so that they are shaped before they are needed.",
            "Each step, add 0.1 times the mean over all stacked A and B of ||A A^T - I||_F and ||B^T B - I||_F to the loss.",
            "Score each layer: s = sum |Delta * dL/dDelta| / sqrt(out * in), from the gradient of the whole optimizer batch.",
            "Smooth: I = b1 I + (1 - b1) s; U = b2 U + (1 - b2) |s - I|; priority S = I * U.",
            "Every `interval` steps after a warm-up: in the `top_h` layers of largest S the reserve becomes active, and new pieces take its place.",
            "What is new gets a learning-rate schedule of its own: it rises from zero and falls until the end of the run.",
            "When the active pieces reach layers * target: stop scoring and drop what is still in reserve.",
            "Export: A = e * a, B = b, with a rank and a strength for every layer, as a plain LoRA.",
        ),
        avoid_when="The budget is ample, where plain LoRA is simpler and as good, or the run is short: pieces start slowly, and in a few hundred steps plain "
        "LoRA is ahead.",
        traps=(
            "alpha / rank shrinks all pieces of a layer at once when one is added, and the loss bumps. The strength can be kept fixed instead.",
            "Scoring needs the dense product of every layer; it ends with the last allocation, and can be done every few steps.",
            "Released code compares with a threshold and counts layers, so that it can pass the target, and then never stops scoring. Here exactly the "
            "best layers win, the last round is cut to what is left, and the end is tested with 'at least'.",
            "Released code scores the last micro-batch alone. Here gradients of all micro-batches are added up before the absolute value.",
            "A helper in released code compares each piece with itself and so misses that pieces overlap. Here all pieces of a layer stand in one matrix.",
            "Three small differences from released code: allocation comes just behind the optimizer step instead of just before it; pieces in reserve are "
            "silent whenever the model is measured or exported; the strength is divided by the rank itself, without 1e-5 beside it.",
            "I * U favours layers with noisy scores.",
            "Small matrices, such as k and v with grouped attention, are not compared quite fairly in spite of the square root.",
        ),
        figures=(
            Figure(
                claim="DeBERTaV3-base on GLUE against LoRA, AdaLoRA, BitFit and adapters at 0.33 and 1.33 million numbers",
                paper="higher average, the largest gains with the small budget (abstract; figures per task unconfirmed)",
                ours="not seen in short runs: a 260K-parameter Llama on Shakespeare, 120 steps, held-out loss 3.058 ± 0.021, LoRA of equal total rank "
                "3.003 ± 0.002 (two seeds, each at a rate that suits it)",
            ),
            Figure(
                claim="One layer needs a change of rank 4: it ends with the highest rank, and the loss beats an even LoRA of equal total rank",
                paper="no figure known",
                ours="highest in 10 of 10 seeds (two of them shared); distance 0.006 ± 0.004, even LoRA 0.183 ± 0.218, pieces by chance 0.165 ± 0.214",
            ),
        ),
        cost=Cost(time=4, memory=3, size=1),
        family="Adapters",
    )
    needs = Needs(linear_layers=True)
    slots = (Slot.PARAMETRIZATION, Slot.LOSS_TERM)
    cannot = {"compile": "Its layers grow as it learns, and code is made once, at the start."}
    presets = {
        "tiny": {"target_rank": 2, "alpha": 8, "init_warmup": 1, "interval": 1},
        "paper": {"target_rank": 2, "incre_rank": 1, "alpha": 16, "orth_weight": 0.1, "targets": ALL},
    }

    class Params(HyperParams):
        """Hyperparameters of IncreLoRA."""

        target_rank: int = dial(
            2,
            label="Average rank at the end",
            unit="1",
            low=1,
            high=1024,
            tier="basic",
            paper=2,
            help="How many pieces there are for each layer on average when everything is handed out: more can learn more and makes a larger file.",
        )
        lora_r: int = dial(
            1,
            label="Rank at the start",
            unit="1",
            low=1,
            high=256,
            paper=1,
            help="How many pieces every layer has from the start, whether it needs them or not.",
        )
        incre_rank: int | None = dial(
            None,
            label="Pieces per winner",
            unit="1",
            low=1,
            high=256,
            paper=1,
            suggested="Half of the average rank at the end: 1, 2, 3, 4 for 2, 4, 6, 8, as in the paper.",
            help="How many pieces a layer gets when it wins a round.",
        )
        init_warmup: int | None = dial(
            None,
            label="First allocation after",
            unit="steps",
            low=0,
            high=1_000_000,
            paper="100 to 1000",
            suggested="A twentieth of the run: by then the scores have settled.",
            help="Nothing is handed out in the first steps, because the scores are not to be trusted yet.",
        )
        interval: int | None = dial(
            None,
            label="Allocation every",
            unit="steps",
            low=1,
            high=1_000_000,
            paper="100 to 1000",
            suggested="A twenty-fifth of the run: about eleven rounds in its first half.",
            help="How many steps lie between two rounds, so that new pieces can show what they are worth.",
        )
        top_h: int | None = dial(
            None,
            label="Winners per round",
            unit="layers",
            low=1,
            high=100_000,
            paper="2 to 18",
            suggested="Just as many as it takes to hand out everything in the first half of the run.",
            help="How many layers get more pieces in one round.",
        )
        alpha: float = dial(
            16.0,
            label="Strength",
            unit="1",
            low=0.01,
            high=65536,
            paper=16,
            help="How strongly the additions count; it is divided by the number of pieces.",
        )
        scale: Literal["rank", "fixed"] = dial(
            "rank",
            label="Strength is divided by",
            paper="rank",
            help="rank: by the pieces that a layer has at the moment, so all shrink when one is added; fixed: by the average rank at the end, always.",
        )
        orth_weight: float = dial(
            0.1,
            label="Keep pieces apart",
            unit="1",
            low=0.0,
            high=10.0,
            paper=0.1,
            help="How strongly the pieces of a layer are kept from learning the same thing.",
        )
        beta1: float = dial(
            0.85,
            label="Memory of the score",
            unit="1",
            low=0.0,
            high=0.9999,
            paper=0.85,
            help="How long earlier scores of a layer count; closer to 1 is longer.",
        )
        beta2: float = dial(
            0.85,
            label="Memory of its unrest",
            unit="1",
            low=0.0,
            high=0.9999,
            paper=0.85,
            help="How long earlier changes of the score count; closer to 1 is longer.",
        )
        score_every: int = dial(
            1,
            label="Score every",
            unit="steps",
            low=1,
            high=1_000_000,
            paper=1,
            help="Scoring costs one more product a layer; every few steps is quicker and the scores are rougher.",
        )
        advance: bool = dial(
            True,
            label="Learn in advance",
            paper=True,
            help="Lets pieces learn a little before they are handed out, so that they are of use at once.",
        )
        winners: Literal["priority", "random"] = dial(
            "priority",
            label="Who wins",
            paper="priority",
            help="priority: the layers with the largest scores; random: any layers, to see what the scores are worth.",
        )
        targets: str = dial(ALL, label="Layers", help=TARGETS_HELP, paper=ALL)

    @classmethod
    def supports(cls, facts: Facts) -> Verdict:
        verdict = linear_verdict(cls.card.title, facts)
        return super().supports(facts) if verdict.ok else verdict

    @classmethod
    def check(cls, params: Any, facts: Facts) -> list[Fault]:
        shapes = targets(params.targets, facts.model)
        limits = [(name, min(shape)) for name, shape in shapes.items()]
        faults = target_faults(params.targets, facts.model)
        faults += rank_faults(params.target_rank, limits, noun="independent directions", where="target_rank")
        if params.lora_r >= params.target_rank:
            faults.append(
                Fault(
                    where="target_rank",
                    what=f"The average rank at the end is {params.target_rank:,} and the rank at the start is {params.lora_r:,}.",
                    why="Then there would be nothing to hand out.",
                    way_out=f"Choose {params.lora_r + 1:,} or more for the end, or plain LoRA.",
                    code="nothing_to_grow",
                )
            )
        if len(shapes) == 1 and not faults:
            faults.append(
                Fault(
                    where="targets",
                    what=f"The only target is {next(iter(shapes))}.",
                    why="With one layer there is nobody to choose between.",
                    way_out=f"Write {ALL}, or choose plain LoRA.",
                    code="one_layer",
                )
            )
        return faults

    @classmethod
    def claims(cls, params: Any, facts: Facts) -> frozenset[str]:
        return frozenset(f"{name}.weight" for name in targets(params.targets, facts.model))

    @classmethod
    def num_trainable(cls, params: Any, facts: Facts) -> int:
        """At the end, if every layer had the average rank; which layers win is not known before."""
        return sum(params.target_rank * (out + into + 1) for out, into in targets(params.targets, facts.model).values())

    @classmethod
    def suggest(cls, recipe: Recipe, params: Any, facts: Facts) -> list[Suggestion]:
        size = facts.model.num_parameters
        rate = 2e-2 if size < 2_000_000 else 2e-3 if size < 200_000_000 else 5e-4  # measured; card; card
        return [
            Suggestion(
                where="settings.learning_rate",
                value=rate,
                reason=f"A piece is a product of three small numbers and starts more slowly than LoRA, so it takes larger steps: {rate:g} suits a model "
                f"of {size:,} parameters.",
            )
        ]

    def parts(self, ctx: PartContext) -> Sequence[Any]:
        part = IncrementalRank(ctx, list(targets(self.params.targets, ctx.facts.model)), self.params)
        return [part, Orthogonality(part, self.params.orth_weight)]
