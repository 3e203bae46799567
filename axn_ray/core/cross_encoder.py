"""The cross-encoder (CE), the expensive scale: one raw logit per (query, item) pair, in float32.

Knows no corpus, no search and no Ray. Pairs are assembled from token ids; the encoder runs in bfloat16 where the
hardware is fast at it, its pooler and head always in float32, so that scores keep their resolution.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from axn_ray.core.artifact import hash_file
from axn_ray.core.bert_engine import BertCpuEngine, is_fast_bert
from axn_ray.core.cross_encoder_config import CrossEncoderConfig
from axn_ray.core.engines import TorchEngine
from axn_ray.core.models import choose_device, choose_dtype, locate_model
from axn_ray.core.token_scorer import TokenPairScorer
from axn_ray.core.tokens import PairTemplate, TokenTable
from axn_ray.errors import ModelError

WEIGHT_FILES = ("*.safetensors", "*.bin", "config.json", "adapter_config.json")
TOKENIZER_FILES = ("tokenizer*.json", "*_tokens*.json", "vocab.*", "merges.txt", "*.model", "*.codes")


def load_adapter_or_model(name: str, kind: Any = AutoModelForSequenceClassification) -> tuple[Any, Any]:
    """Load (model, tokenizer) in float32 from a hub id, a folder, or a PEFT adapter folder, merged into its base.

    Raises:
        ModelError: it cannot be found or read, or has no weights for what scores a pair.
    """
    source = locate_model(name)
    try:
        if is_adapter(source):
            from peft import PeftConfig, PeftModel  # seconds to import, and only adapters need it

            base = locate_model(PeftConfig.from_pretrained(source).base_model_name_or_path)
            one_logit = {"num_labels": 1} if kind is AutoModelForSequenceClassification else {}
            model = PeftModel.from_pretrained(kind.from_pretrained(base, **one_logit), source).merge_and_unload()
        else:
            model, loading = kind.from_pretrained(source, output_loading_info=True)
            _refuse_random_weights(name, loading["missing_keys"])
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise not_loaded(name, error) from error
    return model, tokenizer


def not_loaded(name: str, error: Exception) -> ModelError:
    """What to say of a name under which transformers finds nothing."""
    reason = str(error).splitlines()[0]
    return ModelError(f"cross-encoder {name!r} cannot be loaded ({reason}); give a hub id, a folder or an adapter")


def is_adapter(source: str) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (Path(source) / "adapter_config.json").is_file()


def _refuse_random_weights(name: str, missing: Iterable[str]) -> None:
    if missing:
        raise ModelError(
            f"cross-encoder {name!r} has no weights for {', '.join(sorted(missing)[:3])}, so its scores would be random; "
            "give a model that was trained to score pairs"
        )


def longest_input(model: Any, tokenizer: Any) -> int:
    """Tokens that both the tokenizer and the model's positions allow."""
    return min(tokenizer.model_max_length, count_positions(model) or 512)


def count_positions(model: Any) -> int | None:
    """The places that a model has for tokens, where it says how many."""
    positions: int | None = getattr(model.config, "max_position_embeddings", None)
    table = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    padding: int | None = getattr(table, "padding_idx", None)
    if positions and padding is not None:  # RoBERTa counts from the place behind the padding's
        positions -= padding + 1
    return positions


def find_max_length(config: CrossEncoderConfig, model: Any, tokenizer: Any) -> int:
    """Tokens of a pair: what the config says, or the longest input.

    Raises:
        ModelError: the config says more than the model has positions.
    """
    positions, embeddings = count_positions(model), getattr(model.base_model, "embeddings", None)
    has_table = embeddings is None or getattr(embeddings, "position_embeddings", None) is not None  # relative ones end nowhere
    if config.max_length and positions and has_table and config.max_length > positions:
        described = f"cross-encoder {config.cross_encoder!r} has {positions} positions"
        raise ModelError(f"{described}, max_length={config.max_length} needs more; lower it")
    return config.max_length or longest_input(model, tokenizer)


def find_column(config: CrossEncoderConfig, described: Any) -> int:
    """Which output is the score: the only one, or the named one.

    Raises:
        ModelError: several outputs and no name, or a name that the model does not know.
    """
    labels = {str(name): int(column) for name, column in (described.label2id or {}).items()}
    if config.label is None and described.num_labels == 1:
        return 0
    if config.label not in labels:
        wanted = f"no label {config.label!r}" if config.label else f"{described.num_labels} outputs and no label was named"
        raise ModelError(f"cross-encoder {config.cross_encoder!r} has {wanted}; set label to one of {', '.join(labels)}")
    return labels[config.label]


def hash_model(name: str, model: Any) -> str:
    """sha256 over the files of model and tokenizer and its adapter's base, or the hub's commit where the files are the hub's."""
    digest = hashlib.sha256()
    folder = Path(locate_model(name))
    if not folder.is_dir():
        return str(getattr(model.config, "_commit_hash", None) or name)
    for path in sorted(p for pattern in WEIGHT_FILES + TOKENIZER_FILES for p in folder.glob(pattern)):
        digest.update(f"{path.name}:{hash_file(path)};".encode())
    if is_adapter(str(folder)):
        from peft import PeftConfig

        base = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
        digest.update(hash_model(base, model).encode())
    return digest.hexdigest()


def describe_model(config: CrossEncoderConfig, model: Any, max_length: int, dtype: torch.dtype) -> dict[str, Any]:
    """What the scores of any model that runs here depend on: the part of a fingerprint that all have."""
    return {
        "model": hash_model(config.cross_encoder, model),
        "max_length": max_length,
        "dtype": str(dtype).removeprefix("torch."),
        "overlong": f"{config.overlong}-pair",
    }


class CrossEncoder(TokenPairScorer):
    """A sequence-classification CE with one logit, or one named label, on the GPU when there is one.

    Raises:
        ModelError: see `load_adapter_or_model`, `find_max_length` and `find_column`.
    """

    def __init__(self, config: CrossEncoderConfig) -> None:
        model, self._tokenizer = load_adapter_or_model(config.cross_encoder)
        device = choose_device()
        dtype = choose_dtype(config.dtype, device)
        template = PairTemplate.of(self._tokenizer)
        max_length = find_max_length(config, model, self._tokenizer)
        label = {"label": config.label} if config.label else {}
        self.fingerprint = describe_model(config, model, max_length, dtype) | label
        engine: BertCpuEngine | TorchEngine
        if is_fast_bert(model, dtype, device):
            engine = BertCpuEngine(model, dtype)
            if dtype == torch.bfloat16:  # it rounds otherwise, by more than another batch does
                self.fingerprint["engine"] = engine.name
        else:
            engine = TorchEngine(model, dtype, device)
        super().__init__(engine, template, max_length, config.overlong, config.batch_tokens, find_column(config, model.config))

    def tokenize(self, texts: Sequence[str]) -> TokenTable:
        """Tokenize n texts, queries or items, once."""
        return TokenTable.from_texts(texts, self._tokenizer)
