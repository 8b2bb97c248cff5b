"""Facts: what is known about a model, a dataset and a machine before any weight is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Read from config.json, tokenizer files and safetensors headers alone.

    `tensors` maps each tensor's name in the loaded transformers model to its shape; `linears` names the modules (not tensors) that are
    ordinary linear maps y = x W^T + b with W [out, in].
    """

    source: str
    path: str
    family: str  # the config's model_type: "llama", "bert", …
    kind: str  # "encoder" | "decoder" | "encoder-decoder"
    architecture: str
    num_parameters: int
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_positions: int
    dtype: str
    tied_embeddings: bool
    has_chat_template: bool
    tensors: dict[str, tuple[int, ...]] = field(repr=False)
    linears: dict[str, tuple[int, int]] = field(repr=False)  # module name -> (out, in)
    num_heads: int = 0
    dropout: float = 0.0  # the largest share that some layer drops at random while learning

    @property
    def a_kind(self) -> str:
        """The kind with its article, for sentences."""
        return f"{'an' if self.kind[:1] in 'aeiou' else 'a'} {self.kind}"

    def size(self, tensor: str) -> int:
        """How many numbers a tensor holds."""
        return prod(self.tensors[tensor])


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """What a look at the file told: size, columns, roles, label names, lengths in characters, and anything odd."""

    source: str
    path: str
    format: str  # "csv" | "tsv" | "json" | "jsonl" | "parquet"
    shape: str  # "classification" | "messages" | "instruction" | "problems" | "text" | "preferences" | "unknown"
    num_rows: int
    columns: tuple[str, ...]
    mapping: dict[str, str]  # role -> column
    labels: tuple[str, ...] = ()
    label_counts: tuple[int, ...] = ()
    mean_chars: float = 0.0
    p99_chars: float = 0.0
    max_chars: int = 0
    sha256: str = ""


@dataclass(frozen=True, kw_only=True)
class MachineFacts:
    """The device a run would use."""

    device: str  # "cpu" | "cuda"
    device_name: str
    memory_bytes: int  # of the device that holds the model
    num_threads: int
    has_bf16: bool
    compiler_lacks: str = ""  # what torch.compile misses here, in words; "" when it finds everything


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Everything `Method.supports`, `Method.claims` and `Method.suggest` may look at."""

    task: str
    model: ModelFacts
    data: DataFacts
    machine: MachineFacts
    models: tuple[ModelFacts, ...] = ()  # of the recipe's further models


NO_DATA = DataFacts(source="", path="", format="none", shape="none", num_rows=0, columns=(), mapping={})
"""Stands where a recipe names no data."""
