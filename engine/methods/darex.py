"""DARE and DAREx: drop most of what fine-tuning changed, and divide the rest by the right number (arXiv 2311.03099, 2410.09344)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from engine.core.errors import EngineError, Fault, bad_input
from engine.core.facts import Facts
from engine.core.method import Card, Cost, Figure
from engine.core.params import HyperParams, dial
from engine.parts.delta_codec import FOLDER, Change, DeltaWriter, Drawn, num_bytes
from engine.parts.divisors import bound_divisors, optimal_divisors, search_divisor
from engine.parts.judge import Judge
from engine.parts.merging import (
    Family,
    MergeMethod,
    copy_settings,
    descendants,
    kept_mask,
    layer_of,
    part_of,
)

if TYPE_CHECKING:
    from engine.ops.transform import ModelFolder, OutFolder, TransformContext

_WITH_DATA = {"analytic", "outputs", "validation"}
_CASTS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_NO_DATA = Fault(
    where="rescale",
    what="There are no rows to choose the divisor with.",
    why="It is chosen by what the dropping does to the model's answers on a few examples.",
    way_out="Choose data that are not your final test data, or set the divisor to 'dare' or 'fixed'.",
    code="no_data",
)


@dataclass(kw_only=True)
class Work:
    """The models of one run, what is dropped, and the divisors found so far."""

    family: Family
    base: ModelFolder
    tuned: ModelFolder
    dropped: list[str]  # tensors that are thinned
    ctx: TransformContext
    divisors: dict[str, float | Tensor] = field(default_factory=dict)


class DAREx(MergeMethod):
    """theta = theta_base + mask * (theta_tuned - theta_base) / q."""

    order = "the model is the base, the further model was fine-tuned from it"

    num_models = (2, 2)
    presets = {"tiny": {"drop": 0.5}, "paper": {"drop": 0.99, "rescale": "outputs"}}
    card = Card(
        slug="darex",
        title="DAREx (drop most changes)",
        pick_when="Pick this when you keep many fine-tuned copies of one model and want each copy stored as a tiny list of changes, even when 99 % of "
        "the changes are thrown away.",
        summary="What fine-tuning changed is thinned at random, and what stays is enlarged to make up for it. Enlarging in full keeps the average right but makes "
        "much noise when nearly everything is dropped; enlarging a little less is much better then. How much less is found from a few examples, without training.",
        paper="DARE the Extreme: Revisiting Delta-Parameter Pruning For Fine-Tuned Models",
        year=2024,
        arxiv="2410.09344",
        family="Compression",
        algorithm=(
            "Inputs: the model is the base, the one further model was fine-tuned from it. delta = theta_tuned - theta_base, in fp32.",
            "Mask: each number is kept with probability 1 - p, from a generator of (seed, name of the tensor): the same mask for every divisor.",
            "DARE: theta = theta_base + mask * delta / (1 - p). Output layers, word tables, norms and biases stay fine-tuned unless you say otherwise.",
            "DAREx-q: divide by q with 1 - p <= q <= 1 instead. The output error of a row is bias, which grows with q, plus noise, which falls with q.",
            "'outputs': the q that changes the answers of the fine-tuned model least, without labels, averaged over several masks with the worst one left out; "
            "'validation': the q with the least loss on labelled rows. One q for the model, or one after the other for each layer.",
            "'analytic': for each row q = (1-p) + p * sum c^2 / (sum c)^2, c_ij = delta_ij * mean input_j, our own least squares; or the paper's bound: "
            "the best q of each row in steps of 0.001, averaged over the rows of a layer.",
            "Control: the same measurement with everything dropped is always in the report.",
            "Result: the rebuilt model, and beside it the folder 'delta': positions or the seed to draw them again, values, divisors, the hash of the base.",
            "DAREx-L2 needs the training itself: train with the optimizer 'AdamR', which keeps the changes small.",
        ),
        avoid_when="You need only one copy of the model, or the changes are large and you can neither train again nor lose quality: then keep the largest changes.",
        traps=(
            "When the contributions of a row average out to zero, the best divisor is 1 and dropping everything is nearly as good: look at the control.",
            "The rows that choose the divisor must not be the final test; the paper's script for decoders used test questions.",
            "In encoders, the paper's code also enlarges word-table changes that were never dropped; here only what is thinned is divided.",
            "Plain DARE loses nothing up to about p = 0.9 and collapses near 0.99 when the changes are large.",
            "The analytic divisors know only the mean input, and shrink too much where inputs differ: on digits they cost 4 points at p = 0.5, "
            "where plain DARE costs none. The search is safer.",
            "The learned divisors of the paper (200 steps of distillation) are not offered here.",
        ),
        figures=(
            Figure(
                claim="Digits turned by 25 degrees, accuracy at p = 0.99: searched divisor without labels, plain DARE, everything dropped",
                paper="0.595, 0.184 and 0.504 in an earlier replication",
                ours="0.586, 0.200 and 0.526 (3 seeds, 3 masks each; full 0.968)",
            ),
            Figure(
                claim="The same at p = 0.95, and at p = 0.5",
                paper="0.846 against 0.665; no difference, in an earlier replication",
                ours="0.663 against 0.409; 0.951 against 0.952",
            ),
            Figure(
                claim="The same at p = 0.95 with the analytic divisors: least squares of ours, the paper's bound",
                paper="not given",
                ours="0.603 and 0.562; least squares loses where plain DARE loses nothing (0.915 against 0.952 at p = 0.5)",
            ),
            Figure(
                claim="One random layer at p = 0.99: squared output error of plain DARE over that of the best divisor",
                paper="30 to 100 times",
                ours="69 times; 113 without any coherence of the rows",
            ),
            Figure(
                claim="Bytes of the delta of a Llama of 260 thousand numbers, dense 1,040,128",
                paper="not given",
                ours="676,404 at p = 0.5; 158,327 at 0.9; 93,967 at 0.95; 42,351 at 0.99",
            ),
            Figure(
                claim="p = 0.99, encoders, CoLA and SST-2, better divisor against 1 - p",
                paper="more than 30 points; e.g. 4.25 to 57 and 51 to 88 (unconfirmed)",
            ),
            Figure(claim="Plain DARE on fine-tuned decoders", paper="no loss up to about p = 0.9"),
        ),
        cost=Cost(time=2, memory=2, size=1),
    )

    class Params(HyperParams):
        """How much is dropped, and by what the rest is divided."""

        drop: float = dial(
            0.9,
            label="Share of changes dropped",
            unit="share",
            low=0.0,
            high=0.999,
            tier="basic",
            paper=0.99,
            help="The share of all changes that is thrown away; 0.9 makes the file about eight times smaller and usually costs nothing.",
        )
        rescale: Literal["auto", "dare", "fixed", "analytic", "outputs", "validation"] = dial(
            "auto",
            label="How the divisor is chosen",
            tier="basic",
            help="'dare' divides by the kept share; 'fixed' by your number; 'analytic' computes it for each row; 'outputs' tries which changes the answers least; "
            "'validation' tries which makes fewest mistakes; 'auto' is 'outputs' with data and 'dare' without.",
        )
        q: float = dial(
            0.1,
            label="Divisor",
            unit="1",
            low=0.001,
            high=1e9,
            help="Only for 'fixed': what stays is divided by this; the kept share is plain DARE, larger is more careful.",
        )
        scope: Literal["model", "layer"] = dial(
            "model",
            label="One divisor for",
            help="Only for 'outputs' and 'validation': one for the whole model, or one for each layer, found one after the other.",
        )
        tries: int = dial(
            10,
            label="Coarse tries",
            unit="tries",
            low=2,
            high=100,
            help="How many divisors are tried before the best one is refined ten times finer.",
        )
        masks: int = dial(
            4,
            label="Masks averaged",
            unit="masks",
            low=1,
            high=16,
            paper=4,
            help="Only for 'outputs': each divisor is measured with this many different masks, and the worst of three or more is left out.",
        )
        form: Literal["optimum", "bound"] = dial(
            "optimum",
            label="Analytic form",
            paper="bound",
            help="Only for 'analytic': 'optimum' is the least squared error of each row, 'bound' the paper's bound with its two numbers below.",
        )
        eta: float = dial(
            0.4,
            label="Eta of the bound",
            unit="1",
            low=0.001,
            high=100.0,
            help="Only for the bound: how strongly contributions count; the paper tuned it between 0.27 and 1.01.",
        )
        confidence: float = dial(
            0.95,
            label="Confidence of the bound",
            unit="share",
            low=0.5,
            high=0.9999,
            paper=0.95,
            help="Only for the bound: how sure it shall be.",
        )
        rows: int = dial(
            50,
            label="Rows to measure with",
            unit="rows",
            low=2,
            high=4096,
            paper=50,
            help="How many examples are looked at when the divisor is chosen.",
        )
        row_length: int = dial(
            128,
            label="Length of these rows",
            unit="tokens",
            low=8,
            high=8192,
            paper=128,
            help="Longer examples are cut at this many tokens.",
        )
        drop_embeddings: bool = dial(
            False,
            label="Thin the word table",
            help="Also drops changes of the word table; the paper does so for encoders only.",
        )
        drop_vectors: bool = dial(
            False,
            label="Thin norms and biases",
            help="Also drops changes of norms and biases, which are few and sensitive.",
        )
        drop_heads: bool = dial(
            False, label="Thin output layers", help="Also drops changes of output layers that the base has too."
        )
        positions: Literal["stored", "redrawn"] = dial(
            "stored",
            label="Positions in the file",
            help="'stored' writes which numbers changed; 'redrawn' writes only the seed, which is smaller and needs the same random numbers later.",
        )
        values: Literal["exact", "fp32", "fp16", "bf16"] = dial(
            "exact",
            label="Values in the file",
            help="'exact' keeps the fine-tuned numbers as they are; the others keep the differences in this format, smaller and rounded.",
        )
        mask_seed: int = dial(
            17, label="Seed of the mask", unit="1", low=0, high=2**31 - 1, help="Another seed keeps other changes."
        )

    @classmethod
    def check(cls, params: Any, facts: Facts) -> list[Fault]:
        """Choosing the divisor by answers needs rows; a divisor below the kept share enlarges too much."""
        faults = [_NO_DATA] if params.rescale in _WITH_DATA and facts.data.num_rows == 0 else []
        if params.rescale == "fixed" and params.q < (1 - params.drop) * (1 - 1e-9):
            faults.append(_too_small(params))
        return faults

    def apply(self, inputs: Sequence[ModelFolder], out: OutFolder, ctx: TransformContext) -> None:
        """Write the thinned model and its delta. inputs[0] is the base, inputs[1] the fine-tuned model."""
        self.require_models(inputs)
        if self.params.rescale == "fixed" and self.params.q < (1 - self.params.drop) * (1 - 1e-9):
            raise EngineError(_too_small(self.params))
        family = descendants(inputs, ctx, heads="first")
        dropped = [name for name in family.names if self._is_dropped(name, family.template.shapes[name])]
        work = Work(family=family, base=inputs[0], tuned=inputs[1], dropped=dropped, ctx=ctx)
        self._divide(work)
        copy_settings(inputs[1].folder, out.folder)
        self._write(work, out)

    def _is_dropped(self, name: str, shape: tuple[int, ...]) -> bool:
        p = self.params
        return {"matrix": True, "embedding": p.drop_embeddings, "vector": p.drop_vectors, "head": p.drop_heads}[
            part_of(name, shape)
        ]

    # ── the divisor ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _divide(self, work: Work) -> None:
        """Fill work.divisors, and put the control into the report."""
        p, ctx = self.params, work.ctx
        has_data = ctx.recipe is not None and ctx.recipe.data is not None
        if p.rescale in _WITH_DATA and not has_data:
            raise EngineError(_NO_DATA)
        rule = p.rescale if p.rescale != "auto" else "outputs" if has_data else "dare"
        plain = p.q if rule == "fixed" else 1 - p.drop
        work.divisors = dict.fromkeys(work.dropped, plain)
        ctx.report["rescale"] = rule
        if not has_data:
            return
        judge = Judge(ctx, 1, num=p.rows, length=p.row_length)
        wanted, scores = judge.outputs(), {"fine_tuned": {"distance": 0.0, "loss": judge.loss()}}
        if rule == "analytic":
            self._analytic(work, judge)
        elif rule in {"outputs", "validation"}:
            self._search(work, judge, wanted, rule)
        for label, divisors in (
            ("drop_all", dict.fromkeys(work.dropped, float("inf"))),
            ("dare", dict.fromkeys(work.dropped, 1 - p.drop)),
            ("result", work.divisors),
        ):
            judge.put(self._thinned(work, divisors, p.mask_seed))
            scores[label] = {"distance": judge.distance(wanted), "loss": judge.loss()}
        ctx.report["control"] = {
            label: {key: round(value, 6) for key, value in row.items()} for label, row in scores.items()
        }
        result, nothing = scores["result"], scores["drop_all"]
        ctx.note(
            f"Loss on the given rows: fine-tuned {scores['fine_tuned']['loss']:.4f}, thinned {result['loss']:.4f}, with plain DARE "
            f"{scores['dare']['loss']:.4f}, with every change dropped {nothing['loss']:.4f}."
        )
        if result["loss"] >= nothing["loss"]:
            ctx.note("Dropping every change would be as good: this delta is worth nothing at this share.", "warning")

    def _thinned(
        self, work: Work, divisors: Mapping[str, float | Tensor], seed: int, only: Sequence[str] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """base + mask * delta / q of the dropped tensors."""
        for name in work.dropped if only is None else only:
            start, delta = work.family.read(work.base, name), work.family.task_vectors(name)[0]
            kept = kept_mask(seed, name, delta.numel(), self.params.drop)
            scaled = (delta * kept).reshape(start.shape) / _rows(divisors[name], start)
            yield name, start + scaled

    def _search(self, work: Work, judge: Judge, wanted: list[Tensor], rule: str) -> None:
        p = self.params
        groups: dict[str, list[str]] = {}
        for name in work.dropped:
            groups.setdefault(layer_of(name) if p.scope == "layer" else "", []).append(name)
        seeds = [p.mask_seed + number * 1_000_003 for number in range(p.masks if rule == "outputs" else 1)]
        measure: Callable[[], float] = (lambda: judge.distance(wanted)) if rule == "outputs" else judge.loss
        tried: dict[str, dict[str, float]] = {}
        for done, (group, names) in enumerate(groups.items()):

            def score(q: float, names: list[str] = names) -> float:
                found = []
                for seed in seeds:  # the same masks for every q, or the search would measure the noise of masks
                    judge.put(self._thinned(work, dict.fromkeys(names, q), seed, names))
                    found.append(measure())
                return _without_outlier(found)

            best, seen = search_divisor(score, p.drop, p.tries)
            work.divisors.update(dict.fromkeys(names, best))
            judge.put(self._thinned(work, work.divisors, p.mask_seed, names))  # later layers are still whole
            tried[group or "model"] = {f"{q:g}": _digits(value) for q, value in sorted(seen.items())}
            work.ctx.progress(done + 1, len(groups) + 1)
        work.ctx.report["tried"] = tried

    def _analytic(self, work: Work, judge: Judge) -> None:
        p, means = self.params, judge.mean_inputs()
        found: list[Tensor] = []
        for name in work.dropped:
            mean = means.get(name)
            if mean is None:
                continue
            delta = work.family.task_vectors(name)[0].reshape(-1, mean.numel())  # [out, in]
            contributions = delta * mean
            if p.form == "optimum":
                rows = optimal_divisors(contributions, p.drop)
                work.divisors[name] = rows
            else:
                rows = bound_divisors(contributions, p.drop, eta=p.eta, confidence=p.confidence)
                work.divisors[name] = float(rows.mean())
            found.append(rows)
        if not found:
            raise bad_input(
                "params.rescale",
                "None of the thinned weights belongs to an ordinary linear layer of this model.",
                "The analytic divisor needs the inputs of the layers.",
                "Choose 'outputs', 'validation' or 'dare'.",
                "no_linear_layers",
            )
        average = float(torch.cat(found).mean())
        work.divisors.update({name: average for name in work.dropped if name not in means})

    # ── the result ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _write(self, work: Work, out: OutFolder) -> None:
        """Tensor by tensor: what goes into the delta is decoded and written as the model, so that both are one thing."""
        p, family, ctx = self.params, work.family, work.ctx
        layout = dict(work.tuned.layout)
        alias = family.alias[id(work.base)]
        kept = total = 0
        errors = torch.zeros(2, dtype=torch.float64)  # squared distance from the fine-tuned model, squared change
        about = {
            "method": self.card.slug, "drop": p.drop, "mask_seed": p.mask_seed, "rescale": ctx.report["rescale"], "torch": torch.__version__,
            "names": {name: own for name, own in alias.items() if name != own},
        }  # fmt: skip
        thinned, moved = set(work.dropped), False
        twins: list[tuple[str, str]] = []
        with DeltaWriter(out.folder / FOLDER, about) as delta, out.weights(layout) as writer:
            for done, name in enumerate(writer.order):
                first = family.twins.get(name, name)
                base = work.base[alias[first]] if first in alias else None
                tuned = work.tuned[first]
                if base is not None and base.shape != tuned.shape:
                    base = None
                if first in thinned:
                    assert base is not None
                    change, drawn = self._change(work, first, base, tuned)
                    new = change.rebuild(base)
                    difference = tuned.double() - base.double()
                    moved = moved or bool(difference.any())
                    errors += torch.stack([(new.double() - tuned.double()).square().sum(), difference.square().sum()])
                    kept, total = kept + change.values.numel(), total + tuned.numel()
                else:
                    if tuned.dtype.is_floating_point:
                        family.read(work.tuned, first)  # refuses what is no number
                    change, drawn, new = self._whole(tuned), None, tuned
                    moved = moved or base is None or not torch.equal(base.to(tuned.dtype), tuned)
                writer.put(name, new)
                if first != name:
                    twins.append((name, first))
                elif (
                    base is not None and base.dtype == tuned.dtype and torch.equal(base, tuned) and first not in thinned
                ):
                    delta.same(name, base)
                else:
                    delta.put(name, change, base=base, drawn=drawn)
                ctx.progress(done + 1, len(writer.order))
            for name, first in twins:
                delta.twin(name, first)
        if moved:
            family.moved.add(0)
        family.require_moved()
        dense = sum(
            torch.Size(shape).numel() * dtype.itemsize
            for name, (dtype, shape) in layout.items()
            if name not in family.twins
        )
        size = num_bytes(out.folder / FOLDER)
        ctx.report.update(
            kept=round(kept / max(1, total), 6),
            thinned_numbers=total,
            whole_numbers=family.num_elements() - total,
            divisor=_shown(work.divisors),
            weight_error=_digits(float(errors[0] / errors[1].clamp(min=1e-300))),
            weight_error_of_drop_all=1.0,
            bytes_of_delta=size,
            bytes_of_whole_delta=dense,
        )
        ctx.note(
            f"{kept:,} of {total:,} changes were kept. The delta takes {size:,} bytes instead of {dense:,}. "
            f"Squared error of the changes: {ctx.report['weight_error']:.3g}; with every change dropped it is 1."
        )

    def _change(self, work: Work, name: str, base: Tensor, tuned: Tensor) -> tuple[Change, Drawn]:
        p = self.params
        delta = work.family.task_vectors(name)[0]
        drawn = Drawn(seed=p.mask_seed, name=name, drop=p.drop)
        index = drawn.index(delta.numel())
        values = tuned.reshape(-1)[index] if p.values == "exact" else delta[index].to(_CASTS[p.values])
        if not torch.isfinite(values).all():
            raise bad_input(
                "params.values",
                f"A change of {name} is too large for the format {p.values}.",
                "It would be stored as infinite.",
                "Choose 'exact', 'fp32' or 'bf16'.",
                "too_large",
            )
        q = work.divisors[name]
        scale: float | Tensor = (1.0 / q).float() if isinstance(q, Tensor) else 1.0 / q
        change = Change(
            dtype=tuned.dtype, shape=tuple(tuned.shape), kind="weight" if p.values == "exact" else "delta", values=values, index=index, scale=scale
        )  # fmt: skip
        return change, drawn if p.positions == "redrawn" else None  # type: ignore[return-value]

    @staticmethod
    def _whole(tuned: Tensor) -> Change:
        return Change(dtype=tuned.dtype, shape=tuple(tuned.shape), kind="weight", values=tuned.reshape(-1))


def _rows(q: float | Tensor, like: Tensor) -> float | Tensor:
    """A divisor for each row, in the shape that divides the tensor."""
    return q.reshape(-1, *[1] * (like.dim() - 1)) if isinstance(q, Tensor) else q


def _without_outlier(values: list[float]) -> float:
    """The mean; of three or more, without the one that lies farthest from the median."""
    if len(values) < 3:
        return sum(values) / len(values)
    middle = sorted(values)[len(values) // 2]
    rest = sorted(values, key=lambda value: abs(value - middle))[:-1]
    return sum(rest) / len(rest)


def _digits(value: float) -> float:
    return float(f"{value:.6g}")


def _shown(divisors: Mapping[str, float | Tensor]) -> Any:
    numbers = {name: float(q.mean()) if isinstance(q, Tensor) else float(q) for name, q in divisors.items()}
    if len(set(numbers.values())) == 1:
        return round(next(iter(numbers.values())), 6)
    return {name: round(value, 6) for name, value in numbers.items()}


def _too_small(params: Any) -> Fault:
    return Fault(
        where="q",
        what=f"The divisor {params.q:g} is smaller than the kept share {1 - params.drop:g}.",
        why="What stays would be enlarged more than what was dropped can explain.",
        way_out=f"Choose at least {1 - params.drop:g}, which is plain DARE.",
        code="divisor_too_small",
    )
