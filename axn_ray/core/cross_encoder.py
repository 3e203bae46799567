"""The cross-encoder (CE), the expensive scale: one raw logit per (query, item) pair, in float32.

Knows no corpus, no search and no Ray. Pairs are assembled from token ids; the encoder runs in bfloat16 where the
hardware is fast at it, its pooler and head always in float32, so that scores keep their resolution.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from axn_ray import sample
from axn_ray.core.artifact import hash_file
from axn_ray.core.bert_engine import BertCpuEngine, is_fast_bert
from axn_ray.core.engines import TorchEngine
from axn_ray.core.models import Dtype, choose_device, choose_dtype, locate_model
from axn_ray.core.pair_layout import Overlong
from axn_ray.core.prompt import QWEN3_INSTRUCTION, QWEN3_TEMPLATE
from axn_ray.core.token_scorer import TokenPairScorer
from axn_ray.core.tokens import PairTemplate, TokenTable
from axn_ray.errors import ModelError

Config = TypeVar("Config", bound="CrossEncoderConfig")
SOURCES = "hub id, local folder, PEFT adapter folder, http://SERVER#tei (or #vllm, #cohere, #jina, #axn), python:module:factory"
WEIGHT_FILES = ("*.safetensors", "*.bin", "config.json", "adapter_config.json")
TOKENIZER_FILES = ("tokenizer*.json", "*_tokens*.json", "vocab.*", "merges.txt", "*.model", "*.codes")


class CrossEncoderConfig(BaseModel):
    """Which CE, and how it reads a pair; the part that all stages with a CE share."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cross_encoder: str = Field(sample.CROSS_ENCODER, description=SOURCES)
    max_length: int | None = Field(None, ge=8, description="tokens per pair; default: what the tokenizer says")
    dtype: Dtype = Field("auto", description="of the encoder; pooler and head are always float32")
    batch_tokens: int = Field(4096, ge=1, description="tokens per forward pass, padding included")
    overlong: Overlong = Field("truncate", description="an item that does not fit: refuse it, cut its end, or score its chunks")
    label: str | None = Field(None, description="the output to read, of a model with several")
    yes_token: str = Field("yes", min_length=1, description="of a causal LM: the token whose logit is the score")
    no_token: str = Field("no", description="of a causal LM: the token whose logit is taken off; empty for none")
    template: str = Field(QWEN3_TEMPLATE, description="of a causal LM: what it reads, with {query}, {item} and {instruction}")
    instruction: str = Field(QWEN3_INSTRUCTION, description="of a causal LM: what stands for {instruction}")
    api_key: SecretStr | None = Field(None, description="of a server: file:PATH or env:NAME, where its key stands")
    in_flight: int = Field(8, ge=1, description="of a server: requests at once, from each worker")
    request_items: int = Field(32, ge=1, description="of a server: items in a request")
    timeout: float = Field(60.0, gt=0, description="of a server: seconds for one request")

    @field_validator("api_key")
    @classmethod
    def _check_api_key(cls, key: SecretStr | None) -> SecretStr | None:
        """A place that no command has read is no key."""
        if key is not None and key.get_secret_value().startswith(("env:", "file:")):
            raise ValueError("api_key says where the key stands, which only the axn commands look up; give the key itself")
        return key


def with_whole_path(config: Config) -> Config:
    """The same with a local folder's whole path: workers may run in another working directory."""
    name = config.cross_encoder
    return config.model_copy(update={"cross_encoder": str(Path(name).resolve())}) if name and Path(name).is_dir() else config


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
