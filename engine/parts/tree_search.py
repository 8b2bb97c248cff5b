"""A search tree over fragments of an answer, by upper confidence bounds, and the pairs of better and worse fragments that it shows."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from engine.parts.tool_calls import overlap

_BORDER = re.compile(r"(?:\. |, |=|\()")


@dataclass(frozen=True, slots=True)
class Completion:
    """A sampled end of an answer: its text, whether it ended by itself, and the mean log-probability of its tokens."""

    text: str
    ended: bool
    mean_logprob: float


@dataclass(kw_only=True)
class Node:
    """A fragment behind those of its ancestors. `value` is a mean, so that much visited nodes are not favoured."""

    text: str
    parent: Node | None = None
    ended: bool = False  # the answer ends behind this fragment
    prior: float = 1.0
    children: list[Node] = field(default_factory=list)
    visits: int = 0
    total: float = 0.0  # of the rewards of simulations that went through it
    guesses: int = 0
    guess: float = 0.0  # sum of what the completions it came from were worth

    @property
    def value(self) -> float:
        count = self.visits + self.guesses
        return (self.total + self.guess) / count if count else 0.0

    @property
    def path(self) -> str:
        """Everything up to and with this fragment."""
        return (self.parent.path if self.parent else "") + self.text

    @property
    def depth(self) -> int:
        return self.parent.depth + 1 if self.parent else 0

    def child(self, text: str, ended: bool, prior: float) -> Node:
        """The child with this text, made when it is not there."""
        for found in self.children:
            if found.text == text and found.ended == ended:
                return found
        self.children.append(Node(text=text, parent=self, ended=ended, prior=prior))
        return self.children[-1]

    def walk(self) -> Iterator[Node]:
        """This node and everything below it."""
        yield self
        for child in self.children:
            yield from child.walk()


@dataclass(frozen=True, kw_only=True)
class Search:
    """The size of a search (card: 3 actions, 5 simulations, depth 3, c = 1)."""

    actions: int
    simulations: int
    depth: int
    exploration: float


@dataclass(frozen=True, kw_only=True)
class FragmentPair:
    """A better and a worse fragment behind the same beginning."""

    prefix: str
    chosen: str
    rejected: str
    chosen_ended: bool
    rejected_ended: bool
    gap: float


def grow(
    search: Search,
    sample: Callable[[str, int], Sequence[Completion]],
    finish: Callable[[str], str],
    reward: Callable[[str], float],
    *,
    fast: Callable[[str, bool], float],
) -> Node:
    """Grow a tree: select by upper confidence bounds, expand with sampled completions, finish one, and give its reward to all ancestors.

    sample(prefix, n): n completions of a beginning; finish(prefix): the greedy end of a beginning, as a whole answer; reward(answer) in [-1, 1];
    fast(fragment, ended): what a fragment seems worth when its own completion did not end.
    """
    root = Node(text="")
    for _ in range(search.simulations):
        leaf = _select(root, search.exploration)
        if not leaf.ended and leaf.depth < search.depth:
            _expand(leaf, search, sample(leaf.path, search.actions), reward, fast)
            leaf = _select(leaf, search.exploration)
        worth = reward(leaf.path if leaf.ended else finish(leaf.path))
        node: Node | None = leaf
        while node is not None:
            node.visits += 1
            node.total += worth
            node = node.parent
    return root


def _select(node: Node, exploration: float) -> Node:
    while node.children:
        scale = math.log(node.visits + 1)
        node = max(
            node.children,
            key=lambda child: child.value + exploration * child.prior * math.sqrt(scale / (child.visits + 1)),
        )
    return node


def _expand(
    node: Node,
    search: Search,
    completions: Sequence[Completion],
    reward: Callable[[str], float],
    fast: Callable[[str, bool], float],
) -> None:
    for completion in completions:
        worth = reward(node.path + completion.text) if completion.ended else None
        chain = fragments(completion.text, search.depth - node.depth)
        here, prior = node, math.exp(min(0.0, completion.mean_logprob))
        for place, text in enumerate(chain):
            last = place == len(chain) - 1
            here = here.child(text, completion.ended and last, prior)
            here.guesses += 1
            here.guess += worth if worth is not None else fast(text, completion.ended and last)


def fragments(text: str, most: int, join: int = 2) -> list[str]:
    """A completion cut behind ". ", ", ", "=" and "(", two pieces a fragment, at most `most` of them: the rest is merged into the last."""
    pieces, start = [], 0
    for border in _BORDER.finditer(text):
        pieces.append(text[start : border.end()])
        start = border.end()
    pieces = [piece for piece in [*pieces, text[start:]] if piece]
    joined = ["".join(pieces[place : place + join]) for place in range(0, len(pieces), join)]
    return joined if len(joined) <= most else [*joined[: most - 1], "".join(joined[most - 1 :])]


def pairs(root: Node, *, gap: float, most_overlap: float, floor: float) -> list[FragmentPair]:
    """At each node the best child against the worst, where they are far enough apart, not nearly the same text, and the better is no failure."""
    found = []
    for node in root.walk():
        if len(node.children) < 2:
            continue
        best = max(node.children, key=lambda child: child.value)
        worst = min(node.children, key=lambda child: child.value)
        apart = best.value - worst.value
        if (
            best.text == worst.text
            or apart < gap
            or best.value < floor
            or overlap(best.text, worst.text) > most_overlap
        ):
            continue
        found.append(
            FragmentPair(
                prefix=node.path,
                chosen=best.text,
                rejected=worst.text,
                chosen_ended=best.ended,
                rejected_ended=worst.ended,
                gap=apart,
            )
        )
    return found
