"""Self-tuning network: dropout, weight decay and augmentation find their own strength while the model learns (arXiv 1903.03088)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from engine.core.errors import Fault
from engine.core.facts import Facts, ModelFacts
from engine.core.method import Card, Cost, Figure, Needs, Suggestion, TrainMethod, Verdict
from engine.core.params import HyperParams, dial
from engine.core.recipe import Recipe
from engine.core.slots import Phase, Slot
from engine.parts.best_response import Copy, Knob, Knobs
from engine.parts.optimizers import full_rate
from engine.parts.ranges import Range
from engine.parts.self_tuning import (
    DROPOUT,
    STRETCH,
    WEIGHT_DECAY,
    WORDS,
    BestResponse,
    SelfTuning,
    SetAside,
    planned_aside,
)
from engine.parts.targets import TARGETS_HELP, target_faults, targets
from engine.train.parts import PartContext

LAST, HEAD = "last-block", "head"
_NUMBER = re.compile(r"\.(\d+)\.")


class SelfTuningNetwork(TrainMethod):
    """Learns its own regularisation in a single run."""

    card = Card(
        slug="stn",
        title="Self-tuning network",
        pick_when="Pick this when you have few or noisy examples and do not know how strongly the model must be held back from memorising them: one "
        "run finds the strength by itself, and even changes it on the way.",
        summary="Dropout, weight decay and hidden words keep a model from memorising. How strong they should be is usually found by training many "
        "times. Here the last layers also learn how they would answer to another strength, so that a few examples set aside can pull the strength "
        "in the right direction while the model learns. The result is an ordinary model, and the schedule that was found lies beside it.",
        paper="Self-Tuning Networks: Bilevel Optimization of Hyperparameters using Structured Best-Response Functions",
        year=2019,
        arxiv="1903.03088",
        algorithm=(
            "Set a share of the training examples aside. They never teach the weights; the held-out examples stay a third, untouched part.",
            "Each regulariser is a number without limits that a map bends into its range: low + (high - low) sigmoid(h), low + softplus(h) where the "
            "range is open above, and the floor of it for whole numbers. Each has a spread, softplus(s).",
            "Every wrapped layer keeps two copies of its weight, W and Wh, and a thin map M: y = W x + b + cw * (Wh x) + cb * bh with [cw, cb] = M h.",
            "M starts at zero, so the first answers are those of the base model.",
            "Training step (two in a row): every example gets its own h + spread * noise and is regularised with just that strength; the loss moves W, "
            "b, Wh, bh and M, while h and s stand still.",
            "Tuning step (one after them): a batch that was set aside, drawn with noise again, no regulariser at all, network frozen. Adam moves h and s "
            "along the gradient of the loss minus tau times the entropy of the noise; it comes through M alone.",
            "Warm-up: no tuning steps at first. Measurements use h without noise.",
            "Export: W + diag(cw) Wh and b + cb * bh at the final h are an ordinary layer; the trajectory of the strengths is saved.",
        ),
        avoid_when="There are a hundred thousand examples: they regularise by themselves. Or you want to tune the learning rate: it does not change "
        "where training ends, so this method cannot see it.",
        traps=(
            "A regulariser left on in the tuning step would give its strength a direct path and the wrong gradient. Here it is off there.",
            "One shared draw for a whole batch makes the response far noisier; here each example has its own, and packed rows are unpacked for it.",
            "With tau = 0 the spread shrinks until nothing more is learned about other strengths; with a large tau it explodes.",
            "Weight decay must be part of the loss of every example; the optimizer's own weight decay cannot be tuned and is better left at 0.",
            "The examples set aside are used up by tuning: quality is measured on the held-out ones.",
            "Wrapped layers cost twice the weights and activations, so only the last layers and the new classifier are wrapped.",
            "The paper starts its layers at random, M with a small spread. A pretrained model must start as itself: here M starts at zero, and the "
            "second copy is the pretrained weight, or random.",
            "A step of the regularisers is small: in a short run with the paper's rate they would hardly move. The usual rate here follows the length.",
        ),
        figures=(
            Figure(
                claim="PTB LSTM, perplexity valid/test: grid, random, Bayesian search, self-tuning",
                paper="97.32/94.58, 84.81/81.46, 72.13/69.29, 70.30/67.68 (unconfirmed)",
            ),
            Figure(
                claim="CIFAR-10 AlexNet, loss valid/test: grid, random, Bayesian search, self-tuning",
                paper="0.794/0.809, 0.921/0.752, 0.636/0.651, 0.575/0.576 (unconfirmed)",
            ),
            Figure(
                claim="Output dropout alone, perplexity valid/test: best fixed rate 0.68, self-tuning, plain run with its schedule",
                paper="85.83/83.19, 82.58/79.02, 82.87/79.93 (unconfirmed)",
            ),
            Figure(
                claim="Digits, 300 images with wrong labels: test loss from three starts against the best of five fixed rates, and passes",
                paper="not measured",
                ours="1.26, 1.26, 1.25 against 1.27 (seed 1); 1.21, 1.22, 1.19 against 1.18 (seed 2); 3,300 passes against 12,000",
            ),
            Figure(
                claim="MiniLM, 320 bank requests with wrong labels: loss on clean ones against the best of three fixed rates, and the start held fixed",
                paper="not measured",
                ours="0.10 against 0.09 and 0.28 (seed 1); 0.19 against 0.09 and 0.19 (seed 2): 140 steps can be too short",
            ),
        ),
        cost=Cost(time=3, memory=2, size=2),
        family="Search",
    )
    needs = Needs(tasks=("classify", "causal_lm", "instruct"))
    slots = (Slot.PARAMETRIZATION, Slot.DATA_POLICY, Slot.UPDATE_RULE)
    phase = Phase.SELECT
    presets = {
        "tiny": {"warmup": 0.2, "stretch": True},
        "paper": {"warmup": 5.0, "hyper_rate": 3e-3, "scale_rate": 3e-3, "pull": "zero", "copy_of": "random"},
    }

    class Params(HyperParams):
        """Which regularisers are tuned, between which limits, and how."""

        dropout: bool = dial(
            True,
            label="Tune dropout",
            help="Leaves out a share of the inputs of the wrapped layers at random while learning; the share is tuned.",
        )
        dropout_start: float = dial(
            0.05,
            label="Dropout at the start",
            unit="share",
            low=0.0,
            high=0.95,
            paper=0.05,
            help="The share that is left out before tuning begins. The end hardly depends on it.",
        )
        dropout_high: float = dial(
            0.9,
            label="Most dropout",
            unit="share",
            low=0.05,
            high=0.95,
            paper=0.9,
            help="The share that is left out never grows beyond this.",
        )
        dropout_per_layer: bool = dial(
            False,
            label="Each layer its own dropout",
            help="Tunes one share for every wrapped layer instead of one for all: finer, and it needs longer runs.",
        )
        decay: bool = dial(
            True,
            label="Tune weight decay",
            help="Pulls the weights of the wrapped layers back while learning; the strength is tuned.",
        )
        decay_start: float = dial(
            1e-3,
            label="Weight decay at the start",
            unit="1",
            low=1e-6,
            high=10.0,
            help="The strength before tuning begins; it has no upper limit.",
        )
        pull: Literal["start", "zero"] = dial(
            "start",
            label="Weight decay pulls towards",
            paper="zero",
            help="start: the pretrained weights, so that what the model knows is kept; zero: as in the paper. A new classifier is pulled to zero.",
        )
        words: bool = dial(
            True,
            label="Tune hidden words",
            tier="basic",
            help="Covers some words of every text while learning, so that the model does not hang on single words; how many is tuned.",
        )
        words_start: float = dial(
            0.05,
            label="Hidden words at the start",
            unit="share",
            low=0.0,
            high=0.9,
            help="The share of words covered at first.",
        )
        words_high: float = dial(
            0.5, label="Most hidden words", unit="share", low=0.05, high=0.9, help="No more than this share is covered."
        )
        stretch: bool = dial(
            False,
            label="Tune a hidden stretch",
            help="Covers one stretch of neighbouring words in every text; its length, a whole number, is tuned.",
        )
        stretch_start: float = dial(
            1.0, label="Hidden stretch at the start", unit="tokens", low=0.0, high=64, help="Its length at first."
        )
        stretch_high: int = dial(
            8, label="Longest hidden stretch", unit="tokens", low=1, high=64, help="It never grows longer than this."
        )
        random_words: bool = dial(
            False,
            label="Cover with other words",
            help="Puts other words of the same batch in the place of covered ones, instead of a mark. Always so where a model has no such mark.",
        )
        validation_share: float = dial(
            0.2,
            label="Examples set aside",
            unit="share",
            low=0.05,
            high=0.5,
            tier="basic",
            paper=0.2,
            help="This share of the examples sets the regularisers instead of teaching the model. More is steadier and teaches less.",
        )
        targets: str = dial(
            LAST,
            label="Layers",
            help="Which layers learn and respond: last-block (the last layer and what follows it), head (the new classifier alone), "
            f"or as usual. {TARGETS_HELP}",
        )
        head: bool = dial(
            True,
            label="New classifier responds too",
            help="A new classifier, where there is one, is wrapped like the other layers.",
        )
        copy_of: Copy = dial(
            "copy",
            label="Second copy starts as",
            paper="random",
            help="copy: the pretrained weight, so that the first thing a layer can learn is to turn itself up or down; random: as in the paper.",
        )
        train_steps: int = dial(
            2,
            label="Training steps in a row",
            unit="steps",
            low=1,
            high=20,
            paper=2,
            help="So many training steps, then tuning.",
        )
        val_steps: int = dial(
            1,
            label="Tuning steps in a row",
            unit="steps",
            low=1,
            high=20,
            paper=1,
            help="So many tuning steps, then training.",
        )
        warmup: float = dial(
            1.0,
            label="Warm-up",
            unit="epochs",
            low=0.0,
            high=100.0,
            paper=5.0,
            help="Passes over the data before the first tuning step, in which the layers learn to respond.",
        )
        hyper_rate: float | None = dial(
            None,
            label="Learning rate of the regularisers",
            unit="1",
            low=1e-5,
            high=1.0,
            paper=3e-3,
            suggested="So that they can cross their range within the run, from 0.003 to 0.1.",
            help="How far a regulariser moves in one tuning step, before its range bends it.",
        )
        scale_rate: float | None = dial(
            None,
            label="Learning rate of the spreads",
            unit="1",
            low=1e-5,
            high=1.0,
            paper=3e-3,
            suggested="The same as for the regularisers.",
            help="How fast the width of the noise is adapted.",
        )
        spread: float = dial(
            0.5,
            label="Spread at the start",
            unit="1",
            low=0.01,
            high=3.0,
            paper=0.5,
            help="How different the strengths are that neighbouring examples get.",
        )
        tune_scales: bool = dial(
            True,
            label="Tune the spreads too",
            help="Off: the spread stays, and tuning steps use the strengths without noise.",
        )
        entropy: float = dial(
            1e-3,
            label="Weight of the entropy (tau)",
            unit="1",
            low=0.0,
            high=0.1,
            paper=1e-3,
            help="Keeps the spreads from shrinking to nothing. Too much of it and they explode.",
        )
        tune: bool = dial(
            True,
            label="Tune",
            help="Off: every strength stays at its start, without noise. That is an ordinary run of the same layers, to compare with.",
        )

    @classmethod
    def supports(cls, facts: Facts) -> Verdict:
        if not facts.model.linears and facts.task != "classify":
            return Verdict(
                False,
                f"{cls.card.title} wraps ordinary linear layers, and this {facts.model.family} model keeps its weights in another form.",
                "Choose full fine-tuning, or a model of another family, such as Llama or BERT.",
            )
        return super().supports(facts)

    @classmethod
    def check(cls, params: Any, facts: Facts) -> list[Fault]:
        faults = [] if params.targets.strip() in {LAST, HEAD} else target_faults(params.targets, facts.model)
        if not faults and not layers_of(params.targets, facts.model) and not (params.head and facts.task == "classify"):
            faults.append(
                Fault(
                    where="targets",
                    what="No layer would be wrapped.",
                    why="This goal has no new classifier, and no other layer is named."
                    if facts.task != "classify"
                    else "The classifier is left out, and no other layer is named.",
                    way_out=f"Write {LAST}, or names of layers.",
                    code="no_such_layer",
                )
            )
        if not (params.dropout or params.decay or params.words or params.stretch):
            faults.append(
                Fault(
                    where="dropout",
                    what="Nothing is left to tune.",
                    why="Dropout, weight decay, hidden words and the hidden stretch are all switched off.",
                    way_out="Switch at least one of them on, or choose another method.",
                    code="nothing_to_tune",
                )
            )
        for name in ("dropout", "words", "stretch"):
            start, high = getattr(params, f"{name}_start"), getattr(params, f"{name}_high")
            if getattr(params, name) and start > high:
                faults.append(
                    Fault(
                        where=f"{name}_start",
                        what=f"'{name}_start' is {start:g}.",
                        why=f"That lies above its limit of {high:g}.",
                        way_out=f"Choose {high:g} or less, or raise '{name}_high'.",
                        code="out_of_range",
                    )
                )
        rows, holdout = facts.data.num_rows, 0.15  # the usual share; the exact one shows when the data are split
        if planned_aside(rows, holdout, params.validation_share) < 2:
            faults.append(
                Fault(
                    where="validation_share",
                    what=f"{rows:,} examples are too few to set {params.validation_share:.0%} of them aside.",
                    why="Fewer than two examples would have to decide how strong the regularisers should be.",
                    way_out="Give more examples, or choose a method that tunes nothing.",
                    code="too_few_rows",
                )
            )
        return faults

    @classmethod
    def claims(cls, params: Any, facts: Facts) -> frozenset[str]:
        names = (f"{layer}.{short}" for layer in layers_of(params.targets, facts.model) for short in ("weight", "bias"))
        return frozenset(name for name in names if name in facts.model.tensors)

    @classmethod
    def num_trainable(cls, params: Any, facts: Facts) -> int:
        layers = layers_of(params.targets, facts.model)
        number = len(knobs_of(params, list(layers), facts.task))
        biased = {layer for layer in layers if f"{layer}.bias" in facts.model.tensors}
        return sum(
            2 * out * (into + (name in biased)) + out * (1 + (name in biased)) * number
            for name, (out, into) in layers.items()
        )

    @classmethod
    def suggest(cls, recipe: Recipe, params: Any, facts: Facts) -> list[Suggestion]:
        rate = full_rate(facts.model)
        return [
            Suggestion(
                where="settings.learning_rate",
                value=rate,
                reason=f"Whole weights of the last layers learn, and those of a model of {facts.model.num_parameters:,} parameters take steps of {rate:g} well.",
            )
        ]

    def parts(self, ctx: PartContext) -> Sequence[Any]:
        p, layers = self.params, list(layers_of(self.params.targets, ctx.facts.model))
        knobs = Knobs(knobs_of(p, layers, ctx.recipe.task), p.spread)
        wrapped = BestResponse(ctx, layers, knobs, head=p.head, pull_to_start=p.pull == "start", copy=p.copy_of)
        aside = SetAside(p.validation_share, ctx.recipe.settings.seed)
        step = SelfTuning(
            ctx,
            wrapped,
            aside,
            train_steps=p.train_steps,
            val_steps=p.val_steps,
            warmup=p.warmup,
            rate=p.hyper_rate,
            scale_rate=p.scale_rate,
            entropy=p.entropy,
            tune_scales=p.tune_scales,
            tune=p.tune,
            random_words=p.random_words,
        )
        return [wrapped, aside, step]


def layers_of(spec: str, model: ModelFacts) -> dict[str, tuple[int, int]]:
    """The layers that are wrapped, new classifiers not counted: name -> (out, in)."""
    spec = spec.strip()
    if spec == HEAD:
        return {}
    if spec != LAST:
        return targets(spec, model)
    numbers = {name: int(found.group(1)) for name in model.linears if (found := _NUMBER.search(name))}
    last = max(numbers.values(), default=0)
    return {name: shape for name, shape in model.linears.items() if numbers.get(name, last) == last}


def knobs_of(params: Any, layers: Sequence[str], task: str) -> list[Knob]:
    """The hyperparameters that are tuned, in a fixed order. With a dropout for each layer, a new classifier has one of its own too."""
    head = params.head and task == "classify"
    share = Range(0.0, params.dropout_high)
    own = [f"{DROPOUT}/{name}" for name in layers] if params.dropout_per_layer else []
    shared = [DROPOUT] if head or not own else []
    found = [Knob(name, share, params.dropout_start) for name in [*own, *shared]] if params.dropout else []
    if params.decay:
        found.append(Knob(WEIGHT_DECAY, Range(0.0, None), params.decay_start))
    if params.words:
        found.append(Knob(WORDS, Range(0.0, params.words_high), params.words_start))
    if params.stretch:
        found.append(Knob(STRETCH, Range(0.0, float(params.stretch_high), whole=True), params.stretch_start))
    return found
