"""SaRA: only the weights that are almost zero learn, as one sparse change per matrix, kept low in rank (arXiv 2409.06633)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from engine.core.errors import Fault, bad_input
from engine.core.facts import Facts, ModelFacts
from engine.core.method import Card, Cost, Figure, Suggestion, TrainMethod, Verdict
from engine.core.params import HyperParams, dial
from engine.core.recipe import Recipe
from engine.core.slots import Slot
from engine.parts.blocks import find_blocks
from engine.parts.lowrank_loss import nuclear_norm
from engine.parts.optimizers import full_rate
from engine.parts.selection import highest, lots, lowest, magnitudes
from engine.parts.sparse import Places, SparseTuning, Weights
from engine.parts.targets import ALL, TARGETS_HELP, target_faults, targets
from engine.train.parts import Loss as TaskLoss
from engine.train.parts import LossTerm, Parametrization, PartContext, Remap, StepReport

if TYPE_CHECKING:
    from engine.train.run import Run

Select = Literal["smallest", "largest", "random"]
Shape = tuple[int, ...]
PAPER_THRESHOLD, PAPER_SIDE = 2e-3, 64


class BySize:
    """Chooses entries by the size of their weight and remembers the border of every tensor, so that the same rule can be asked again."""

    def __init__(self, params: SaRA.Params, ctx: PartContext) -> None:
        self.params, self.ctx = params, ctx
        self.thresholds: dict[str, float] = {}  # of every tensor with entries; with "random" there is none

    def __call__(self, weights: Weights) -> Places:
        p = self.params
        if p.threshold is not None:
            places = self._by_threshold(weights, p.threshold)
        elif p.scope == "tensor":
            places = {name: self._exactly({name: weight})[name] for name, weight in weights.items()}
        else:
            places = self._exactly(weights)
        return {name: index for name, index in places.items() if index.numel()}

    def still(self, name: str, values: Tensor) -> Tensor | None:
        """Which of these values the rule would still choose; None when the rule does not look at values."""
        border = self.thresholds.get(name)
        if border is None:
            return None
        size = values.detach().abs()
        return size >= border if self.params.select == "largest" else size < border

    def _exactly(self, weights: Weights) -> Places:
        """A given number of entries over all of `weights`, the border in the midst of them."""
        select: Select = self.params.select
        total = sum(weight.numel() for weight in weights.values())
        count = num_chosen(self.params, total, self.ctx.facts.model)
        first = next(iter(weights))
        ties = self.ctx.generator(f"ties/{first}")
        if select == "random":
            return lowest(lots(weights, lambda name: self.ctx.generator(f"lot/{name}")), count, ties)
        places = (lowest if select == "smallest" else highest)(magnitudes(weights), count, ties)
        sizes = [
            weights[name].reshape(-1)[index].float().abs() for name, index in places.items() if index.numel()
        ]  # of the chosen entries
        if select == "smallest":  # the least number above all of them, so that each lies strictly below it
            border = float(torch.nextafter(torch.tensor(max(float(s.max()) for s in sizes)), torch.tensor(math.inf)))
        else:
            border = min(float(size.min()) for size in sizes)
        self.thresholds.update(dict.fromkeys(weights, border))
        return places

    def _by_threshold(self, weights: Weights, threshold: float) -> Places:
        above = self.params.select == "largest"
        places: Places = {}
        for name, weight in weights.items():
            size = weight.reshape(-1).float().abs()
            places[name] = (size >= threshold if above else size < threshold).nonzero().squeeze(1)
            self.thresholds[name] = threshold
        if not any(index.numel() for index in places.values()):
            every = torch.cat([weight.reshape(-1)[:100_000].float().abs() for weight in weights.values()])
            tenth = float(every.kthvalue(max(1, every.numel() // 10)).values)
            raise bad_input(
                "methods.params.threshold",
                f"No weight of the chosen layers is {'at least' if above else 'smaller than'} {threshold:g}.",
                f"In this model a tenth of them is smaller than about {tenth:.3g}.",
                f"Choose about {tenth:.2g}, or leave the threshold open and give a share instead.",
                "nothing_chosen",
            )
        return places


class SmallWeights(SparseTuning):
    """The chosen entries learn; at a share of the run those that left the rule's side of the border stand still again."""

    selector: BySize

    def __init__(self, ctx: PartContext, names: Sequence[str], selector: BySize, reselect: float) -> None:
        super().__init__(ctx, names, selector)
        self.reselect = reselect
        self.reselect_at = 0  # the step after which the entries are chosen again; 0 = never
        self.turn = 0  # steps seen by this process, so that the loss term draws once a step

    def begin(self, run: Run) -> None:
        """Plan the second choice, and say how densely each tensor was chosen from."""
        if self.reselect > 0 and self.selector.thresholds and run.clock.total_steps > 1:
            self.reselect_at = min(run.clock.total_steps - 1, max(1, round(self.reselect * run.clock.total_steps)))
        run.log.emit("log", {"level": "info", "message": density_sentence(self.density())})

    def adapt(self, report: StepReport) -> Remap | None:
        self.turn += 1
        return self.choose_again() if report.step == self.reselect_at else None

    def numbers(self) -> dict[str, float]:
        return {"density": self.num_learning() / max(1, sum(self.sizes.values()))}

    def choose_again(self) -> Remap | None:
        """The subset of the first mask that the rule still chooses goes on, with fresh optimizer state; the others stay at their values."""
        marks: dict[str, Tensor] = {}
        for name, entries in self.entries.items():
            mark = self.selector.still(name, entries.whole())
            if mark is None:
                return None
            marks[name] = mark
        return self.narrow(marks) if any(bool(mark.any()) for mark in marks.values()) else None

    def state_dict(self) -> dict[str, Any]:
        return {"reselect_at": self.reselect_at, **super().state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.reselect_at = int(state["reselect_at"])

    def describe(self, name: str) -> dict[str, Any]:
        return {
            **super().describe(name),
            "density": len(self.entries[name]) / self.sizes[name],
            "threshold": self.selector.thresholds.get(name),
            "select": self.selector.params.select,
        }


class RankTerm(LossTerm):
    """weight * nuclear norm of (W * M) for one matrix a step, drawn among those with both sides above `side`; its gradient reaches the entries alone."""

    def __init__(self, tuning: SmallWeights, weight: float, side: int, generator: torch.Generator) -> None:
        self.tuning, self.weight, self.side, self.generator = tuning, weight, side, generator
        self._turn, self._drawn = -1, ""

    def eligible(self) -> list[str]:
        """Names of the matrices that may be drawn."""
        return [
            name
            for name, entries in self.tuning.entries.items()
            if is_large(entries.shape, self.side) and entries.values.numel()
        ]

    def term(self, model: nn.Module, batch: Mapping[str, Tensor], loss: TaskLoss, share: float) -> Tensor:
        names = self.eligible() if self.weight > 0 else []
        if not names:
            return loss.total.new_zeros(())
        if (
            self._turn != self.tuning.turn
        ):  # all micro-batches of a step share one draw, so cutting the batch changes nothing
            self._turn = self.tuning.turn
            self._drawn = names[int(torch.randint(len(names), (), generator=self.generator))]
        entries = self.tuning.entries[self._drawn]
        return self.weight * share * nuclear_norm(entries.values, entries.places(), entries.shape)

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.generator.set_state(state["generator"])


class SaRA(TrainMethod):
    """Small-weight sparse tuning."""

    slots = (Slot.PARAMETRIZATION, Slot.LOSS_TERM)
    cannot = {"compile": "What learns becomes fewer as it learns, and code is made once, at the start."}
    presets = {
        "tiny": {"share": 0.1, "rank_side": 8},
        "paper": {"threshold": PAPER_THRESHOLD, "rank_loss": 5e-4, "rank_side": PAPER_SIDE, "reselect": 0.5},
    }
    card = Card(
        slug="sara",
        title="SaRA",
        pick_when="Pick this when a model should learn something new, such as another style, while keeping its old abilities: only those of its weights "
        "learn that are almost zero and therefore hardly used.",
        summary="In a trained model some weights are so close to zero that the model answers nearly the same without them. Just these learn here; all "
        "others stay bit for bit as they were. Half way through, those that have grown stand still, and only the ones that are still tiny go on. "
        "The result is a small file of changed numbers, or a whole model.",
        paper="SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation",
        year=2024,
        arxiv="2409.06633",
        algorithm=(
            "Mask: in the chosen layers mark the weights with the smallest absolute value: a share or a number of them, or all below a threshold theta.",
            "Put the marked weights, with their signs, into one vector p for each matrix. The optimizer sees p alone.",
            "Forward: W with W[mask] = p, as the output of a function of p, so that nothing is added to the model and nothing is copied.",
            "Backward: the gradient of p is the gradient of W at the mask; the dense gradient of W is released at once.",
            "Rank term: each step draw one matrix whose sides are both above a limit, and add lambda times the sum of the singular values of W * mask. "
            "Its gradient U V^T, at the mask, reaches p.",
            "Half way: of the first mask keep what is still below theta; the rest stands still at its present value. The optimizer starts afresh.",
            "Optimizer step on p (decay too, if any, acts on p alone), then p is written into W.",
            "Export: places, values and theta for each matrix with a hash of the base; or the merged model, which is exact.",
        ),
        avoid_when="The model must learn as much as it can and what it knew does not matter, or the result must be loadable by other tools without merging.",
        traps=(
            "A published optimizer starts from absolute values; the signs return after one step. Here the start equals the base bit for bit.",
            "In the same code the rank term seems to reach no weight that learns. Here its gradient is computed from p and tested.",
            "There, too, the second choice takes any small weight. Here, as the paper says, it is a part of the first.",
            "Optimizer averages start anew at the second choice, so a small bump of the loss is normal. No step is skipped here.",
            "One threshold for the whole model picks very different shares of different layers; the log and the file say how much of each. "
            "'in each layer' evens it out.",
            "Norms, biases and word tables are left out, because nearly all of a bias can lie below a threshold; a setting lets them in.",
            "The values fit one base model only: the file carries hashes of it, and loading onto another is refused.",
            "The mask is chosen in fp32 and kept; in bf16 many tiny weights are equal and would be chosen differently.",
            "The rank term costs one singular value decomposition a step: on large matrices that is the slow part. 0 switches it off.",
            "That the smallest weights hardly matter says little about changing them: measured here on a small story model, setting them to zero cost "
            "nothing, but training them forgot more than training large ones. On a small image model it forgot less, as promised. Try it on yours.",
        ),
        figures=(
            Figure(
                claim="SD 1.5 with 50M numbers that learn, mean of five styles: FID, CLIP, VLHI",
                paper="134.96, 27.08, 1.55; LoRA 150.74, 27.96, 1.45 (Table 1)",
            ),
            Figure(
                claim="SD 1.5 with 20M: VLHI",
                paper="1.69; LoRA 1.52; full fine-tuning (860M) 1.30 (Table 1)",
            ),
            Figure(claim="SD 3.0 with 50M: VLHI", paper="1.77; LoRA 1.52 (Table 1)"),
            Figure(
                claim="Which weights learn, one style: VLHI of smallest, largest, random",
                paper="1.16 to 1.79, 1.00, 0.97 (Table 2)",
                ours="rise of the old loss on digits, equal steps: 1.10, 2.78, 1.64; but on stories when a 260,000-parameter story model "
                "learns a novel: 1.49, 1.24, 1.39, so there small weights forget most",
            ),
            Figure(
                claim="Both tricks, only the second choice, only the rank term, none: VLHI",
                paper="1.79, 1.56, 0.89, 1.16 (Table 2)",
            ),
            Figure(
                claim="Memory against methods that mask dense gradients",
                paper="45 to 52 % less (Figure 5)",
                ours="gradient and optimizer take a tenth of the bytes when a tenth learns (counted)",
            ),
            Figure(
                claim="Loss when the smallest tenth of the weights is set to zero, against a random tenth",
                paper="the smallest 10 to 20 % do not matter",
                ours="+0.009 against +2.39 (story model, 3 draws)",
            ),
            Figure(
                claim="First choice that is left after the second",
                paper="15 to 20 %",
                ours="53 % (80 steps of a story model)",
            ),
        ),
        cost=Cost(time=3, memory=2, size=2),
        family="Selection",
    )

    class Params(HyperParams):
        """Which weights learn, and how their change is held low in rank."""

        share: float = dial(
            0.1,
            label="Share that learns",
            unit="share",
            low=1e-5,
            high=1.0,
            tier="basic",
            help="This share of the weights, the smallest ones, learns. More can learn more and forgets more; 0.01 to 0.2 is usual.",
        )
        budget: int | None = dial(
            None,
            label="Number that learns",
            unit="weights",
            low=1,
            high=10**12,
            suggested="The share decides.",
            help="How many weights learn, instead of a share: useful for comparing methods of equal size.",
        )
        threshold: float | None = dial(
            None,
            label="Border",
            unit="1",
            low=1e-12,
            high=100.0,
            paper=PAPER_THRESHOLD,
            suggested="The share decides.",
            help="Weights smaller than this learn, however many they are. It suits one model only, so a share is easier.",
        )
        scope: Literal["model", "tensor"] = dial(
            "model",
            label="Where the share counts",
            paper="model",
            help="model: one border for all layers, so that some give more weights than others. tensor: the same share of every layer.",
        )
        select: Select = dial(
            "smallest",
            label="Which weights",
            paper="smallest",
            help="smallest is the method; largest and random are there for comparison and usually forget more.",
        )
        targets: str = dial(ALL, label="Layers", help=TARGETS_HELP, paper=ALL)
        beyond: Literal["none", "vectors", "embeddings", "all"] = dial(
            "none",
            label="Beside the layers",
            paper="all",
            help="Lets weights outside of the layers be chosen too: vectors (biases and norms), embeddings (word tables and output layer), or all.",
        )
        reselect: float = dial(
            0.5,
            label="Choose again after",
            unit="share",
            low=0.0,
            high=0.95,
            paper=0.5,
            help="After this share of the run, weights that have grown stand still and only those still small go on. 0 switches it off; "
            "random choices are never repeated.",
        )
        rank_loss: float = dial(
            5e-4,
            label="Pull towards low rank",
            unit="1",
            low=0.0,
            high=10.0,
            paper=5e-4,
            help="How strongly the chosen weights are pulled towards a simple pattern, against memorising. 0 switches it off and saves time.",
        )
        rank_side: int | None = dial(
            None,
            label="Smallest matrix for it",
            unit="rows",
            low=1,
            high=1_000_000,
            paper=PAPER_SIDE,
            suggested="64, or half of the largest matrix in a small model.",
            help="Only matrices with more rows and more columns than this are pulled towards low rank.",
        )

    @classmethod
    def supports(cls, facts: Facts) -> Verdict:
        if not candidates(cls.Params(), facts.model):
            return Verdict(
                False,
                f"SaRA chooses among the weights of a model's layers, and this {facts.model.family} model shows none that it knows.",
                "Choose a transformer model, or full fine-tuning.",
            )
        return super().supports(facts)

    @classmethod
    def check(cls, params: Params, facts: Facts) -> list[Fault]:
        model = facts.model
        faults = _layer_faults(params, model)
        total = sum(math.prod(shape) for shape in candidates(params, model).values())
        if params.threshold is not None and params.budget is not None:
            faults.append(
                Fault(
                    where="threshold",
                    what="Both a number of weights and a border are given.",
                    why="Each of them decides alone which weights learn.",
                    way_out="Clear one of the two.",
                    code="excludes",
                )
            )
        if params.threshold is not None and params.select == "random":
            faults.append(
                Fault(
                    where="select",
                    what="A random choice does not look at the border.",
                    why="A border separates small weights from large ones.",
                    way_out="Clear the border and give a share, or choose 'smallest'.",
                    code="excludes",
                )
            )
        if params.budget is not None and params.budget > total:
            faults.append(
                Fault(
                    where="budget",
                    what=f"{params.budget:,} weights should learn.",
                    why=f"The chosen layers hold only {total:,}.",
                    way_out=f"Choose {total:,} or less, or more layers.",
                    code="too_large",
                )
            )
        if params.budget is None and params.threshold is None and params.share * total < 1 <= total:
            faults.append(
                Fault(
                    where="share",
                    what=f"The share {params.share:g} is less than one weight.",
                    why=f"The chosen layers hold {total:,} weights.",
                    way_out=f"Choose at least {1 / total:.2g}.",
                    code="too_small",
                )
            )
        if params.rank_loss > 0 and params.rank_side is not None:
            shapes = [shape for shape in candidates(params, model).values() if len(shape) == 2]
            if shapes and not any(is_large(shape, params.rank_side) for shape in shapes):
                faults.append(
                    Fault(
                        where="rank_side",
                        what=f"No matrix has more than {params.rank_side:,} rows and columns.",
                        why="Then nothing would be pulled towards low rank.",
                        way_out=f"Choose {max(map(min, shapes)) - 1:,} or less, or set the pull to 0.",
                        code="too_large",
                    )
                )
        return faults

    @classmethod
    def claims(cls, params: Params, facts: Facts) -> frozenset[str]:
        return frozenset(candidates(params, facts.model))

    @classmethod
    def num_trainable(cls, params: Params, facts: Facts) -> int:
        shapes = candidates(params, facts.model)
        if params.threshold is None:
            if params.scope == "tensor" and params.budget is None:
                return sum(num_chosen(params, math.prod(shape), facts.model) for shape in shapes.values())
            return num_chosen(params, sum(map(math.prod, shapes.values())), facts.model)
        below = {  # weights are not loaded yet: as if drawn from a normal distribution of the usual width
            name: math.erf(params.threshold * math.sqrt(max(1, shape[-1]) / 2)) for name, shape in shapes.items()
        }
        above = params.select == "largest"
        return round(
            sum((1 - below[name] if above else below[name]) * math.prod(shape) for name, shape in shapes.items())
        )

    @classmethod
    def suggest(cls, recipe: Recipe, params: Params, facts: Facts) -> list[Suggestion]:
        place = next((place for place, ref in enumerate(recipe.methods) if ref.slug == cls.card.slug), 0)
        side = default_side(params, facts.model)
        if params.threshold is not None:
            rate = 1e-3 * math.exp(-350 * params.threshold)
            reason = f"The authors take {rate:.3g} for the border {params.threshold:g}, and less for larger ones."
        else:
            rate = small_rate(facts.model)
            reason = f"The smallest weights of a model of {facts.model.num_parameters:,} parameters take steps of {rate:g} well."
        return [
            Suggestion(where="settings.learning_rate", value=float(f"{rate:.3g}"), reason=reason),
            Suggestion(
                where=f"methods[{place}].params.rank_side",
                value=side,
                reason="The paper's limit."
                if side == PAPER_SIDE
                else "The paper's limit of 64 would leave no matrix of this small model.",
            ),
        ]

    def parts(self, ctx: PartContext) -> Sequence[Parametrization | LossTerm]:
        p, model = self.params, ctx.facts.model
        side = p.rank_side if p.rank_side is not None else default_side(p, model)
        tuning = SmallWeights(ctx, list(candidates(p, model)), BySize(p, ctx), p.reselect)
        return [tuning, RankTerm(tuning, p.rank_loss, side, ctx.generator("rank"))]


def candidates(params: SaRA.Params, model: ModelFacts) -> dict[str, Shape]:
    """The tensors whose entries may be chosen, by name, in the order of the model."""
    layers = {f"{name}.weight" for name in model.linears}
    chosen = {f"{name}.weight" for name in targets(params.targets, model)}
    if not layers:  # GPT-2 and others keep their matrices in a form of their own: everything with two sides inside the repeated layers
        layers = {
            name
            for block in find_blocks(model.tensors).blocks
            for module in block.modules()
            for name in module.tensors
            if len(model.tensors[name]) > 1
        }
        chosen = layers if params.targets.strip() == ALL else set()
    return {
        name: shape
        for name, shape in model.tensors.items()
        if name in chosen
        or (params.beyond in {"vectors", "all"} and len(shape) <= 1)
        or (params.beyond in {"embeddings", "all"} and len(shape) > 1 and name not in layers)
    }


def num_chosen(params: SaRA.Params, size: int, model: ModelFacts) -> int:
    """How many of `size` weights learn when a share or a number of them is asked for; a number is split over tensors by their size."""
    if params.budget is None:
        return max(1, round(params.share * size))
    whole = sum(math.prod(shape) for shape in candidates(params, model).values())
    return min(size, max(1, round(params.budget * size / whole)))


def is_large(shape: Shape, side: int) -> bool:
    """Whether a tensor is a matrix with both sides above the limit."""
    return len(shape) == 2 and min(shape) > side


def default_side(params: SaRA.Params, model: ModelFacts) -> int:
    """The paper's limit for the rank term; in a model with small matrices only, half of the largest one."""
    sides = [min(shape) for shape in candidates(params, model).values() if len(shape) == 2]
    largest = max(sides, default=PAPER_SIDE + 1)
    return PAPER_SIDE if largest > PAPER_SIDE else max(1, largest // 2)


def small_rate(model: ModelFacts) -> float:
    """A learning rate for the smallest weights alone: a few times that of full fine-tuning, and never above the paper's highest for large models."""
    return 4 * full_rate(model)


def density_sentence(density: Mapping[str, float]) -> str:
    """How densely each tensor was chosen from, the extremes by name."""
    order = sorted(density, key=lambda name: density[name])
    low, high = order[0], order[-1]
    return (
        f"Of {len(order)} weight tensors, each gives a share of its entries to learning: the least is {density[low]:.1%} ({low}), "
        f"the middle {density[order[len(order) // 2]]:.1%}, the most {density[high]:.1%} ({high})."
    )


def _layer_faults(params: SaRA.Params, model: ModelFacts) -> list[Fault]:
    if model.linears:
        return target_faults(params.targets, model)
    if params.targets.strip() == ALL:
        return []
    return [
        Fault(
            where="targets",
            what="Single layers cannot be chosen in this model.",
            why=f"This {model.family} model keeps its layers in a form of its own.",
            way_out=f"Write {ALL}.",
            code="no_such_layer",
        )
    ]
