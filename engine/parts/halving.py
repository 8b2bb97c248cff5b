"""Who goes on at a rung: two rankings inside comparable groups, seats dealt alternately, and what the rule would have cost. Pure functions, no torch.

Sections E and F of the card of early-dynamics-stopping (arXiv 2412.13337 for the direction of the signals; the rule is our design): runs whose early
gradient norm is LOWER and whose early training loss is HIGHER tend to keep more of what the model knew; runs with a low held-out loss learn the task.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

Goal = str  # "learn": this task alone counts; "both": this task and what the model knew before
NAN = float("nan")
HELDOUT, DYNAMICS = "held-out", "dynamics"


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What one run showed when it reached a rung. NaN marks what was not measured."""

    trial: int
    group: str  # only runs with the same group are compared by norm and training loss
    norm: float = NAN  # g: median L2 norm before clipping
    loss: float = NAN  # L: token-weighted mean of the training loss
    target: float = NAN  # V_t: held-out loss on the person's own data
    general: float = NAN  # V_g: loss on the fixed general set
    alive: bool = True  # False: it broke down before the rung


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How seats are counted and dealt. eta: one of eta goes on; quota: the share of seats dealt by dynamics; least: fewer runs are only ranked."""

    eta: float = 3.0
    quota: float = 0.5
    goal: Goal = "learn"
    least: int = 6


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Both rankings of one run at a rung; smaller is better, NaN where it could not be ranked."""

    dynamics: float = (
        NAN  # score_dyn: rank of the norm, ascending, plus rank of the loss, descending, inside of the group
    )
    dynamics_place: float = NAN  # place in the group by it, from 1
    heldout: float = NAN  # V_t, or V_t + V_g
    heldout_place: float = NAN  # place among all, from 1
    group_size: int = 0  # runs of the group that reached the rung alive


@dataclass(frozen=True, kw_only=True)
class Selection:
    """A decision at a rung. order: every living run, best first; the first `seats` of it go on, and whoever was named to be kept."""

    order: tuple[int, ...]
    seats: int
    by: Mapping[int, str]  # trial -> the list that gave it its place in the order
    ranks: Mapping[int, Ranks] = field(default_factory=dict)
    kept: frozenset[int] = frozenset()

    def going(
        self,
        lost: frozenset[int] = frozenset(),
        *,
        named: frozenset[int] = frozenset(),
        dropped: frozenset[int] = frozenset(),
    ) -> list[int]:
        """Who goes on, in order. lost: runs that broke down since; the next in order is revived in the place of each.

        named: runs that a person keeps, beside the seats; dropped: runs that a person stops: they stay in the list, so that nobody gets their seats, and
        are trained no more. When nobody else would be left, the best of the others goes on.
        """
        able = [trial for trial in self.order if trial not in lost]
        seated = able[: self.seats]
        chosen = [*seated, *(trial for trial in able[self.seats :] if trial in self.kept | named)]
        if set(chosen) - dropped:
            return chosen
        return [*chosen, *[trial for trial in able if trial not in dropped][:1]]


# ── the two rankings ──────────────────────────────────────────────────────────────────────────────────────────────────


def average_ranks(values: Sequence[float], *, descending: bool = False) -> list[float]:
    """Ranks from 1, equal values sharing the mean of theirs; NaN for what is not a number.

    values: [n]; returns [n].
    """
    numbers = np.asarray(values, dtype=float)
    known = np.flatnonzero(np.isfinite(numbers))
    ranks = np.full(len(numbers), NAN)
    keys = -numbers[known] if descending else numbers[known]
    for place, key in zip(known, keys, strict=True):
        ranks[place] = float((keys < key).sum()) + (float((keys == key).sum()) + 1) / 2
    return [float(rank) for rank in ranks]


def heldout_value(standing: Standing, goal: Goal) -> float:
    """V_t, or V_t + V_g when what the model knew counts too."""
    return standing.target + standing.general if goal == "both" else standing.target


def ranks_of(standings: Sequence[Standing], goal: Goal) -> dict[int, Ranks]:
    """Both rankings of every living run: dynamics inside of its group, held-out loss over all."""
    alive = [standing for standing in standings if standing.alive]
    values = [heldout_value(standing, goal) for standing in alive]
    heldout = {s.trial: (value, place) for s, value, place in zip(alive, values, average_ranks(values), strict=True)}
    found: dict[int, Ranks] = {}
    for group in dict.fromkeys(standing.group for standing in alive):
        inside = [s for s in alive if s.group == group]
        low_norm = average_ranks([s.norm for s in inside])
        high_loss = average_ranks([s.loss for s in inside], descending=True)
        scores = [g + loss for g, loss in zip(low_norm, high_loss, strict=True)]
        for s, score, place in zip(inside, scores, average_ranks(scores), strict=True):
            value, among_all = heldout[s.trial]
            found[s.trial] = Ranks(
                dynamics=score, dynamics_place=place, heldout=value, heldout_place=among_all, group_size=len(inside)
            )
    return found


def lists(ranks: Mapping[int, Ranks], least: int) -> tuple[list[int], list[int]]:
    """(by held-out loss, by dynamics), best first. By dynamics a run is placed by its standing inside of its own group alone, so that no norm and no
    training loss is ever compared across groups; groups smaller than `least` say nothing by dynamics."""
    heldout = [(r.heldout_place, t) for t, r in ranks.items() if math.isfinite(r.heldout_place)]
    dynamics = [
        ((r.dynamics_place - 0.5) / r.group_size, r.heldout_place if math.isfinite(r.heldout_place) else math.inf, t)
        for t, r in ranks.items()
        if math.isfinite(r.dynamics_place) and r.group_size >= least
    ]
    return [trial for *_, trial in sorted(heldout)], [trial for *_, trial in sorted(dynamics)]


# ── seats ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def deal(heldout: Sequence[int], dynamics: Sequence[int], quota: float) -> list[tuple[int, str]]:
    """Every run once, dealt from both lists in turn so that among the first k about quota × k come from dynamics; (trial, list).

    A run that stands in front of both lists takes one seat, and the next seat of the other list goes to the next in it. At 1:1 held-out loss begins.
    """
    queues = {HELDOUT: list(heldout), DYNAMICS: list(dynamics)}
    given: list[tuple[int, str]] = []
    taken: set[int] = set()
    by_dynamics = 0
    while any(queues.values()):
        turn = DYNAMICS if by_dynamics + 1 <= quota * (len(given) + 1) + 1e-9 else HELDOUT
        if not queues[turn]:
            turn = HELDOUT if turn == DYNAMICS else DYNAMICS
        trial = queues[turn].pop(0)
        if trial in taken:
            continue
        taken.add(trial)
        given.append((trial, turn))
        by_dynamics += turn == DYNAMICS
    return given


def num_seats(count: int, eta: float) -> int:
    """About one of eta, at least one."""
    return max(1, math.floor(count / eta + 0.5)) if count else 0


def select(standings: Sequence[Standing], rule: Rule, kept: frozenset[int] = frozenset()) -> Selection:
    """The decision at a rung: who goes on. Runs that broke down take no seat; fewer than `rule.least` runs are ranked and all go on."""
    ranks = ranks_of(standings, rule.goal)
    dealt = deal(*lists(ranks, rule.least), rule.quota)
    order = [trial for trial, _ in dealt]
    order += sorted(trial for trial in ranks if trial not in order)  # nothing was measured: last, in order of number
    seats = num_seats(len(standings), rule.eta) if len(standings) >= rule.least else len(order)
    return Selection(order=tuple(order), seats=seats, by=dict(dealt), ranks=ranks, kept=kept)


def promotable(standings: Sequence[Standing], rule: Rule, gone: frozenset[int]) -> list[tuple[int, str]]:
    """The asynchronous form (ASHA, Li et al. 2020): runs in the top 1/eta, by either list, of those that have reached the rung so far, without those that
    have gone on already; (trial, list), best first. A list with no share in the quota does not count.

    No more go on in all than one of eta: the tops of two lists, and tops that change while runs arrive, would otherwise let most of them through.
    """
    ranks = ranks_of(standings, rule.goal)
    heldout, dynamics = lists(ranks, min(rule.least, len(standings)))
    top = math.floor(len(standings) / rule.eta + 1e-9)
    heldout = heldout[:top] if rule.quota < 1 else []
    dynamics = dynamics[:top] if rule.quota > 0 else []
    able = [(trial, by) for trial, by in deal(heldout, dynamics, rule.quota) if trial not in gone]
    return able[: max(0, top - len(gone))]


# ── what the rule would have cost ─────────────────────────────────────────────────────────────────────────────────────


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation of the pairs in which both are known; NaN for fewer than three, or when one of them does not vary."""
    pairs = np.array([(x, y) for x, y in zip(a, b, strict=True) if math.isfinite(x) and math.isfinite(y)])
    if len(pairs) < 3:
        return NAN
    x, y = (np.asarray(average_ranks(column.tolist())) for column in pairs.T)
    if x.std() == 0 or y.std() == 0:
        return NAN
    return float(np.corrcoef(x, y)[0, 1])


@dataclass(frozen=True, kw_only=True)
class Correlation:
    """How well a signal foretold the final scores in a group: rank correlation with a bootstrap interval of 95 %."""

    value: float
    low: float
    high: float
    runs: int

    @property
    def covers_zero(self) -> bool:
        """Whether the signal may say nothing, as far as these runs tell."""
        return not (self.low > 0 or self.high < 0)


def bootstrap(signal: Sequence[float], final: Sequence[float], *, draws: int = 1000, seed: int = 0) -> Correlation:
    """Spearman with a percentile interval over runs drawn with replacement; draws without any spread are left out. Both NaN below three runs."""
    a, b = np.asarray(signal, dtype=float), np.asarray(final, dtype=float)
    known = np.isfinite(a) & np.isfinite(b)
    a, b = a[known], b[known]
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(draws if len(a) >= 3 else 0):
        chosen = rng.integers(0, len(a), len(a))
        found.append(spearman(a[chosen].tolist(), b[chosen].tolist()))
    kept = np.array([value for value in found if math.isfinite(value)])
    low, high = np.percentile(kept, [2.5, 97.5]) if len(kept) else (NAN, NAN)
    return Correlation(value=spearman(a.tolist(), b.tolist()), low=float(low), high=float(high), runs=len(a))


def foretold(
    standings: Sequence[Standing], final: Mapping[int, float], goal: Goal
) -> dict[str, dict[str, Correlation]]:
    """group -> signal -> correlation with the final score (larger is better), every signal turned so that a positive number means: points the right way."""
    ranks = ranks_of(standings, goal)
    out: dict[str, dict[str, Correlation]] = {}
    for group in dict.fromkeys(s.group for s in standings if s.trial in ranks):
        inside = [s for s in standings if s.group == group and s.trial in ranks and s.trial in final]
        scores = [final[s.trial] for s in inside]
        signals = {
            "lower norm": [-s.norm for s in inside],
            "higher training loss": [s.loss for s in inside],
            "dynamics": [-ranks[s.trial].dynamics for s in inside],
            "held-out loss": [-ranks[s.trial].heldout for s in inside],
        }
        out[group] = {name: bootstrap(values, scores) for name, values in signals.items()}
    return out


def regret(final: Mapping[int, float], survivors: Sequence[int]) -> float:
    """Best final score of all minus best among the survivors; NaN when neither is known."""
    known = [score for score in final.values() if math.isfinite(score)]
    kept = [final[trial] for trial in survivors if trial in final and math.isfinite(final[trial])]
    return max(known) - max(kept) if known and kept else NAN


def random_regret(final: Mapping[int, float], count: int) -> float:
    """The expected regret of `count` survivors drawn at random, exactly: the k-th best is the best survivor with probability C(n-k, count-1) / C(n, count)."""
    scores = sorted((score for score in final.values() if math.isfinite(score)), reverse=True)
    n = len(scores)
    if not 0 < count <= n:
        return NAN
    chances = [math.comb(n - 1 - place, count - 1) / math.comb(n, count) for place in range(n)]
    return sum(chance * (scores[0] - score) for chance, score in zip(chances, scores, strict=True))
