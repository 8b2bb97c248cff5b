"""Learning while serving: a student that adapts on unlabelled batches, a slow teacher beside it, and parameters that are held back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Logits = Callable[[nn.Module, Any], Tensor]  # (model, batch) -> logits [B, classes]
_EXACT = 1_000_000  # a quantile over more numbers than this is estimated from a sample of them
_SAMPLE = 100_000


@dataclass(frozen=True, kw_only=True)
class Teaching:
    """How student and teacher move (the hyperparameters of parameter-selective mean teacher)."""

    form: Literal["code", "paper"]
    learning_rate: float
    momentum: float
    quantile: float
    anchor: float
    anchor_to: Literal["source", "previous"]
    restore: float
    seed: int


class MeanTeacher:
    """A student and a teacher over one model, keyed by parameter names. `step` answers with the weights from before it learns.

    States: student, teacher, source (the model as given), Fisher weights F ≥ 0, and Adam's two moments: six times the parameters.
    Batch norm always uses the statistics of the batch at hand.
    """

    def __init__(self, model: nn.Module, logits: Logits, teaching: Teaching) -> None:
        self.student, self.teacher = model, copy.deepcopy(model)
        self.logits, self.teaching = logits, teaching
        for part in (self.student, self.teacher):
            part.eval()
            for module in part.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.track_running_stats = False
                    module.running_mean = module.running_var = None  # eval mode then takes the batch's own statistics
        for parameter in self.teacher.parameters():
            parameter.requires_grad_(False)
        self.names = [name for name, _ in self.student.named_parameters()]
        for parameter in self.student.parameters():
            parameter.requires_grad_(True)
        self.source = {name: p.detach().clone() for name, p in self.student.named_parameters()}
        self.previous = {name: value.clone() for name, value in self.source.items()}
        self.fisher: dict[str, Tensor] = {}
        self.generator = torch.Generator().manual_seed(teaching.seed)
        self.num_steps = 0
        self._new_optimizer()

    def _new_optimizer(self) -> None:
        self.optimizer = torch.optim.Adam(self.student.parameters(), lr=self.teaching.learning_rate, betas=(0.9, 0.999))

    # ── what matters ──────────────────────────────────────────────────────────────────────────────────────────────────

    def measure_fisher(self, batches: Iterable[Any]) -> None:
        """F = mean over single examples of the squared gradient of -log p(own guess); one example a batch (the mean gradient of a batch would
        be squared too late and come out far too small)."""
        total = {name: torch.zeros_like(p) for name, p in self.student.named_parameters()}
        count = 0
        for batch in batches:
            scores = self.logits(self.student, batch).log_softmax(-1)
            self.student.zero_grad(set_to_none=True)
            (-scores.max(-1).values.sum()).backward()
            for name, parameter in self.student.named_parameters():
                if parameter.grad is not None:
                    total[name] += parameter.grad.square()
            count += 1
        self.student.zero_grad(set_to_none=True)
        self.fisher = {name: value / max(1, count) for name, value in total.items()}

    # ── one batch ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def answer(self, batch: Any) -> Tensor:
        """Teacher logits + student logits [B, classes], nothing learned."""
        with torch.no_grad():
            return self.logits(self.teacher, batch) + self.logits(self.student, batch)

    def step(self, batch: Any) -> Tensor:
        """Answer a batch with the weights as they are, then learn from it; returns the logits [B, classes]."""
        how = self.teaching
        with torch.no_grad():
            taught = self.logits(self.teacher, batch)
        learned = self.logits(self.student, batch)
        loss = symmetric_cross_entropy(learned, taught).mean() + self._pull()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        before = {name: p.detach().clone() for name, p in self.student.named_parameters()}
        masked = self._least_important() if how.form == "code" else {}
        self.optimizer.step()
        if how.form == "code":
            self._move_teacher({})
            self._give_back(masked)
            self._move_teacher(masked, copy_masked=True)
        else:
            self._move_teacher(self._crucial())
        self._restore_at_random()
        self.previous = before
        self.num_steps += 1
        return taught + learned.detach()

    def _pull(self) -> Tensor:
        """anchor × Σ F (student − anchor)²."""
        if not self.fisher or self.teaching.anchor == 0:
            return torch.zeros(())
        base = self.source if self.teaching.anchor_to == "source" else self.previous
        terms = [(self.fisher[name] * (p - base[name]).square()).sum() for name, p in self.student.named_parameters()]
        return self.teaching.anchor * torch.stack(terms).sum()

    def _least_important(self) -> dict[str, Tensor]:
        """Masks of the entries with the smallest squared gradient of this batch; exactly round(quantile × P) where P is small enough to count."""
        grads = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.square()
            for name, p in self.student.named_parameters()
        }
        return smallest(grads, self.teaching.quantile, self.generator)

    def _crucial(self) -> dict[str, Tensor]:
        """Masks of the entries with the largest Fisher weights, which the teacher keeps."""
        if not self.fisher:
            return {}
        return smallest({name: -value for name, value in self.fisher.items()}, self.teaching.quantile, self.generator)

    @torch.no_grad()
    def _move_teacher(self, kept: Mapping[str, Tensor], *, copy_masked: bool = False) -> None:
        """Teacher ← a × teacher + (1 − a) × student; masked entries stay (or are copied from the student)."""
        a = self.teaching.momentum
        student = dict(self.student.named_parameters())
        for name, parameter in self.teacher.named_parameters():
            moved = a * parameter + (1 - a) * student[name]
            if name in kept:
                moved = torch.where(kept[name], student[name] if copy_masked else parameter, moved)
            parameter.copy_(moved)

    @torch.no_grad()
    def _give_back(self, masked: Mapping[str, Tensor]) -> None:
        for name, parameter in self.student.named_parameters():
            parameter.copy_(torch.where(masked[name], self.source[name], parameter))

    @torch.no_grad()
    def _restore_at_random(self) -> None:
        share = self.teaching.restore
        if share <= 0:
            return
        for name, parameter in self.student.named_parameters():
            back = torch.rand(parameter.shape, generator=self.generator).to(parameter.device) < share
            parameter.copy_(torch.where(back, self.source[name], parameter))

    # ── state ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the model as it was given, bit for bit; the Fisher weights stay, they belong to it."""
        for part in (self.student, self.teacher):
            for name, parameter in part.named_parameters():
                parameter.copy_(self.source[name])
        self.previous = {name: value.clone() for name, value in self.source.items()}
        self.generator = torch.Generator().manual_seed(self.teaching.seed)
        self.num_steps = 0
        self._new_optimizer()

    def state_dict(self) -> dict[str, Any]:
        """Everything but the source, which is the model itself."""
        state: dict[str, Any] = {"num_steps": self.num_steps, "generator": self.generator.get_state()}
        for place, part in (("student", self.student), ("teacher", self.teacher)):
            state.update({f"{place}/{name}": p.detach() for name, p in part.named_parameters()})
        state.update({f"previous/{name}": value for name, value in self.previous.items()})
        state.update({f"fisher/{name}": value for name, value in self.fisher.items()})
        for name, parameter in self.student.named_parameters():
            state.update(
                {f"adam/{name}/{key}": value for key, value in self.optimizer.state.get(parameter, {}).items()}
            )
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.num_steps = int(state["num_steps"])
        self.generator.set_state(state["generator"])
        for place, part in (("student", self.student), ("teacher", self.teacher)):
            for name, parameter in part.named_parameters():
                parameter.copy_(state[f"{place}/{name}"])
        self.previous = {name: state[f"previous/{name}"].clone() for name in self.names}
        self.fisher = {name: state[f"fisher/{name}"] for name in self.names if f"fisher/{name}" in state}
        self._new_optimizer()
        for name, parameter in self.student.named_parameters():
            mine = {
                key: state[f"adam/{name}/{key}"].clone()
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"adam/{name}/{key}" in state
            }
            if mine:
                self.optimizer.state[parameter] = mine

    def share_moved(self) -> float:
        """The share of the student's numbers that differ from the source."""
        parts = [(p.detach() != self.source[name]).float().sum() for name, p in self.student.named_parameters()]
        return float(torch.stack(parts).sum()) / sum(value.numel() for value in self.source.values())


def symmetric_cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    """-½ Σ q_t log q_s - ½ Σ q_s log q_t for each row [B]; the teacher gets no gradient."""
    taught, learned = teacher.detach().log_softmax(-1), student.log_softmax(-1)
    return -0.5 * (taught.exp() * learned).sum(-1) - 0.5 * (learned.exp() * taught).sum(-1)


def smallest(values: Mapping[str, Tensor], share: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Boolean masks over the `share` of all numbers that are smallest; ties are taken in the order of names and places.

    Exactly round(share × P) numbers up to a million; of more, the threshold is the quantile of a sample.
    """
    flat = torch.cat([value.reshape(-1) for value in values.values()])
    count = round(share * flat.numel())
    if count == 0:
        mask = torch.zeros_like(flat, dtype=torch.bool)
    elif flat.numel() <= _EXACT:
        limit = flat.kthvalue(count).values
        mask = flat < limit
        ties = (flat == limit).nonzero().squeeze(1)
        mask[ties[: count - int(mask.sum())]] = True
    else:
        picked = torch.randint(flat.numel(), (_SAMPLE,), generator=generator).to(flat.device)
        limit = flat[picked].kthvalue(max(1, round(share * _SAMPLE))).values
        mask = flat < limit
    found: dict[str, Tensor] = {}
    done = 0
    for name, value in values.items():
        found[name] = mask[done : done + value.numel()].reshape(value.shape)
        done += value.numel()
    return found
