"""The cross-encoder (CE), the expensive scale: one raw logit per (query, item) pair, in float32.

Knows no corpus, no search and no Ray. Pairs are assembled from token ids; the encoder runs in bfloat16 where the
hardware is fast at it, its pooler and head always in float32, so that scores keep their resolution.
"""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftConfig, PeftModel
from pydantic import BaseModel, ConfigDict, Field
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from axn_ray import sample
from axn_ray.core.artifact import hash_file
from axn_ray.core.bert_engine import BertCpuEngine, is_fast_bert
from axn_ray.core.engines import TorchEngine
from axn_ray.core.models import Dtype, choose_device, choose_dtype, locate_model
from axn_ray.core.pair_layout import Overlong, PairLayout, Rows
from axn_ray.core.pairs import FloatArray, PairScorer, PairScores, find_not_finite, is_out_of_memory, score_or_split
from axn_ray.core.tokens import Int32Array, PairTemplate, TokenTable, token_budget_batches
from axn_ray.errors import ModelError

logger = logging.getLogger(__name__)

SOURCES = "hub id, local folder, PEFT adapter folder, or python:module:factory of a TextScorer"
WEIGHT_FILES = ("*.safetensors", "*.bin", "config.json", "adapter_config.json", "tokenizer.json")


class CrossEncoderConfig(BaseModel):
    """Which CE, and how it reads a pair; the part that all stages with a CE share."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cross_encoder: str = Field(sample.CROSS_ENCODER, description=SOURCES)
    max_length: int | None = Field(None, ge=8, description="tokens per pair; default: what the tokenizer says")
    dtype: Dtype = Field("auto", description="of the encoder; pooler and head are always float32")
    batch_tokens: int = Field(4096, ge=1, description="tokens per forward pass, padding included")
    overlong: Overlong = Field("truncate", description="an item that does not fit: refuse it, cut its end, or score its chunks")
    label: str | None = Field(None, description="the output to read, of a model with several")


def load_adapter_or_model(name: str) -> tuple[Any, Any]:
    """Load (model, tokenizer) in float32 from a hub id, a folder, or a PEFT adapter folder, merged into its base.

    Raises:
        ModelError: it cannot be found or read.
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
    return model, tokenizer


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


class CrossEncoder(PairScorer):
    """A sequence-classification CE with one logit, or one named label, on the GPU when there is one.

    Raises:
        ModelError: see `load_adapter_or_model` and `find_column`.
    """

    def __init__(self, config: CrossEncoderConfig) -> None:
        model, self._tokenizer = load_adapter_or_model(config.cross_encoder)
        self._column = find_column(config, model.config)
        device = choose_device()
        dtype = choose_dtype(config.dtype, device)
        self._template = PairTemplate.of(self._tokenizer)
        self.max_length = config.max_length or min(
            self._tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 512)
        )
        self._overlong, self._batch_tokens = config.overlong, config.batch_tokens
        self.fingerprint = {
            "model": hash_model(config.cross_encoder, model),
            "max_length": self.max_length,
            "dtype": str(dtype).removeprefix("torch."),
            "overlong": f"{config.overlong}-item",
        } | ({"label": config.label} if config.label else {})
        is_fast = is_fast_bert(model, dtype, device)
        self._engine = BertCpuEngine(model) if is_fast else TorchEngine(model, dtype, device)

    def tokenize(self, texts: Sequence[str]) -> TokenTable:
        """Tokenize n texts, queries or items, once."""
        return TokenTable.from_texts(texts, self._tokenizer)

    def score_pairs(self, queries: TokenTable, items: TokenTable, query_index: Int32Array, item_index: Int32Array) -> PairScores:
        """See `PairScorer`. Items over `max_length` meet the policy `overlong`.

        Raises:
            InputError: a pair is too long and the policy is `error`.
        """
        room = self.max_length - self._template.n_special
        layout = PairLayout.of(queries, items, query_index, item_index, room, self._overlong)
        chunk_scores = np.full(len(layout), np.nan, dtype=np.float32)
        failures = layout.failures()
        remaining = np.flatnonzero(~np.isin(layout.pair, list(failures)))
        chunk_failures: dict[int, str] = {}
        while len(remaining):
            remaining = self._score_until_out_of_memory(layout, remaining, chunk_scores, chunk_failures)
        scores = layout.best_of_chunks(chunk_scores)
        failures |= {int(layout.pair[chunk]): reason for chunk, reason in chunk_failures.items()}
        return PairScores(scores, failures | find_not_finite(scores, failures), layout.n_truncated)

    def _score_until_out_of_memory(
        self, layout: PairLayout, chunks: Rows, scores: FloatArray, failures: dict[int, str]
    ) -> Rows:
        """Score chunks in batches; where memory runs out, halve the batch for good and return what is left to do."""
        lengths = layout.lengths[chunks]
        done = 0
        for batch in token_budget_batches(lengths + self._template.n_special, self._batch_tokens):
            try:
                score_or_split(lambda rows: self._forward(layout, rows), chunks[batch], scores, failures)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self._batch_tokens = max(1, int(lengths[batch].max() + self._template.n_special) * (len(batch) // 2))
                logger.warning("out of memory on %d pairs at once; going on with %d tokens", len(batch), self._batch_tokens)
                torch.cuda.empty_cache()
                break
            done += len(batch)
        return chunks[np.argsort(-lengths, kind="stable")][done:]

    def _forward(self, layout: PairLayout, rows: Rows) -> FloatArray:
        ids, mask, types = layout.join(rows, self._template)
        return self._engine.logits(ids, mask, types if self._template.uses_types else None, self._column)
