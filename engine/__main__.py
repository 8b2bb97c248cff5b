"""The engine's command line: python -m engine list | check | run | predict | certify | transform | serve | call | spare | bench."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

# Two spinning OpenMP processes on two cores run ten times slower: waiting threads must sleep. This has to be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def main(arguments: list[str] | None = None) -> int:
    """Run one command of the engine; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m engine", description="Bonsai's training engine, without the web.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    listing = commands.add_parser("list", help="show every method in the catalogue")
    listing.add_argument("--json", action="store_true", help="the whole catalogue as JSON")
    checking = commands.add_parser("check", help="say what a recipe would do, or everything that is wrong with it")
    checking.add_argument("recipe", type=Path)
    running = commands.add_parser("run", help="train a recipe file, or run or resume a job folder")
    running.add_argument("path", type=Path, help="a recipe (YAML or JSON), or a folder that holds recipe.json")
    running.add_argument("--out", type=Path, help="folder for a recipe file's run (default: runs/<fingerprint>)")
    predicting = commands.add_parser("predict", help="ask a result")
    predicting.add_argument("artifact", type=Path)
    predicting.add_argument("text", nargs="+")
    certifying = commands.add_parser("certify", help="load an artifact with the official loaders and compare")
    certifying.add_argument("artifact", type=Path)
    changing = commands.add_parser("transform", help="make new weights from given ones: merge, reset, prune")
    changing.add_argument("slug", help="a transformation of the catalogue")
    changing.add_argument("out", type=Path, help="folder of the new model")
    changing.add_argument(
        "models", type=Path, nargs="+", help="model folders, in the order that the transformation's page says"
    )
    changing.add_argument("--params", type=json.loads, default={}, help="hyperparameters as JSON")
    serving = commands.add_parser("serve", help="stay resident and answer on a Unix socket")
    serving.add_argument("--socket", type=Path, required=True)
    commands.add_parser("call", help="answer one JSON request from standard input")
    commands.add_parser(
        "spare", help="import everything and wait for one order of the service that started this process"
    )
    benching = commands.add_parser("bench", help="measure and rewrite docs/benchmarks")
    benching.add_argument("names", nargs="*", help="which benchmarks (default: the quick ones)")
    benching.add_argument("--list", action="store_true", help="print the names as JSON instead")
    chosen = parser.parse_args(arguments)
    try:
        return int(_COMMANDS[chosen.command](chosen))
    except BrokenPipeError:
        return 0


def _list(chosen: argparse.Namespace) -> int:
    from engine.answers import answer_catalogue

    body = answer_catalogue({})
    if chosen.json:
        json.dump(body, sys.stdout, allow_nan=False)
        print()
        return 0
    for method in body["methods"]:
        where = ", ".join(method["slots"]) or method["role"]
        print(f"{method['slug']:28} {where:18} {method['title']}")
    return 0


def _check(chosen: argparse.Namespace) -> int:
    from engine.core.errors import EngineError
    from engine.ops.check import check

    try:
        checked = check(_read_recipe(chosen.recipe))
    except EngineError as error:
        print(error, file=sys.stderr)
        return 2
    for fault in checked.faults:
        print(f"{fault.where}: {fault}", file=sys.stderr)
    if checked.faults:
        return 2
    for suggestion in checked.suggestions:
        print(f"{suggestion.where} = {suggestion.value}: {suggestion.reason}")
    guess = checked.estimate
    print(
        f"{guess['total_steps']:,} steps, {guess['num_trainable']:,} numbers that may change, about {guess['memory_bytes'] / 1e9:.2f} GB, "
        f"{guess['seconds_low'] / 60:.1f} to {guess['seconds_high'] / 60:.1f} minutes on {guess['device_name']}."
    )
    return 0


def _run(chosen: argparse.Namespace) -> int:
    from engine.core.control import write_json
    from engine.core.errors import EngineError

    folder: Path = chosen.path
    if not folder.is_dir():
        try:
            recipe = _read_recipe(chosen.path)
        except EngineError as error:
            print(error, file=sys.stderr)
            return 2
        folder = chosen.out or Path("runs") / recipe.fingerprint()[:12]
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "recipe.json").exists():
            write_json(folder / "recipe.json", _resolved(recipe))
    from engine.ops.folder import exit_code, run_folder
    from engine.train.run import set_threads

    set_threads()
    result = run_folder(folder)
    print(result["message"])
    return exit_code(folder, result)


def _resolved(recipe):  # type: ignore[no-untyped-def]
    from engine.ops.check import check

    checked = check(recipe)
    return (recipe if checked.faults else checked.recipe).model_dump(mode="json")


def _predict(chosen: argparse.Namespace) -> int:
    from engine.train.export import load_predictor

    for answer in load_predictor(chosen.artifact).predict(chosen.text):
        print(json.dumps(answer, ensure_ascii=False))
    return 0


def _certify(chosen: argparse.Namespace) -> int:
    from engine.train.certificate import certify

    certificate = certify(chosen.artifact)
    print(certificate["sentence"])
    return 0 if certificate["ok"] else 1


def _transform(chosen: argparse.Namespace) -> int:
    from engine.core.errors import EngineError
    from engine.ops.transform import transform

    try:
        transform(chosen.slug, chosen.params, chosen.models, chosen.out)
    except EngineError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"The new model is in {chosen.out}.")
    return 0


def _serve(chosen: argparse.Namespace) -> int:
    from engine.service import serve

    serve(chosen.socket)
    return 0


def _call(chosen: argparse.Namespace) -> int:
    from engine.answers import answer, encode
    from engine.train.run import set_threads

    request = json.loads(sys.stdin.read())
    set_threads()
    real, sys.stdout = sys.stdout, sys.stderr  # only the answer goes to standard output
    reply = encode(answer(request))
    real.buffer.write(reply)
    real.flush()
    return 0


def _spare(chosen: argparse.Namespace) -> int:
    from engine.spare import wait_for_order

    return wait_for_order()


def _bench(chosen: argparse.Namespace) -> int:
    from engine.bench.report import list_studies, run_named

    return list_studies() if chosen.list else run_named(chosen.names)


def _read_recipe(path: Path):  # type: ignore[no-untyped-def]
    from engine.core.errors import bad_input
    from engine.core.recipe import parse_recipe_text

    try:
        return parse_recipe_text(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise bad_input(
            "recipe", f"The recipe {path} could not be read.", f"{error}.", "Check the path.", "unreadable_recipe"
        ) from None


_COMMANDS = {
    "list": _list,
    "check": _check,
    "run": _run,
    "predict": _predict,
    "certify": _certify,
    "transform": _transform,
    "serve": _serve,
    "call": _call,
    "spare": _spare,
    "bench": _bench,
}

if __name__ == "__main__":
    sys.exit(main())
