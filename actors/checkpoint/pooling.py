"""`PoolingConfig`: what a checkpoint says about a model that makes one vector of a whole sequence: an embedding, or the
scores of a classifier.

Encoders (BERT and the RoBERTa family) are described here; a decoder that is used in this way has its `ModelConfig`.
How token states become a vector is read from sentence-transformers' files where a directory has them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import structs

from llm_runtime.actors.checkpoint.config import ModelConfig, check_config
from llm_runtime.actors.checkpoint.config_of_huggingface import config_of_directory
from llm_runtime.actors.checkpoint.errors import CheckpointError
from llm_runtime.actors.checkpoint.read import read_config

Task = Literal["generate", "embed", "classify"]
Pooling = Literal["mean", "cls", "last"]
Activation = Literal["none", "sigmoid", "softmax"]

FAMILIES = {"Bert": "bert", "Roberta": "roberta", "XLMRoberta": "roberta"}
"""Encoder families by the beginning of their architectures, with the prefix that tensors have under a head."""
_ENCODERS = {f"{family}{kind}" for family in FAMILIES for kind in ("Model", "ForMaskedLM")}
_CLASSIFIER = "ForSequenceClassification"
_CAUSAL = "ForCausalLM"
_POOLINGS: dict[str, Pooling] = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
_ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu")


class Encoder(msgspec.Struct, frozen=True):
    """The sizes of an encoder.

    Attributes:
        positions: rows of the table of positions; the first token has row `first_position`.
        activation: of the MLP.
        prefix: what tensors' names begin with, a dot included, where the model has a head.
    """

    family: str
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    positions: int
    first_position: int
    types: int
    norm_eps: float
    activation: str
    prefix: str


class PoolingConfig(msgspec.Struct, frozen=True):
    """A model that embeds or classifies.

    Attributes:
        vector_size: numbers of an answer: of an embedding, or one a label.
        max_position: tokens that the model can read. max_length: that it should be given at most, by default.
        pooling: which states make the vector. normalize: it is made one of length 1.
        labels: names of a classifier's classes; one for a model that scores pairs.
        activation: what makes scores of a classifier's numbers.
        encoder, decoder: the model; one of them is None.
    """

    task: Literal["embed", "classify"]
    architecture: str
    vector_size: int
    vocab_size: int
    max_position: int
    max_length: int
    pooling: Pooling
    normalize: bool
    labels: list[str] = []
    activation: Activation = "none"
    encoder: Encoder | None = None
    decoder: ModelConfig | None = None

    @property
    def eos_token_ids(self) -> list[int]:
        """Nothing ends what is not generated."""
        return []


def task_of(path: Path) -> Task:
    """What the model of a checkpoint is for, by its architecture. Raises CheckpointError if that cannot be read."""
    if not path.is_dir():
        return "generate"  # GGUF
    architecture = _architecture(path, _json(path / "config.json"))
    if architecture.endswith(_CLASSIFIER):
        return "classify"
    return "embed" if architecture in _ENCODERS else "generate"


def read_pooling_config(path: Path, task: Literal["embed", "classify"]) -> PoolingConfig:
    """The configuration of a model that embeds or classifies.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or of a model that is not supported for this task.
    """
    if not path.is_dir():
        if task == "classify":
            raise CheckpointError(f"{path}: a GGUF file has no classification head; use the model's directory")
        return _decoder(path, read_config(path), {}, task)
    raw = _json(path / "config.json")
    architecture = _architecture(path, raw)
    if task == "classify" and not architecture.endswith(_CLASSIFIER):
        raise CheckpointError(f"{path}: {architecture} has no classification head; give task embed or another model")
    if task == "embed" and architecture.endswith(_CLASSIFIER):
        raise CheckpointError(f"{path}: {architecture} is a classifier and makes no embeddings; give task classify")
    family = architecture.removesuffix(_CLASSIFIER)
    if architecture in _ENCODERS or (task == "classify" and family in FAMILIES):
        return _encoder(path, raw, architecture, task)
    causal = architecture if task == "embed" else family + _CAUSAL
    config = config_of_directory(path, causal)
    check_config(path, config)
    return _decoder(path, structs.replace(config, architecture=causal), raw, task)


def _encoder(path: Path, raw: dict[str, Any], architecture: str, task: Literal["embed", "classify"]) -> PoolingConfig:
    family = next(each for each in sorted(FAMILIES, key=len, reverse=True) if architecture.startswith(each))
    roberta = family != "Bert"
    positions = _count(path, raw, "max_position_embeddings", 2**20)
    first = _count(path, raw, "pad_token_id", positions - 2, default=1, least=0) + 1 if roberta else 0
    if raw.get("position_embedding_type", "absolute") != "absolute" or raw.get("is_decoder"):
        raise CheckpointError(f"{path}: only {architecture} with absolute positions that sees both sides is supported")
    activation = raw.get("hidden_act", "gelu")
    if activation not in _ACTIVATIONS:
        raise CheckpointError(
            f"{path}: activation {activation!r} is not supported; supported are {', '.join(_ACTIVATIONS)}"
        )
    encoder = Encoder(
        family=family,
        hidden_size=_count(path, raw, "hidden_size", 2**17),
        num_layers=_count(path, raw, "num_hidden_layers", 2**10),
        num_heads=_count(path, raw, "num_attention_heads", 2**10),
        intermediate_size=_count(path, raw, "intermediate_size", 2**20),
        positions=positions,
        first_position=first,
        types=_count(path, raw, "type_vocab_size", 2**10, default=2),
        norm_eps=float(raw.get("layer_norm_eps", 1e-12)),
        activation=activation,
        prefix="" if architecture.endswith("Model") else f"{FAMILIES[family]}.",
    )
    if encoder.hidden_size % encoder.num_heads:
        raise CheckpointError(f"{path}: {encoder.hidden_size} dimensions cannot be divided among {encoder.num_heads}")
    return _finish(
        path,
        raw,
        architecture,
        task,
        hidden_size=encoder.hidden_size,
        vocab_size=_count(path, raw, "vocab_size", 2**24),
        max_position=positions - first,
        pooling="mean" if task == "embed" else "cls",
        encoder=encoder,
    )


def _decoder(path: Path, config: ModelConfig, raw: dict[str, Any], task: Literal["embed", "classify"]) -> PoolingConfig:
    if config.transformers is not None:
        raise CheckpointError(f"{path}: {config.architecture} is not supported for the task {task}")
    return _finish(
        path,
        raw,
        config.architecture,
        task,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        max_position=config.max_position,
        pooling="last",
        # The output matrix is not needed: it is taken for the embedding, which is there anyway.
        decoder=structs.replace(config, tie_embeddings=True),
    )


def _finish(
    path: Path,
    raw: dict[str, Any],
    architecture: str,
    task: Literal["embed", "classify"],
    *,
    hidden_size: int,
    vocab_size: int,
    max_position: int,
    pooling: Pooling,
    encoder: Encoder | None = None,
    decoder: ModelConfig | None = None,
) -> PoolingConfig:
    normalize, max_length = True, max_position
    if path.is_dir():
        max_length = min(max_length, _max_length(path) or max_length)
        if task == "embed" and (path / "modules.json").is_file():
            pooling, normalize = _modules(path, pooling)
    labels = _labels(path, raw) if task == "classify" else []
    return PoolingConfig(
        task=task,
        architecture=architecture,
        vector_size=len(labels) if task == "classify" else hidden_size,
        vocab_size=vocab_size,
        max_position=max_position,
        max_length=max_length,
        pooling=pooling,
        normalize=normalize and task == "embed",
        labels=labels,
        activation=_activation(path, raw, len(labels)) if task == "classify" else "none",
        encoder=encoder,
        decoder=decoder,
    )


def _modules(path: Path, pooling: Pooling) -> tuple[Pooling, bool]:
    """What sentence-transformers' list of modules says of pooling and normalization."""
    file = path / "modules.json"
    normalize = False
    for module in _json(file, list):
        kind = str(module.get("type", "")).rpartition(".")[2] if isinstance(module, dict) else ""
        if kind == "Pooling":
            pooling = _pooling(path / str(module.get("path", "")) / "config.json")
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer":
            raise CheckpointError(f"{file}: a module {kind or 'of no type'} is not supported")
    return pooling, normalize


def _pooling(file: Path) -> Pooling:
    raw = _json(file)
    stated = raw.get("pooling_mode")
    modes = [stated] if isinstance(stated, str) else list(stated or [])
    if not modes:
        given = [key for key, value in raw.items() if key.startswith("pooling_mode_") and value is True]
        modes = [key.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token") for key in given]
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        raise CheckpointError(
            f"{file}: pooling {'+'.join(map(str, modes)) or 'of no kind'} is not supported; supported is one of "
            f"{', '.join(_POOLINGS)}"
        )
    return _POOLINGS[modes[0]]


def _max_length(path: Path) -> int | None:
    """The longest input that sentence-transformers gives the model."""
    file = path / "sentence_bert_config.json"
    value = _json(file).get("max_seq_length") if file.is_file() else None
    return value if isinstance(value, int) and value > 0 else None


def _labels(path: Path, raw: dict[str, Any]) -> list[str]:
    names, count = raw.get("id2label"), raw.get("num_labels")
    if isinstance(names, dict) and names:
        try:
            return [str(names[key]) for key in sorted(names, key=int)]
        except ValueError:
            raise CheckpointError(f"{path}: id2label of config.json has keys that are no numbers") from None
    count = 2 if count is None else count  # as transformers has it
    if not isinstance(count, int) or not 1 <= count <= 2**16:
        raise CheckpointError(f"{path}: num_labels of {count!r} makes no sense")
    return [f"LABEL_{number}" for number in range(count)]


def _activation(path: Path, raw: dict[str, Any], labels: int) -> Activation:
    of_library = raw.get("sentence_transformers")
    stated = of_library.get("activation_fn") if isinstance(of_library, dict) else None
    stated = stated or raw.get("sbert_ce_default_activation_function")
    if stated is not None:
        name = str(stated).rpartition(".")[2]
        activations: dict[str, Activation] = {"Identity": "none", "Sigmoid": "sigmoid", "Softmax": "softmax"}
        if name not in activations:
            raise CheckpointError(f"{path}: the activation {stated} of config.json is not supported")
        return activations[name]
    return "sigmoid" if labels == 1 or raw.get("problem_type") == "multi_label_classification" else "softmax"


def _architecture(path: Path, raw: dict[str, Any]) -> str:
    found = raw.get("architectures")
    return str(found[0]) if isinstance(found, list) and found else "of no name"


def _count(path: Path, raw: dict[str, Any], key: str, limit: int, default: int | None = None, least: int = 1) -> int:
    value = raw.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= limit:
        raise CheckpointError(f"{path}: {key} of {value!r} in config.json makes no sense")
    return value


def _json(file: Path, kind: type[Any] = dict) -> Any:
    try:
        value = json.loads(file.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from None
    if not isinstance(value, kind):
        raise CheckpointError(f"{file}: is not a JSON {'object' if kind is dict else 'list'}")
    return value
