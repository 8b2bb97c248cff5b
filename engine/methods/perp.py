"""PERP: prune a model and repair it by retraining almost nothing, or block by block (arXiv 2312.15230)."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any, Literal

from engine.core.errors import EngineError, Fault
from engine.core.facts import Facts
from engine.core.method import Card, Cost, Figure, FlowMethod, Needs, Suggestion, Verdict
from engine.core.params import HyperParams, dial
from engine.core.recipe import Recipe
from engine.core.work import Outcome, Report, Step, StepResult
from engine.io.tensors import TensorReader
from engine.parts.masked import head_faults
from engine.parts.pruning import (
    MASK_FILE,
    PatternName,
    pattern_dial,
    pattern_faults,
    prunable,
    prunable_verdict,
    same_tensor,
    samples_dial,
    sparsity_dial,
    unpack_bits,
)

_WORDS = {
    "vectors": "norms and offsets",
    "masklora": "MaskLoRA",
    "scalelora": "ScaleLoRA",
    "lora-prune": "LoRA-Prune",
}


class PERP(FlowMethod):
    """Prune, repair a small set, keep every zero."""

    presets = {
        "tiny": {"steps": 8, "samples": 8, "r": 4, "alpha": 8},
        "paper": {"criterion": "magnitude", "sparsity": 0.5, "steps": 1000},
    }
    needs = Needs(kinds=("decoder",))
    card = Card(
        slug="perp",
        title="PERP",
        pick_when="Pick this when half of a big model's numbers should go and its quality should be back within minutes on one card, with the deletions kept.",
        summary="First the weights that matter least are deleted. Then a very small set of numbers learns for a short while: norms and offsets, or thin matrices "
        "that never touch a deleted place. At the end everything is folded in: a plain model with the same zeros, and most of its quality back.",
        paper="PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs",
        year=2023,
        arxiv="2312.15230",
        algorithm=(
            "Prune every linear layer inside the blocks: by magnitude, Wanda, SparseGPT, or at random; unstructured or n:m. Note the mask.",
            "Freeze everything and switch on a small set: norms and offsets, MaskLoRA, ScaleLoRA or LoRA-Prune on the pruned layers, the output layer through LoRA.",
            "Either retrain with the language-model loss: AdamW without decay, 10 % warm-up, a straight line down, few steps.",
            "Or reconstruct: every block learns to answer like the dense block on what the repaired blocks before it make.",
            "Fold in what was learned; check that no deleted weight came back.",
            "Report the loss of the dense, the pruned and the repaired model on the same held-out texts.",
        ),
        avoid_when="Under about 40 % sparsity, where a pruned model hardly suffers; or when you can afford to retrain every kept weight for long.",
        traps=(
            "The texts must be like what the model was made for: repairing on another domain is fine-tuning, and 'recovery' then says nothing.",
            "Losses are those of the folded sparse model; the loss of an unmerged plain LoRA is not that of a sparse model.",
            "Models like Llama have norms but no offsets, so that norms and offsets together are a little less there than in the paper.",
            "The published code reads the mask off the zeros in every step; here it is stored when the model is pruned.",
            "The right learning rate differs between the small sets by ten times and more.",
        ),
        figures=(
            Figure(
                claim="Share of the loss jump of pruning that comes back", paper="close to full retraining (abstract)",
                ours="MaskLoRA 87 %, ScaleLoRA 86 %, norms alone 40 %, blocks without any LM loss 68 %, every kept weight "
                "91 % (stories260k, 60 % deleted by magnitude, 200 steps, 2 seeds)",
            ),
            Figure(claim="Parameters retrained on OPT 2.7B to 30B that match full retraining", paper="0.27 to 0.35 % (abstract of the first version)"),
            Figure(claim="Parameters that are enough at moderate sparsity", paper="0.01 to 0.05 % (abstract of later versions)"),
            Figure(claim="Repair of a 30B model on one A100", paper="within minutes (abstract)"),
        ),
        cost=Cost(time=3, memory=2, size=5),
        family="Sparsity",
    )  # fmt: skip

    class Params(HyperParams):
        """How to prune and what to repair."""

        criterion: Literal["magnitude", "wanda", "sparsegpt", "random"] = dial(
            "magnitude",
            label="Delete by",
            tier="basic",
            paper="magnitude",
            help="The smallest weights; or with a look at your texts: the weights that little flows through (wanda), or with corrections of the others "
            "(sparsegpt); or random ones, as a baseline.",
        )
        sparsity: float = sparsity_dial()
        pattern: PatternName = pattern_dial()
        how: Literal["retrain", "reconstruct"] = dial(
            "retrain",
            label="Repair by",
            paper="retrain",
            help="Training the whole model on your texts, or teaching block after block to answer like the dense one (needs less memory).",
        )
        small_set: Literal["vectors", "masklora", "scalelora", "lora-prune"] = dial(
            "masklora",
            label="What learns",
            paper="masklora",
            help="Norms and offsets alone (vectors); or thin matrices that add (masklora), scale (scalelora), or are cut to the kept places last (lora-prune).",
        )
        with_vectors: bool = dial(
            True,
            label="Norms and offsets too",
            paper=True,
            help="Lets norms and offsets learn beside the thin matrices.",
        )
        head: bool = dial(
            False,
            label="Output layer too",
            paper=True,
            help="Lets the output layer, which is never pruned, learn through LoRA; only where it has weights of its own.",
        )
        steps: int = dial(
            1000,
            label="Steps of repair",
            unit="steps",
            low=1,
            high=1_000_000,
            paper=1000,
            help="How many corrections are made: of the whole model, or of each block.",
        )
        r: int = dial(
            16,
            label="Rank",
            unit="1",
            low=1,
            high=4096,
            paper=16,
            help="How much room the thin matrices have: more can repair more.",
        )
        alpha: float = dial(
            32.0,
            label="Strength",
            unit="1",
            low=0.01,
            high=65536,
            paper=32,
            help="How strongly an addition counts; it is divided by the rank.",
        )
        warmup: float = dial(
            0.1,
            label="Gentle start",
            unit="share",
            low=0.0,
            high=0.9,
            paper=0.1,
            help="The learning rate rises over this share of the steps.",
        )
        samples: int = samples_dial()

    @classmethod
    def supports(cls, facts: Facts) -> Verdict:
        verdict = super().supports(facts)
        return prunable_verdict(cls.card.title, facts.model) if verdict.ok else verdict

    @classmethod
    def check(cls, params: Any, facts: Facts) -> list[Fault]:
        faults = pattern_faults(params.pattern, prunable(facts.model))
        if params.how == "reconstruct" and (params.small_set == "lora-prune" or params.head):
            what = "The output layer" if params.head else "LoRA-Prune"
            faults.append(
                Fault(
                    where="head" if params.head else "small_set", what=f"{what} cannot be repaired block by block.",
                    why="It lies outside of every block." if params.head else "A block is measured with its mask on, so there is nothing to cut off at the end.",
                    way_out="Repair by retraining, or " + ("switch the output layer off." if params.head else "choose masklora."),
                    code="excludes",
                )
            )  # fmt: skip
        elif params.head:
            faults += head_faults(facts.model)
        least = min(min(shape) for shape in prunable(facts.model).values())
        if params.small_set != "vectors" and params.how == "retrain" and params.r > least:
            faults.append(
                Fault(
                    where="r", what=f"'r' is {params.r:,}.", why=f"The narrowest layer has only {least:,} independent directions.",
                    way_out=f"Choose {least:,} or less.", code="too_large",
                )
            )  # fmt: skip
        return faults

    @classmethod
    def suggest(cls, recipe: Recipe, params: Any, facts: Facts) -> list[Suggestion]:
        size = facts.model.num_parameters
        small, middle, large = (
            (3e-2, 3e-3, 5e-4) if params.small_set in {"vectors", "scalelora"} else (5e-3, 2e-3, 5e-4)
        )
        rate = small if size < 2_000_000 else middle if size < 200_000_000 else large
        return [
            Suggestion(
                where="settings.learning_rate",
                value=rate,
                reason=f"{_WORDS[params.small_set]} of a model of {size:,} parameters take{'s' * (params.small_set != 'vectors')} steps of {rate:g} well.",
            )
        ]

    @classmethod
    def num_runs(cls, params: Any, facts: Facts) -> float:
        return 1.0

    def plan(self, ctx: Any) -> Generator[Step | list[Step], Any, Outcome]:
        """Prune, repair, check the zeros, compare the losses."""
        pruned: StepResult = yield Step(name="prune", title="Deleting weights", recipe=self._prune(ctx))
        title = f"Repairing with {_WORDS[self.params.small_set]}"
        repaired: StepResult = yield Step(name="repair", title=title, recipe=self._repair(ctx, pruned))
        back = returned_weights(pruned.artifact / "merged", repaired.artifact / "merged")
        if back:
            raise EngineError(
                Fault(
                    where="methods", what=f"Deleted weights came back in {back[0]}.", why="The repair did not keep the zeros.",
                    way_out="Report this; the pruned model is kept among the steps.", code="zeros_lost",
                ),
                "bug",
            )  # fmt: skip
        return self._outcome(pruned, repaired)

    def _prune(self, ctx: Any) -> Recipe:
        p = self.params
        shape = {"sparsity": p.sparsity, "pattern": p.pattern}
        by_size = {"magnitude": "magnitude", "random": "random"}.get(p.criterion)
        if by_size is not None:
            recipe: Recipe = ctx.transform("magnitude-pruning", {**shape, "score": by_size, "mask_seed": ctx.seed})
        else:
            recipe = ctx.transform(p.criterion, {**shape, "samples": p.samples})
        return recipe

    def _repair(self, ctx: Any, pruned: StepResult) -> Recipe:
        p = self.params
        rate = ctx.recipe.settings.learning_rate
        if p.how == "reconstruct":
            small = "norms" if p.small_set == "vectors" else p.small_set
            given = {
                "small_set": small, "with_vectors": p.with_vectors, "r": p.r, "alpha": p.alpha, "steps": p.steps,
                "warmup": p.warmup, "samples": p.samples, "learning_rate": rate,
            }  # fmt: skip
            recipe: Recipe = ctx.transform("block-reconstruction", given, models=(pruned.model, ctx.recipe.model))
            return recipe
        methods: list[tuple[str, dict[str, Any]]] = []
        if p.small_set == "vectors" or p.with_vectors:
            methods.append(("bias-norm-tuning", {}))
        thin = {"r": p.r, "alpha": p.alpha}
        if p.small_set == "scalelora":
            methods.append(("scalelora", {"r": p.r}))
        elif p.small_set != "vectors":
            when = "merge" if p.small_set == "lora-prune" else "always"
            methods.append(("masklora", {**thin, "when": when, "head": p.head}))
        if p.head and p.small_set in {"vectors", "scalelora"}:
            methods.append(("masklora", {**thin, "targets": "none", "head": True}))
        methods += [("adamw", {"weight_decay": 0.0}), ("linear", {"warmup": p.warmup, "final": 0.0})]
        most = min(p.steps, ctx.recipe.settings.max_steps or p.steps)
        recipe = ctx.train(methods, model=pruned.model, epochs=1000.0, max_steps=most)
        return recipe

    def _outcome(self, pruned: StepResult, repaired: StepResult) -> Outcome:
        losses = {
            "dense": float(pruned.description["before"]["eval_loss"]),
            "pruned": float(pruned.metrics["eval_loss"]),
            "repaired": float(repaired.metrics["eval_loss"]),
        }
        jump = losses["pruned"] - losses["dense"]
        share = (losses["pruned"] - losses["repaired"]) / jump if jump > 0 else None
        density = float(pruned.description["report"]["mask"]["density"])
        said = f"Deleting {1 - density:.0%} of the weights in the blocks moved the held-out loss from {losses['dense']:.3f} to {losses['pruned']:.3f}"
        said += f"; after the repair it is {losses['repaired']:.3f}"
        said += f", which is {share:.0%} of the jump back." if share is not None else "."
        numbers: dict[str, Any] = {f"{name}_loss": value for name, value in losses.items()}
        numbers |= {
            "recovered": share,
            "density": density,
            "num_trainable": int(repaired.description.get("num_trainable", 0)),
        }
        report = Report(
            title="Pruned and repaired",
            sentence=said,
            numbers=numbers,
            table=tuple({"model": name, "eval_loss": value} for name, value in losses.items()),
            notes=("Every deleted weight is still exactly zero.",),
        )
        return Outcome(message=said, take=repaired, report=report)


def returned_weights(pruned: Path, repaired: Path) -> list[str]:
    """Names of tensors in the repaired model folder that are not zero where the mask beside the pruned model says deleted; exact."""
    back = []
    with TensorReader(pruned / MASK_FILE) as masks, TensorReader(repaired / "model.safetensors") as weights:
        for name in weights:
            key = same_tensor(name, set(masks))
            if key is not None:
                weight = weights[name]
                if bool((weight[~unpack_bits(masks[key], weight.shape)] != 0).any()):
                    back.append(name)
    return back
