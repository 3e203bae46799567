"""The cross-encoder (CE), the expensive scale: one raw logit per (query, item) pair, in float32.

Knows no corpus, no search and no Ray. Pairs are assembled from token ids; the encoder runs in bfloat16 where the
hardware is fast at it, its pooler and head always in float32, so that scores keep their resolution.
"""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from peft import PeftConfig, PeftModel
from pydantic import BaseModel, ConfigDict, Field
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from axn_ray.core.artifact import hash_file
from axn_ray.core.models import Dtype, choose_device, choose_dtype, locate_model
from axn_ray.core.tokens import Int32Array, PairTemplate, TokenTable, token_budget_batches
from axn_ray.errors import ModelError

logger = logging.getLogger(__name__)

FloatArray = npt.NDArray[np.float32]
WEIGHT_FILES = ("*.safetensors", "*.bin", "config.json", "adapter_config.json", "tokenizer.json")


class CrossEncoderConfig(BaseModel):
    """Which CE, and how it reads a pair."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(description="Hugging Face id, local folder, or folder of a PEFT adapter that names its base")
    max_length: int | None = Field(None, ge=8, description="tokens per pair; default: what the tokenizer says")
    dtype: Dtype = Field("auto", description="of the encoder; pooler and head are always float32")
    batch_tokens: int = Field(4096, ge=1, description="tokens per forward pass, padding included")


class PairScorer(Protocol):
    """What scoring and search need of a CE; `CrossEncoder` is one."""

    def tokenize(self, texts: Sequence[str]) -> TokenTable:
        """Tokenize n texts."""
        ...

    def score(self, queries: TokenTable, items: TokenTable, query_index: Int32Array, item_index: Int32Array) -> FloatArray:
        """Score pairs (n,), (n,) -> (n,)."""
        ...


def load_adapter_or_model(name: str) -> tuple[Any, Any]:
    """Load (model, tokenizer) in float32 from a hub id, a folder, or a PEFT adapter folder, merged into its base.

    Raises:
        ModelError: it cannot be found or read, or has more than one output.
    """
    source = locate_model(name)
    try:
        if (Path(source) / "adapter_config.json").is_file():
            base = PeftConfig.from_pretrained(source).base_model_name_or_path
            model = AutoModelForSequenceClassification.from_pretrained(locate_model(base), num_labels=1)
            model = PeftModel.from_pretrained(model, source).merge_and_unload()
        else:
            model = AutoModelForSequenceClassification.from_pretrained(source)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"cross-encoder {name!r} cannot be loaded ({reason}); give a hub id, a folder or an adapter") from error
    if model.config.num_labels != 1:
        raise ModelError(f"cross-encoder {name!r} has {model.config.num_labels} outputs; axn-ray needs a model with one logit")
    return model, tokenizer


def hash_model(name: str, model: Any) -> str:
    """sha256 over the model's files and its adapter's base, or the hub's commit where the files are the hub's."""
    digest = hashlib.sha256()
    folder = Path(locate_model(name))
    if not folder.is_dir():
        return str(getattr(model.config, "_commit_hash", None) or name)
    for path in sorted(p for pattern in WEIGHT_FILES for p in folder.glob(pattern)):
        digest.update(f"{path.name}:{hash_file(path)};".encode())
    if (folder / "adapter_config.json").is_file():
        base = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
        digest.update(hash_model(base, model).encode())
    return digest.hexdigest()


def _cast_to_float(_: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.float() if torch.is_tensor(a) and a.is_floating_point() else a for a in args)


def set_encoder_dtype(model: Any, dtype: torch.dtype) -> None:
    """Cast the encoder to `dtype`; keep its pooler and the head in float32 and feed them float32."""
    encoder = model.base_model
    encoder.to(dtype)
    heads = [child for child in model.children() if child is not encoder]
    if getattr(encoder, "pooler", None) is not None:
        heads.append(encoder.pooler)
    for head in heads:
        head.float()
        head.register_forward_pre_hook(_cast_to_float)


class CrossEncoder:
    """A sequence-classification CE with one logit, on the GPU when there is one.

    Raises:
        ModelError: see `load_adapter_or_model`.
    """

    def __init__(self, config: CrossEncoderConfig) -> None:
        model, self._tokenizer = load_adapter_or_model(config.model)
        self.device = choose_device()
        dtype = choose_dtype(config.dtype, self.device)
        self._template = PairTemplate.of(self._tokenizer)
        self.max_length = config.max_length or min(
            self._tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 512)
        )
        self._batch_tokens = config.batch_tokens
        self.fingerprint: dict[str, Any] = {
            "model": hash_model(config.model, model),
            "max_length": self.max_length,
            "dtype": str(dtype).removeprefix("torch."),
            "overlong": "truncate-item",
        }
        set_encoder_dtype(model, dtype)
        self._model = model.to(self.device).eval()
        self.n_truncated = 0

    def tokenize(self, texts: Sequence[str]) -> TokenTable:
        """Tokenize n texts, queries or items, once."""
        return TokenTable.from_texts(texts, self._tokenizer)

    def score_texts(self, queries: Sequence[str], items: Sequence[str]) -> FloatArray:
        """Score the n pairs (queries[j], items[j]) -> (n,) raw logits."""
        rows = np.arange(len(queries), dtype=np.int32)
        return self.score(self.tokenize(queries), self.tokenize(items), rows, rows)

    def score(self, queries: TokenTable, items: TokenTable, query_index: Int32Array, item_index: Int32Array) -> FloatArray:
        """Score the n pairs (query_index[j], item_index[j]) -> (n,) raw logits, higher is better.

        A pair over `max_length` loses the end of its item (and a query longer than half of it the end of the query);
        `n_truncated` counts such pairs.

        Raises:
            ModelError: a logit is NaN or infinite.
        """
        query_lengths = np.minimum(queries.lengths[query_index], self.max_length // 2)
        room = self.max_length - self._template.n_special - query_lengths
        item_lengths = np.minimum(items.lengths[item_index], room)
        truncated = (query_lengths < queries.lengths[query_index]) | (item_lengths < items.lengths[item_index])
        self.n_truncated += int(truncated.sum())
        scores = np.empty(len(query_index), dtype=np.float32)
        for rows in token_budget_batches(query_lengths + item_lengths, self._batch_tokens):
            query_ids = [queries[query_index[r]][: query_lengths[r]] for r in rows]
            item_ids = [items[item_index[r]][: item_lengths[r]] for r in rows]
            scores[rows] = self._forward(query_ids, item_ids)
        bad = np.flatnonzero(~np.isfinite(scores))
        if len(bad):
            pair = f"query index {query_index[bad[0]]}, item index {item_index[bad[0]]}"
            raise ModelError(f"the cross-encoder gave NaN or infinity for {len(bad)} pairs (first: {pair}); try dtype=float32")
        return scores

    @torch.inference_mode()
    def _forward(self, query_ids: list[Int32Array], item_ids: list[Int32Array]) -> FloatArray:
        """One forward pass over a batch of pairs, padded to its longest."""
        t = self._template
        longest = max(len(q) + len(i) for q, i in zip(query_ids, item_ids, strict=True)) + t.n_special
        ids = np.full((len(query_ids), longest), t.pad, dtype=np.int64)
        types = np.zeros_like(ids)
        mask = np.zeros_like(ids)
        for row, (query, item) in enumerate(zip(query_ids, item_ids, strict=True)):
            joined = np.concatenate([t.prefix, query, t.middle, item, t.suffix]).astype(np.int64)
            start = len(t.prefix) + len(query)
            ids[row, : len(joined)] = joined
            mask[row, : len(joined)] = 1
            types[row, :start] = t.query_type
            types[row, start : start + len(t.middle)] = t.middle_types
            types[row, start + len(t.middle) : len(joined)] = t.item_type
        inputs = {"input_ids": ids, "attention_mask": mask} | ({"token_type_ids": types} if t.uses_types else {})
        tensors = {name: torch.from_numpy(array).to(self.device) for name, array in inputs.items()}
        logits = self._model(**tensors).logits
        return logits[:, 0].float().cpu().numpy()
