"""What every child needs, imported once before the first fork: modules and their tables; no tensor operation, no tokenizer, no CUDA call."""

from __future__ import annotations

import contextlib
import gc
import importlib

from engine.core.registry import catalogue

MODULES = (
    "torch",
    "transformers",
    "peft",
    "safetensors.torch",
    "sklearn.linear_model",
    "sklearn.metrics",
    "pyarrow.parquet",
    "transformers.integrations.sdpa_attention",
    "transformers.models.llama.modeling_llama",
    "transformers.models.bert.modeling_bert",
    "transformers.models.bert.tokenization_bert",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.tokenization_utils_tokenizers",
    "engine.io.machine",
    "engine.io.skeleton",
    "engine.ops.check",
    "engine.ops.compare",
    "engine.ops.folder",
    "engine.ops.flow",
    "engine.ops.generate",
    "engine.ops.probe",
    "engine.ops.search",
    "engine.ops.serve",
    "engine.ops.train",
    "engine.ops.transform",
    "engine.train.certificate",
)


def warm_up() -> None:
    """Import it all, and take what is there out of the collector's sight, so that no collection in a fork copies pages by touching them."""
    for name in MODULES:
        importlib.import_module(name)
    catalogue()
    importlib.import_module("engine.tasks").tasks()
    with contextlib.suppress(
        ImportError, AttributeError
    ):  # a table of a thousand patterns that the loader compiles at its first use
        importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("")
    gc.collect()
    gc.freeze()
