"""What a result is worth, in plain sentences against its stated baseline. Everything is read from the artifact's description."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

from studio.pages import words
from studio.pages.telling import capital

Scores = Mapping[str, Any]
Tone = Literal["better", "even", "worse", "unknown"]
CERTAINTY = 2.0  # standard errors that a difference must exceed before it counts as one


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One number that is measured on kept-back examples."""

    title: str
    sentence: str
    high: bool  # whether more is better
    share: bool = False

    def shown(self, value: Any) -> str:
        if not _is_number(value):
            return "–"
        if self.share:
            return f"{100 * value:.1f}\u00a0%"
        return f"{value:.3f}" if 0.001 <= abs(value) < 100 else words.number(float(value))


MEASURES: Mapping[str, Measure] = {
    "eval_accuracy": Measure(title="Right answers", sentence="How often the answer was the right one.", high=True, share=True),
    "eval_macro_f1": Measure(
        title="Balanced score (macro F1)", sentence="Like right answers, but a rare label counts as much as a frequent one.", high=True, share=True
    ),
    "eval_perplexity": Measure(title="Perplexity", sentence="Between how many next tokens it hesitates, on average.", high=False),
    "eval_loss": Measure(title="Held-out loss", sentence="How wrong it is on examples it never learned from.", high=False),
    "general_loss": Measure(
        title="Loss on general text", sentence="How wrong it is on texts that have nothing to do with yours; it shows what was forgotten.", high=False
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The answer to "is it any good": one sentence, the rivals in a second one, and whether the difference can be luck."""

    sentence: str
    rivals: str
    judgement: str
    tone: Tone


def verdict(description: Mapping[str, Any]) -> Verdict:
    """The verdict on a result from its description (artifact.json)."""
    after, baseline = description.get("metrics") or {}, description.get("baseline") or {}
    num = int((description.get("data") or {}).get("num_holdout") or 0)
    report = description.get("report") or {}
    if description.get("kind") in ("report", "dataset"):
        said = str(report.get("sentence") or (description.get("ending") or {}).get("message") or "It is done.")
        return Verdict(sentence=said, rivals="", judgement="", tone="unknown")
    if _is_number(after.get("eval_accuracy")):
        return _of_shares(description, after, baseline, num)
    if _is_number(after.get("eval_loss")):
        return _of_losses(after, baseline, num)
    return Verdict(
        sentence="It was not measured.", rivals="", judgement="Nothing was kept back to measure it on.", tone="unknown"
    )


def _of_shares(description: Mapping[str, Any], after: Scores, baseline: Scores, num: int) -> Verdict:
    labels = (description.get("data") or {}).get("labels") or []
    share, rival = float(after["eval_accuracy"]), baseline.get("eval_accuracy")
    shares = [share, float(rival)] if _is_number(rival) else [share]
    scale = (
        10
        if all(abs(value - round(10 * value) / 10) <= 0.03 for value in shares)
        and len({round(10 * value) for value in shares}) == len(shares)
        else 100
    )
    known = [side for side in (baseline, *baseline.get("also", [])) if _is_number(side.get("eval_accuracy"))]
    rivals = [f"{_name(side)}: {_times(float(side['eval_accuracy']), scale)}" for side in known]
    if len(known) < 2 and len(labels) > 1:
        rivals.append(f"guessing: 1 of {len(labels)}")
    tone: Tone = "unknown"
    judgement = ""
    if _is_number(rival) and num:
        spread = math.sqrt(sum(value * (1 - value) for value in shares) / num)
        tone, judgement = _judge(share - float(rival), spread, num)
    return Verdict(
        sentence=f"Right {_times(share, scale)} on new examples.",
        rivals=_joined(rivals),
        judgement=judgement,
        tone=tone,
    )


def _of_losses(after: Scores, baseline: Scores, num: int) -> Verdict:
    loss, rival = float(after["eval_loss"]), baseline.get("eval_loss")
    perplexity, other = after.get("eval_perplexity"), baseline.get("eval_perplexity")
    if _is_number(perplexity):
        sentence = f"On new texts it hesitates between about {words.number(float(perplexity), 1)} next tokens."
        rivals = [f"{_name(baseline)}: between {words.number(float(other), 1)}"] if _is_number(other) else []
    else:
        sentence = f"Its loss on new examples is {words.number(loss)}; lower is better."
        rivals = [f"{_name(baseline)}: {words.number(float(rival))}"] if _is_number(rival) else []
    tone: Tone = "unknown"
    judgement = ""
    if _is_number(rival):
        errors = [float(side["eval_loss_se"]) for side in (after, baseline) if _is_number(side.get("eval_loss_se"))]
        tone, judgement = _judge(float(rival) - loss, math.hypot(*errors) if errors else 0.0, num)
    return Verdict(sentence=sentence, rivals=_joined(rivals), judgement=judgement, tone=tone)


def _judge(gain: float, spread: float, num: int) -> tuple[Tone, str]:
    counted = f"With {words.count(num, 'example')} kept back for the test, " if num else ""
    if gain > CERTAINTY * spread:
        return "better", capital(f"{counted}a difference of this size is not luck.")
    if gain < -CERTAINTY * spread:
        return (
            "worse",
            "The baseline is better. More examples, another method or another model may help; this result adds nothing.",
        )
    return "even", capital(
        f"{counted}the difference to the baseline may be luck. Keep back more examples, or train on more, to be sure."
    )


def _times(share: float, scale: int) -> str:
    count = round(scale * share)
    return f"{count} times of {scale}" if count != 1 else f"once of {scale}"


def _name(baseline: Scores) -> str:
    return str(baseline.get("name") or "the baseline")


def _joined(rivals: Sequence[str]) -> str:
    return f"{capital('; '.join(rivals))}." if rivals else ""


def rows(description: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The table of measures: before, baseline and after, with the best of each row marked."""
    sides = {
        name: description.get(key) or {}
        for name, key in (("before", "before"), ("baseline", "baseline"), ("after", "metrics"))
    }
    found = []
    for name in sorted(sides["after"], key=lambda key: list(MEASURES).index(key) if key in MEASURES else len(MEASURES)):
        if name.endswith("_se") or not name.startswith(("eval_", "general_")) or not _is_number(sides["after"][name]):
            continue
        measure = MEASURES.get(name) or Measure(
            title=_plain(name), sentence="", high=not name.endswith(("loss", "perplexity"))
        )
        values = {side: scores.get(name) for side, scores in sides.items()}
        known = [value for value in values.values() if _is_number(value)]
        best = (max if measure.high else min)(known)
        error = sides["after"].get(f"{name}_se")
        found.append({
            "name": name, "title": measure.title, "sentence": measure.sentence, "better": "higher is better" if measure.high else "lower is better",
            **{side: measure.shown(value) for side, value in values.items()}, "error": words.number(float(error)) if _is_number(error) else "",
            "best": [side for side, value in values.items() if value == best],
        })  # fmt: skip
    return found


def _plain(name: str) -> str:
    text = name.removeprefix("eval_").replace("_", " ")
    return capital(text)


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
