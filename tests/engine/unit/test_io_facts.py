"""Facts: what is read from a model's folder is what the loaded model has, and unsafe or broken folders are refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from engine.core.errors import EngineError
from engine.core.facts import DataFacts
from engine.core.recipe import DataRef
from engine.io import facts as looking
from engine.io import sources
from engine.io.facts import data_facts, locate_model, machine_facts, model_facts, starter_models
from engine.tasks import task
from tests.engine.unit.tiny_models import tiny_bert, tiny_llama

LABELS = DataFacts(
    source="", path="", format="csv", shape="classification", num_rows=9, columns=(), mapping={}, labels=("a", "b", "c")
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"))


def check_against_loaded_model(source: str, goal: str) -> tuple[int, int]:
    facts = model_facts(source, task=goal)
    model = task(goal).load_model(facts, LABELS, dtype=torch.float32, seed=1)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    fresh = task(goal).fresh(model)
    expected = {
        name: shape
        for name, shape in shapes.items()
        if not name.startswith(tuple(f"{module}." for module in fresh) or ("\0",))
    }
    assert facts.tensors == expected
    for name, (out, into) in facts.linears.items():
        module = model.get_submodule(name)
        assert type(module) is nn.Linear and (module.out_features, module.in_features) == (out, into)
    linear = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    assert set(facts.linears) == {name for name in linear if not name.startswith((*fresh, "lm_head"))}
    return len(facts.tensors), len(facts.linears)


@pytest.mark.parametrize("goal", ["causal_lm", "classify"])
def test_names_and_shapes_are_those_of_the_loaded_decoder(llama: Path, goal: str) -> None:
    assert check_against_loaded_model(f"folder:{llama}", goal)[1] == 14


def test_names_and_shapes_are_those_of_the_loaded_encoder(tmp_path: Path) -> None:
    assert check_against_loaded_model(f"folder:{tiny_bert(tmp_path / 'bert')}", "classify")[1] == 13


def test_an_encoder_without_pooler_weights_gets_a_fresh_pooler_that_is_not_a_fact(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path / "bert")
    tensors = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if "pooler" not in name}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert check_against_loaded_model(f"folder:{folder}", "classify")[1] == 12
    facts = model_facts(f"folder:{folder}", task="classify")
    model = task("classify").load_model(facts, LABELS, dtype=torch.float32, seed=1)
    assert task("classify").fresh(model) == ("classifier", "bert.pooler.dense")


def test_minilm() -> None:
    facts = model_facts("starter:minilm-l6", task="classify")
    assert (facts.kind, facts.family, facts.num_layers, facts.hidden_size, facts.max_positions) == (
        "encoder",
        "bert",
        6,
        384,
        512,
    )
    assert facts.num_parameters == 22_713_216 and facts.dtype == "F32" and not facts.has_chat_template
    assert facts.tensors["bert.encoder.layer.0.attention.self.query.weight"] == (384, 384)
    assert "bert.pooler.dense" in facts.linears and not any("classifier" in name for name in facts.tensors)
    assert check_against_loaded_model("starter:minilm-l6", "classify") == (103, 37)


def test_stories260k(shared_data: Path) -> None:
    source = f"folder:{shared_data / 'stories260k'}"
    facts = model_facts(source, task="causal_lm")
    assert (facts.kind, facts.num_parameters, facts.tied_embeddings, facts.max_positions) == (
        "decoder",
        260_032,
        True,
        512,
    )
    assert facts.tensors["model.layers.0.self_attn.q_proj.weight"] == (64, 64)
    assert facts.linears["model.layers.4.mlp.down_proj"] == (64, 172) and len(facts.linears) == 35
    assert check_against_loaded_model(source, "causal_lm") == (47, 35)


def test_looking_at_data_loads_no_torch() -> None:
    code = "import sys, engine.io.facts, engine.io.datasets; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ── refusals ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def edit(folder: Path, name: str, **changes: object) -> None:
    body = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**body, **changes}))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def index_outside(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))


def shard_missing(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("token*"):
        path.unlink()


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickle": (pickled, "pickle_weights"),
    "cut short": (cut_short, "damaged_weights"),
    "index points outside": (index_outside, "unsafe_index"),
    "a shard is missing": (shard_missing, "missing_weights"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "missing_weights"),
    "no tokenizer": (no_tokenizer, "no_tokenizer"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "no_config"),
    "config is a list": (lambda folder: (folder / "config.json").write_text("[]"), "bad_config"),
    "own code": (lambda folder: edit(folder, "config.json", auto_map={"AutoModel": "code.py"}), "remote_code"),
    "own tokenizer code": (
        lambda folder: edit(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.py", None]}),
        "remote_code",
    ),
    "unknown family": (lambda folder: edit(folder, "config.json", model_type="nobody-knows"), "bad_config"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_or_unsafe_folder_is_refused(llama: Path, tmp_path: Path, case: str) -> None:
    damage, code = BROKEN[case]
    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    damage(folder)
    with pytest.raises(EngineError) as caught:
        model_facts(f"folder:{folder}", task="causal_lm")
    fault = caught.value.fault
    assert fault.code == code and fault.where == "model.source"
    assert all(sentence.endswith(".") for sentence in (fault.what, fault.why, fault.way_out)), fault


def test_weights_of_another_model_are_refused_when_loaded(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EngineError, match="1 tensors are missing"):
        task("causal_lm").load_model(
            model_facts(f"folder:{folder}", task="causal_lm"), LABELS, dtype=torch.float32, seed=1
        )


def test_facts_follow_a_changed_folder(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    assert not model_facts(f"folder:{folder}", task="instruct").has_chat_template
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert model_facts(f"folder:{folder}", task="instruct").has_chat_template


@pytest.mark.parametrize(
    ("source", "code"),
    [("starter:none", "unknown_starter"), ("starter:../data", "unknown_starter"), ("folder:/nowhere", "no_folder"), ("gpt2", "unknown_source"),
     ("hub:../x", "bad_hub_name"), ("hub:a/b/c", "bad_hub_name")],
)  # fmt: skip
def test_a_source_that_leads_nowhere_is_refused(source: str, code: str) -> None:
    with pytest.raises(EngineError) as caught:
        locate_model(source)
    assert caught.value.fault.code == code


def test_the_hub_is_not_asked_when_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(EngineError, match="HF_HUB_OFFLINE") as caught:
        locate_model("hub:owner/name")
    assert caught.value.reason == "environment"


def test_a_hub_that_cannot_be_reached_is_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unreachable(*_: object, **__: object) -> object:
        raise TimeoutError("no answer")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    with pytest.raises(EngineError, match="could not be asked") as caught:
        locate_model("hub:owner/name")
    assert caught.value.reason == "environment"


def test_only_safe_files_of_the_top_folder_are_fetched() -> None:
    sizes = dict.fromkeys(
        [
            "config.json",
            "model.safetensors",
            "pytorch_model.bin",
            "onnx/model.onnx",
            "original/params.json",
            "code.py",
            "vocab.txt",
        ],
        1,
    )
    assert sources._wanted_files("a/b", sizes, weights=True) == ["config.json", "vocab.txt", "model.safetensors"]
    with pytest.raises(EngineError, match="offers no safetensors"):
        sources._wanted_files("a/b", {"config.json": 1, "pytorch_model.bin": 1}, weights=True)


def test_every_starter_model_is_there() -> None:
    for entry in starter_models():
        assert set(entry) == {"name", "title", "sentence", "source", "kind"}
        assert model_facts(entry["source"]).kind == entry["kind"]
    assert "minilm-l6" in {entry["name"] for entry in starter_models()}


# ── data and machine ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_data_are_the_ones_that_were_meant(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label,other\n" + "".join(f"w{n},{n % 2},{n % 3}\n" for n in range(12)))
    facts = data_facts(DataRef(source=f"file:{path}"))
    assert facts.labels == ("0", "1") and facts.source == f"file:{path}"
    assert data_facts(DataRef(source=f"file:{path}", columns={"text": "text", "label": "other"})).labels == (
        "0",
        "1",
        "2",
    )
    data_facts(DataRef(source=f"file:{path}", sha256=facts.sha256))
    path.write_text(path.read_text() + "more,1,1\n")
    with pytest.raises(EngineError, match="not those that the recipe was made for"):
        data_facts(DataRef(source=f"file:{path}", sha256=facts.sha256))
    path.unlink()
    with pytest.raises(EngineError, match="There is no file"):
        data_facts(DataRef(source=f"file:{path}"))
    with pytest.raises(EngineError, match="no starter data"):
        data_facts(DataRef(source="starter:none"))


def test_what_a_look_told_is_kept_for_this_content_and_these_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(path: Path, **columns: str) -> DataFacts:
        looking._data_facts.cache_clear()  # as in a fresh process
        return data_facts(DataRef(source=f"file:{path}", columns=columns))

    path, home = tmp_path / "rows.csv", tmp_path / "home"
    path.write_text("text,label,kind\n" + "".join(f"Text {n},{'ab'[n % 2]},{'xy'[n % 2]}\n" for n in range(20)))
    plain, other = asked(path), asked(path, text="text", label="kind")
    monkeypatch.setenv("BONSAI_HOME", str(home))
    assert asked(path) == plain and asked(path, text="text", label="kind") == other
    looked: list[Path] = []
    look = looking.inspect
    monkeypatch.setattr(looking, "inspect", lambda path, **more: (looked.append(path), look(path, **more))[1])
    twin = tmp_path / "twin.csv"
    twin.write_bytes(path.read_bytes())
    assert asked(path) == plain and asked(path, text="text", label="kind") == other and asked(twin).path == str(twin)
    assert not looked
    for kept in (home / "cache" / "facts").iterdir():
        kept.write_text(kept.read_text()[:-9])
    assert asked(path) == plain and looked == [path], "a damaged note is made again"
    path.write_text(path.read_text() + "One more,a,x\n")
    assert asked(path).num_rows == 21
    as_text = tmp_path / "rows.txt"
    as_text.write_bytes(twin.read_bytes())
    assert asked(as_text).format == "txt", "the ending has a say in what a file is"


def test_the_machine_is_described() -> None:
    machine = machine_facts()
    assert machine.device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert machine.memory_bytes > 10**9 and machine.num_threads == torch.get_num_threads() and machine.device_name
