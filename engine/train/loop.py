"""The loop. It names no method; everything that differs between methods stands in a slot.

The moment of every hook is written in engine.train.parts.MOMENTS, in the order in which the calls below happen.
"""

from __future__ import annotations

import math

from engine.core.errors import EngineError, Fault
from engine.train.compiled import compiled
from engine.train.parts import Remedy, Signal
from engine.train.run import Ending, Run


def train(run: Run) -> Ending:
    """Train until the plan, a signal, a budget or a person says it is enough. Starts or resumes wherever `run.clock` stands.

    When it returns, the last checkpoint is on the disk.
    """
    run.model.train()
    with run.saving.finishing(), compiled(run), run.remembering():
        ending = _train(run)
    run.model.eval()
    return ending


def _train(run: Run) -> Ending:
    clock, settings = run.clock, run.settings
    save_every = settings.checkpoint_every or max(1, clock.total_steps // 10)
    measure_at = {round(clock.total_steps * k / settings.evaluations) for k in range(1, settings.evaluations + 1)} | {
        clock.total_steps
    }
    if clock.step == 0:
        run.begin()
        run.look({}, run.evaluate())
        run.save()

    ending = (
        run.ending if run.ending is not None and run.ending.exports else None
    )  # a crash after the end only repeats the export
    while ending is None and clock.step < clock.total_steps:
        micro = run.next_batches()
        report = run.update_rule.update(run, micro)  # loss + terms → backward → rules → schedule → optimizer
        clock.step, clock.samples, clock.tokens = report.step, report.samples, report.tokens
        run.adapt(report)  # grow, prune, re-draw; optimizer state follows; derived weights follow
        row = run.record(report)
        signals = run.look(row)
        _refuse_nonfinite(run, row, signals)

        best_step = run.best.get("step")
        here = clock.step == run.pause_at and clock.step < clock.total_steps
        if clock.step in measure_at or here:
            signals += run.look(row, run.evaluate())
            run.answer(run.settings.live_samples, prefix="live-")
        run.collect()
        request = run.control.poll() or ("pause" if here else None)
        run.ending = ending = _ending(run, signals, request)
        if (
            clock.step % save_every == 0
            or run.best.get("step") != best_step
            or request is not None
            or ending is not None
            or any(signal.action == "save" for signal in signals)
            or clock.step == clock.total_steps
        ):
            run.save()
    run.progress(force=True)
    if ending is None:
        ending = Ending(reason="completed", message=f"Finished all {clock.total_steps:,} steps.")
    if ending.exports and clock.step not in measure_at:
        run.evaluate()
        run.save()
    return ending


def _ending(run: Run, signals: list[Signal], request: str | None) -> Ending | None:
    clock = run.clock
    where = f"after step {clock.step:,} of {clock.total_steps:,}"
    if request == "cancel":
        return Ending(reason="cancelled", message=f"Cancelled {where}; the last checkpoint is kept.")
    if request == "pause":
        return Ending(reason="paused", message=f"Paused {where}; it can go on from exactly here.")
    if request == "stop":
        return Ending(reason="stopped", message=f"Stopped {where} as asked; what was learned so far is kept.")
    for signal in signals:
        if signal.action == "stop":
            return Ending(reason="early_stopped", message=f"Stopped {where}: {signal.message}")
    limit = run.settings.max_minutes
    if limit is not None and clock.seconds >= limit * 60:
        return Ending(
            reason="budget",
            message=f"The time limit of {limit:g} minutes was reached {where}; what was learned is kept.",
        )
    return None


def _refuse_nonfinite(run: Run, row: dict[str, float], signals: list[Signal]) -> None:
    """A loss or gradient that is not a number never reaches a checkpoint. The way out stands in the log before the run ends."""
    bad = [name for name in ("loss", "grad_norm") if not math.isfinite(row[name])]
    if bad:
        rate = run.settings.learning_rate or 0.0
        if not any(signal.rule == NOT_FINITE and signal.remedy for signal in signals):
            run.tell([_not_finite(run, bad, rate)])
        run.log.flush()
        raise EngineError(
            Fault(
                where="settings.learning_rate",
                code="not_finite",
                what=f"The {' and the '.join(bad).replace('_', ' ')} became infinite or not a number at step {run.clock.step:,}.",
                why="Usually the learning rate is too high, or the data holds an extreme value; the weights after this step are worthless.",
                way_out=f"Start again with a learning rate of {rate / 10:g}; the last good checkpoint is kept.",
            ),
            "diverged",
        )


NOT_FINITE = "not-finite"


def _not_finite(run: Run, bad: list[str], rate: float) -> Signal:
    """What the log says where no watcher has said more."""
    return Signal(
        action="warn",
        rule=NOT_FINITE,
        message=f"The {' and the '.join(bad).replace('_', ' ')} stopped being a number at step {run.clock.step:,}, so the run cannot go on. Most "
        "likely the learning rate is too high.",
        numbers={"step": run.clock.step, "bad": bad},
        remedy=Remedy(
            title=f"Restart from the last good checkpoint with a learning rate of {rate / 10:g}",
            start="last_good",
            changes={"settings.learning_rate": rate / 10},
        ),
    )
