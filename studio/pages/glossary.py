"""Terms of the field, each in one sentence that needs no other term."""

from __future__ import annotations

GLOSSARY: dict[str, str] = {
    "model": "A large table of numbers that turns text into an answer; training changes some of these numbers.",
    "parameter": "One of the numbers inside a model. Small models have millions of them, large ones billions.",
    "training": "Showing examples to a model again and again, and correcting its numbers a little each time.",
    "fine-tuning": "Going on with the training of a model that already knows a language, so that it learns your task too.",
    "method": "A recipe from a research paper or an established baseline that says which numbers may change, and how.",
    "loss": "How wrong the model is on the examples at hand; lower is better.",
    "held-out loss": "How wrong the model is on examples that were kept back and never learned from. This is the honest number.",
    "step": "One correction of the model, made after it has read one batch of examples.",
    "epoch": "One pass over all the examples.",
    "batch": "The examples that are read together before each correction.",
    "learning rate": "How big each correction is. Too high and the model stumbles, too low and it learns nothing.",
    "token": "A word or a piece of a word; models read and write text in tokens.",
    "gradient norm": "How hard the model is being pulled at this step. Sudden jumps are an early sign of trouble.",
    "signal": "What a watcher says during a run: a note, a warning, or the advice to stop, with its reason.",
    "checkpoint": "A saved state of a run, from which it can go on as if nothing had happened.",
    "recipe": "Everything that says what a run does, in one file: data, model, methods and settings. The same recipe gives the same run.",
    "adapter": "A small file with what was learned, which is used together with the model it was learned on.",
    "merged model": "The model with what was learned folded in, as one folder that other programs can load.",
    "certificate": "A check of the result: the exported files are loaded in a fresh process and must give the same answers as the run.",
    "encoder": "A kind of model that reads a text at once and is good at sorting and comparing texts.",
    "decoder": "A kind of model that writes text, one token after the other.",
    "slot": "A place in a run where a method can stand, such as the optimizer or a watcher.",
    "optimizer": "The part that turns the pull on each number into a correction.",
    "schedule": "The part that makes corrections larger or smaller over the course of a run.",
    "seed": "The number from which all chance in a run follows, so that it can be repeated exactly.",
    "baseline": "A simple rival that a trained model has to beat, so that its score means something.",
    "over-fitting": "Learning the examples by heart instead of learning what they have in common.",
    "forgetting": "Losing skills that a model had before, while it learns something new.",
}  # fmt: skip
