"""PCB-Merging: parameters of several fine-tuned models compete, and the winners are fused (arXiv 2410.02396)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import field_validator
from torch import Tensor

from engine.core.errors import EngineError, Fault
from engine.core.facts import Facts
from engine.core.method import Card, Cost, Figure
from engine.core.params import HyperParams, dial
from engine.parts.competition import Balance, balance
from engine.parts.judge import Judge, evolve
from engine.parts.merging import (
    PIECE,
    Family,
    MergeMethod,
    count_fault,
    descendants,
    heads_dial,
    numbers_text,
    per_model,
)

if TYPE_CHECKING:
    from engine.ops.transform import ModelFolder, OutFolder, TransformContext

_NO_DATA = Fault(
    where="search",
    what="The search has no rows to score with.",
    why="It compares strengths by how well the merged model does on examples.",
    way_out="Choose data that are not your final test data, or switch the search off.",
    code="no_data",
)
_EMPTY_RANGE = Fault(
    where="search_low",
    what="The search would begin above its end.",
    why="There is nothing to try between the two.",
    way_out="Choose a smallest strength below the largest.",
    code="empty_range",
)


class PCBMerging(MergeMethod):
    """theta = theta_base + sum_i lambda_i c_i w_i / sum_i w_i."""

    num_models = (2, None)
    presets = {"tiny": {"keep": 0.2}, "paper": {"keep": 0.05, "scale": 1.2}}
    card = Card(
        slug="pcb-merging",
        title="Parameter competition (PCB)",
        pick_when="Pick this when you hold several fine-tuned copies of one base model, each good at a different job, and want a single model doing all "
        "jobs without any training.",
        summary="Every change that a model learned gets a score: high when it is large among the model's own changes, and when the other models pull in the same "
        "direction. Only the best few percent of each model survive; where several survive at one place, they are averaged by their scores.",
        paper="Parameter Competition Balancing for Model Merging",
        year=2024,
        arxiv="2410.02396",
        family="Merging",
        algorithm=(
            "Inputs: the model is the base, the further models are those that were fine-tuned from it. Task vectors tau_i = theta_i - theta_base, in fp32.",
            "Clamp |tau_i| to its own low and high quantiles: a_i; keep the sign: c_i.",
            "Variant 'code', which the paper's reported numbers come from: intra_i = exp(n * minmax(a_i)^2), inter_i = tanh(tau_i * sum_j tau_j), "
            "score_i = intra_i * inter_i.",
            "Variant 'paper', as printed: intra_i = softmax(n * norm(tau_i^2)), inter_i = sum_j softmax(norm(tau_i * tau_j)), score_i = intra_i * inter_i.",
            "Drop: everything under the (1 - r) quantile of score_i becomes 0, and the rest is stretched to (0, 1]: w_i.",
            "tau_m = sum_i lambda_i c_i w_i / max(sum_i w_i, 1e-12); theta = theta_base + tau_m; other tensors come from the base.",
            "All quantiles are exact and taken over the whole model: four passes over the files count bit patterns, the last one fuses (six for 'paper').",
            "Optional: an evolution strategy searches lambda_i for each model on labelled rows that are not the test rows.",
        ),
        avoid_when="You can tune the scale of plain task arithmetic on held-out examples and the model is tiny: then this is no better.",
        traps=(
            "The paper and its code are different functions; choose with 'Form of the score'.",
            "A place that only one model keeps gets that model's change in full, however small its score: the share kept, not the score, decides who survives.",
            "Without the clamp a single outlier squeezes all other scores to nearly nothing.",
            "Scores are about 1e-6 and would vanish in half precision: everything is computed in fp32 whatever the files hold.",
            "In the paper's own scripts the strength was chosen on the test split; here the search sees only the rows that you give it.",
            "On tiny networks without spare room it does not beat a tuned task arithmetic.",
        ),
        figures=(
            Figure(
                claim="Relative error on planted changes, and noise left, of four tasks with 5 % each",
                paper="0.0012 to 0.0016; noise 1.0 at r = 0.2, 0.27 at 0.1, 0 at 0.05 (the plain sum leaves 2.0), an earlier replication",
                ours="0.0012 to 0.0013; noise 1.01, 0.29 and 0",
            ),
            Figure(
                claim="Digits, four subsets of classes in one small network, mean accuracy",
                paper="above the plain sum, level with a tuned one",
                ours="0.849; plain sum 0.509, TIES 0.780, tuned sum 0.860, base 0.844 (3 seeds)",
            ),
            Figure(
                claim="Digits, four changed kinds of images: level with a tuned sum?",
                paper="not promised",
                ours="no: 0.539 against 0.629; plain sum 0.368 (3 seeds)",
            ),
            Figure(
                claim="Llama of 260 thousand numbers, a novel and a science book, mean held-out loss",
                paper="not given",
                ours="2.912 at r = 0.5; soup 2.898, sum at 0.6 2.885, TIES 2.916, sum at 1 3.165, base 3.915 (2 seeds)",
            ),
            Figure(
                claim="Eight image tasks, CLIP ViT-B/32, average",
                paper="76.3 (unconfirmed); re-measured elsewhere: 75.8, task arithmetic 70.1, TIES 73.6",
            ),
            Figure(
                claim="Eight image tasks, CLIP ViT-L/14, average",
                paper="87.5 (unconfirmed); re-measured elsewhere: 86.9, task arithmetic 84.5, TIES 86.0",
            ),
            Figure(
                claim="T5-large, share kept from 0.05 to about 0.6",
                paper="82.1 falling to 77.0, TIES 80.3 to 75.8 (unconfirmed)",
            ),
            Figure(claim="What the search for lambda adds", paper="1 to 2 points (unconfirmed)"),
        ),
        cost=Cost(time=2, memory=1, size=5),
    )

    class Params(HyperParams):
        """Who survives, and how strong."""

        keep: float = dial(
            0.1,
            label="Share of changes kept",
            unit="share",
            low=0.001,
            high=1.0,
            tier="basic",
            paper=0.05,
            help="The share of each model's changes that survives the competition; less means fewer conflicts.",
        )
        scale: float = dial(
            1.0,
            label="Strength of the changes",
            unit="1",
            low=-3.0,
            high=3.0,
            tier="basic",
            paper=1.2,
            help="Multiplies the merged change before it is put on the base.",
        )
        scales: str = dial(
            "",
            label="Strength for each model",
            help="One strength for each fine-tuned model, in their order, like '1.2, 0.9'; empty means the common strength for all.",
        )
        variant: Literal["code", "paper"] = dial(
            "code",
            label="Form of the score",
            help="'code' is what the authors' program computes and what their numbers come from; 'paper' is what the article prints.",
        )
        clamp: float = dial(
            0.01,
            label="Outliers cut off",
            unit="share",
            low=0.0,
            high=0.1,
            paper=0.01,
            help="This share of the largest and of the smallest changes is cut to the value next to it, so that single outliers do not rule.",
        )
        scope: Literal["model", "tensor"] = dial(
            "model",
            label="Competition within",
            help="'model' compares the changes of the whole model, as the paper does; 'tensor' lets every table of numbers keep the same share (our deviation).",
        )
        search: bool = dial(
            False,
            label="Search the strengths",
            help="Tries many strengths for each model on the rows that you give and keeps the best; needs data, which must not be the final test data.",
        )
        budget: int = dial(
            100,
            label="Tries of the search",
            unit="tries",
            low=2,
            high=2000,
            paper=100,
            help="How many combinations of strengths the search may try.",
        )
        search_low: float = dial(
            0.8,
            label="Search from",
            unit="1",
            low=-3.0,
            high=3.0,
            paper=0.8,
            help="The smallest strength that is tried.",
        )
        search_high: float = dial(
            1.3, label="Search to", unit="1", low=-3.0, high=3.0, paper=1.3, help="The largest strength that is tried."
        )
        rows: int = dial(
            64, label="Rows for the search", unit="rows", low=4, high=4096, help="How many rows every try is scored on."
        )
        row_length: int = dial(
            128,
            label="Length of these rows",
            unit="tokens",
            low=8,
            high=8192,
            help="Longer rows are cut at this many tokens.",
        )
        search_seed: int = dial(
            17, label="Seed of the search", unit="1", low=0, high=2**31 - 1, help="Another seed tries other strengths."
        )
        heads: Literal["refuse", "base", "first"] = heads_dial("refuse", "base", "first")

        _numbers = field_validator("scales")(numbers_text)

    @classmethod
    def check(cls, params: Any, facts: Facts) -> list[Fault]:
        """As many strengths as models; a search needs data and a range."""
        faults = count_fault(params.scales, facts, "scales", base=True)
        if params.search and facts.data.num_rows == 0:
            faults.append(_NO_DATA)
        if params.search and params.search_low >= params.search_high:
            faults.append(_EMPTY_RANGE)
        return faults

    def apply(self, inputs: Sequence[ModelFolder], out: OutFolder, ctx: TransformContext) -> None:
        """Write base + fused changes. inputs[0] is the base."""
        self.require_models(inputs)
        family = descendants(inputs, ctx, heads=self.params.heads)
        scales = per_model(self.params.scales, family.models, "params.scales", self.params.scale)
        whole = self._balance(family, None) if self.params.scope == "model" else None
        if self.params.search:
            scales = self._search(family, whole, scales, ctx)
        kept = torch.zeros(len(family.models), dtype=torch.int64)
        holders = torch.zeros(len(family.models) + 1, dtype=torch.int64)  # places kept by 0, 1, … models

        def change(name: str, vectors: Tensor) -> Tensor:  # [n, d] -> [d]
            found = whole or self._balance(family, name)
            merged = torch.empty_like(vectors[0])
            for piece, target in zip(vectors.split(PIECE, dim=1), merged.split(PIECE), strict=True):
                target.copy_(found.fuse(piece, scales))
                survives = found.weights(piece) > 0
                kept.add_(survives.sum(1))
                holders.add_(torch.bincount(survives.sum(0), minlength=len(holders)))
            return merged

        family.write_changes(out, ctx, change)
        size = family.num_elements()
        names = [model.folder.name for model in family.models]
        ctx.report.update(
            kept={name: round(int(k) / size, 6) for name, k in zip(names, kept, strict=True)},
            kept_by={str(number): round(int(count) / size, 6) for number, count in enumerate(holders)},
            scales={name: round(float(s), 6) for name, s in zip(names, scales, strict=True)},
        )

    def _balance(self, family: Family, name: str | None) -> Balance:
        """The statistics over the whole model, or over one tensor."""
        names = family.names if name is None else (name,)
        size = sum(torch.Size(family.layout[one][1]).numel() for one in names)
        p = self.params
        return balance(lambda: family.stream(names), size, variant=p.variant, keep=p.keep, clamp=p.clamp)

    def _search(self, family: Family, whole: Balance | None, start: Tensor, ctx: TransformContext) -> Tensor:
        p = self.params
        if p.search_low >= p.search_high:
            raise EngineError(_EMPTY_RANGE)
        if ctx.recipe is None or ctx.recipe.data is None:
            raise EngineError(_NO_DATA)
        judge = Judge(ctx, family.template_index, num=p.rows, length=p.row_length)
        base = family.base
        assert base is not None

        def merged(scales: Tensor) -> Iterator[tuple[str, Tensor]]:
            for name in family.names:
                found = whole or self._balance(family, name)
                vectors = family.task_vectors(name)
                pieces = [found.fuse(piece, scales) for piece in vectors.split(PIECE, dim=1)]
                yield name, family.read(base, name).reshape(-1) + torch.cat(pieces)

        def score(point: list[float]) -> float:
            judge.put(merged(torch.tensor(point, dtype=torch.float64)))
            return judge.loss()

        best, least, path = evolve(
            score, start.tolist(), low=p.search_low, high=p.search_high, budget=p.budget, seed=p.search_seed
        )
        report: dict[str, Any] = {
            "loss_at_start": float(f"{path[0]:.6g}"),
            "loss_at_end": float(f"{least:.6g}"),
            "tries": len(path),
        }
        ctx.report["search"] = report
        ctx.note(
            f"The search over {len(path)} combinations of strengths lowered the loss on the given rows from {path[0]:.4f} to {least:.4f}."
        )
        return torch.tensor(best, dtype=torch.float64)
