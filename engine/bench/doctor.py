"""The run doctor on a ward: how many kinds of sick runs it finds, how often it warns of a healthy one, and what it costs."""

from __future__ import annotations

import logging
import math
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.bench.measure import interleave
from engine.bench.pages import Goal, Section, Study
from engine.bench.ward import LESSONS, Case, Judged, Ward, healthy_cases, sick_cases, taught_cases
from engine.bench.workbench import Workbench, random_llama, step, story_file
from engine.train.parts import Look, Watcher
from engine.train.trainables import condition

TUNED, REPORTED = (1, 2), (51, 52)  # seeds on which the limits were chosen, and seeds that are only measured
PROCESSES = 2


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a process tells of a run."""

    name: str
    seed: int
    planned: int
    warned: tuple[tuple[int, str], ...]
    hit: tuple[int, str] | None


_ward: Ward | None = None  # built once, inherited by the processes that are forked afterwards


GROUPS = {"sick": sick_cases, "healthy": healthy_cases, "taught": taught_cases}


def _judge(job: tuple[str, int, int]) -> Outcome:
    group, place, seed = job
    torch.set_num_threads(1)
    assert _ward is not None
    return outcome_of(_ward.judge(list(GROUPS[group]())[place], seed))


def outcome_of(judged: Judged) -> Outcome:
    """The part of a judgement that can leave its process."""
    hit = judged.hit
    return Outcome(
        name=judged.case.name, seed=judged.seed, planned=judged.planned, warned=tuple((at, signal.rule) for at, signal in judged.warned),
        hit=None if hit is None else (hit[0], hit[1].rule),
    )  # fmt: skip


def measure() -> list[Section]:
    """Run the study and return its tables."""
    global _ward
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    _ward = Ward()
    try:
        for name in LESSONS:
            _ward.school(name)
        cases = {group: list(make()) for group, make in GROUPS.items()}
        jobs = [(group, place, seed) for group in GROUPS for place in range(len(cases[group])) for seed in REPORTED]
        with multiprocessing.get_context("fork").Pool(PROCESSES) as pool:
            told = dict(zip(jobs, pool.map(_judge, jobs, chunksize=1), strict=True))
        found = {group: [outcome for job, outcome in told.items() if job[0] == group] for group in GROUPS}
        return [
            _sick(cases["sick"], found["sick"]),
            _healthy(cases["healthy"], found["healthy"]),
            _taught(cases["taught"], found["taught"]),
            _cost(),
        ]
    finally:
        _ward.close()


def _sick(cases: Sequence[Case], found: Sequence[Outcome]) -> Section:
    section = Section(
        title="Sick runs",
        intro=f"{len(cases)} kinds of illness on tiny models, {len(REPORTED)} seeds each, in the real loop. Found: a warning that names the illness or what it "
        f"does; then what else was said. Limits were chosen on seeds {TUNED[0]} and {TUNED[1]}; these are seeds {REPORTED[0]} and {REPORTED[1]}.",
        columns=("kind", "goal", "found", "after steps, of", "by", "also said"),
    )  # fmt: skip
    for case in cases:
        mine = [outcome for outcome in found if outcome.name == case.name]
        hits = [outcome.hit for outcome in mine if outcome.hit is not None]
        by = sorted({rule for _, rule in hits})
        also = sorted({rule for outcome in mine for _, rule in outcome.warned} - set(by))
        section.rows.append((
            case.name, case.task, f"{len(hits)} of {len(mine)}", f"{', '.join(str(at) for at, _ in hits) or '–'} of {mine[0].planned}",
            ", ".join(by) or "**nothing**", ", ".join(also),
        ))  # fmt: skip
    hit = sum(outcome.hit is not None for outcome in found)
    missed = [f"{outcome.name} (seed {outcome.seed})" for outcome in found if outcome.hit is None]
    section.remarks.append(f"Missed: {'; '.join(missed) or 'none'}.")
    section.remarks.append(
        "The models are tiny and the runs short. What counts as found was written down before these seeds were run; seeds 31 and 32 were measured once "
        "before, with looser limits of rate-too-low and with more names counted as found: 63 of 64 (missed: sorted by class), no false alarm."
    )
    shares = [outcome.hit[0] / outcome.planned for outcome in found if outcome.hit is not None]
    section.remarks.append(
        f"Half of the findings came within the first {statistics.median(shares):.0%} of the planned steps."
    )
    section.goals.append(
        Goal(goal="sick runs found", value=hit / len(found), interval=wilson(hit, len(found)), target=0.9, better="more", unit="share",
             baseline="early signals and patience name no cause; nothing warned by default before", reason=f"Missed: {'; '.join(missed)}." if missed else "")
    )  # fmt: skip
    return section


def _healthy(cases: Sequence[Case], found: Sequence[Outcome]) -> Section:
    section = Section(
        title="Healthy runs",
        intro=f"{len(found)} ordinary runs over methods, goals, rates and batch sizes, on these seeds. A false alarm is a run with a warning; notes do not count.",
        columns=("run", "seeds", "with a warning", "by"),
    )
    for case in cases:
        mine = [outcome for outcome in found if outcome.name == case.name]
        rules = sorted({rule for outcome in mine for _, rule in outcome.warned})
        section.rows.append(
            (case.name, str(len(mine)), str(sum(bool(outcome.warned) for outcome in mine)), ", ".join(rules))
        )
    alarms = [outcome for outcome in found if outcome.warned]
    named = "; ".join(f"{o.name} (seed {o.seed}): {', '.join(rule for _, rule in o.warned)}" for o in alarms)
    section.remarks.append(f"False alarms: {named or 'none'}.")
    section.remarks.append(
        "Runs that learn nothing on these toy models, such as customer messages with an encoder that was never taught, "
        "are warned of too; they were replaced while limits were chosen."
    )
    section.goals.append(
        Goal(goal="healthy runs with a warning", value=len(alarms) / len(found), interval=wilson(len(alarms), len(found)), target=0.05, better="less",
             unit="share", baseline="none", reason=f"False alarms: {named}." if alarms else "")
    )  # fmt: skip
    return section


def _taught(cases: Sequence[Case], found: Sequence[Outcome]) -> Section:
    section = Section(
        title="Runs with nothing left to learn",
        intro="The model goes on with the very texts that it was taught with. Nothing is wrong, and nothing is gained: the doctor warns that nothing is learned. "
        "These runs count neither as sick nor as healthy; they were among the healthy ones until the first look at the seeds for choosing limits.",
        columns=("run", "seeds", "with a warning", "by"),
    )
    for case in cases:
        mine = [outcome for outcome in found if outcome.name == case.name]
        rules = sorted({rule for outcome in mine for _, rule in outcome.warned})
        section.rows.append(
            (case.name, str(len(mine)), str(sum(bool(outcome.warned) for outcome in mine)), ", ".join(rules))
        )
    warned = sum(bool(outcome.warned) for outcome in found)
    section.remarks.append(
        f"{warned} of {len(found)} are warned of. Whoever goes on with a finished model should expect it; the message names this cause among others."
    )
    section.goals.append(
        Goal(goal="runs with nothing left to learn that are warned of", value=warned / len(found), interval=wilson(warned, len(found)), unit="share",
             baseline="none")
    )  # fmt: skip
    return section


def _cost() -> Section:
    bench = Workbench()
    try:
        model = f"folder:{random_llama(bench.folder, hidden=192, layers=3, ffn=512, heads=3, vocab=600)}"
        recipe = bench.recipe(
            model, f"file:{story_file(bench.folder, 60)}", [("lora", {"r": 8, "targets": "all-linear"}), ("clip", {})], epochs=50,
            batch_size=4, max_length=128, precision="fp32", holdout=0.05, learning_rate=1e-4,
        )  # fmt: skip
        run = bench.run(recipe)
        micro = run.next_batches()
        doctor = run.slots.watchers[0]  # no other stands in this run
        seconds = interleave({"step": lambda: step(run, micro)}, rounds=15, warm=3)["step"].median
        looking = a_look(doctor, run.clock.step + 1)
        measuring = interleave(
            {"all": run.evaluate, "learners": lambda: condition(run.trainables, run.optimizer)}, rounds=5, warm=1
        )
        share = looking / seconds
        evaluation = measuring["learners"].median / measuring["all"].median
        return Section(
            title="What it costs",
            intro="A small but honest step: LoRA r = 8 on every linear layer of a Llama with hidden 192 and 3 layers, 4 stories at a time, fp32.",
            columns=("what", "time", "share"),
            rows=[
                ("a training step", f"{seconds * 1e3:.1f} ms", ""),
                ("a look of the doctor", f"{looking * 1e6:.0f} µs", f"{share:.2%} of a step"),
                ("condition of what learns, at a measurement", f"{measuring['learners'].median * 1e3:.2f} ms", f"{evaluation:.2%} of a measurement"),
                ("state of the doctor", f"{len(str(doctor.state_dict())):,} characters", "whatever the length of the run"),
            ],
            goals=[Goal(goal="a look of the doctor / a step", value=share, target=0.01, better="less", baseline="the same step without it")],
        )  # fmt: skip
    finally:
        bench.close()


def a_look(doctor: Watcher, first: int, count: int = 4000) -> float:
    """Seconds that the doctor needs for a row, from step `first` of a run on."""
    looks = [
        Look(step=at, samples=8 * at, planned_samples=8 * count, planned_steps=count, warmup_steps=10,
             row={"loss": 2 + math.sin(at) / 9, "grad_norm": 1 + math.cos(at) / 9, "tokens": 500 * at, "weight": 500.0, "epoch": at / 100, "clipped": 0.0})
        for at in range(first, first + count)
    ]  # fmt: skip
    start = time.perf_counter()
    for look in looks:
        list(doctor.see(look))
    return (time.perf_counter() - start) / len(looks)


def wilson(hits: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    share = hits / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


STUDY = Study(name="doctor", page="doctor.md", minutes=7, quick=False, seed=REPORTED[0], run=measure)
