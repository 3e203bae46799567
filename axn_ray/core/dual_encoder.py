"""The dual-encoder (DE): one unit vector per text, and whether it still embeds as it did. Knows no pairs and no cross-encoder."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from axn_ray.core.bert_engine import BertCpuForward, is_fast_bert
from axn_ray.core.embedded_corpus import EmbeddedCorpus
from axn_ray.core.models import Dtype, choose_device, choose_dtype, load_dual_encoder
from axn_ray.errors import ArtifactError, ModelError

FloatArray = npt.NDArray[np.float32]
COMPARED = 4  # queries that are embedded again
SAME = 0.99  # cosine; bfloat16 and float32 differ less, a dual-encoder that was trained once more differs by more


def _prepare(encoder: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Have a sentence-transformers `Transformer` compute in `dtype`; of a plain BERT on a CPU by the faster engine."""
    bert: Any = getattr(encoder, "auto_model", None)
    is_plain = bert is not None and is_fast_bert(bert, dtype, device, "BertModel") and not bert.config.output_hidden_states
    if is_plain and encoder.tokenizer.padding_side == "right":
        bert.forward = BertCpuForward(bert, dtype)
    else:
        encoder.to(dtype)


def _to_float(_: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Forward pre-hook: pooling runs in float32, whatever the encoder's dtype."""
    features = args[0]
    features["token_embeddings"] = features["token_embeddings"].float()
    return args


class DualEncoder:
    """Any sentence-transformers model or Hugging Face encoder, from the hub or a local folder.

    Raises:
        ModelError: the model cannot be found or read.
    """

    def __init__(self, name: str, dtype: Dtype = "auto") -> None:
        self.name = name
        device = choose_device()
        model: Any = load_dual_encoder(name, str(device))
        pooling = next((module for module in model if type(module).__name__ == "Pooling"), None)
        if pooling is not None:  # without one, as in a table of word vectors, nothing says where the encoder ends
            _prepare(model[0], choose_dtype(dtype, device), device)
            pooling.register_forward_pre_hook(_to_float)
        self._model = model

    def embed_items(self, texts: Sequence[str], batch_size: int = 64) -> FloatArray:
        """Texts (n) -> (n, dim) float32, unit norm where the model normalizes."""
        return self._checked(self._model.encode_document(list(texts), batch_size=batch_size, show_progress_bar=False))

    def embed_queries(self, texts: Sequence[str], batch_size: int = 64) -> FloatArray:
        """Texts (n) -> (n, dim) float32, unit norm where the model normalizes."""
        return self._checked(self._model.encode_query(list(texts), batch_size=batch_size, show_progress_bar=False))

    def _checked(self, embeddings: npt.NDArray[Any]) -> FloatArray:
        if not np.isfinite(embeddings).all():
            raise ModelError(f"dual-encoder {self.name!r} gave NaN or infinity; try dtype=float32")
        return embeddings.astype(np.float32, copy=False)


def open_dual_encoder(corpus: EmbeddedCorpus) -> DualEncoder:
    """The dual-encoder of these embeddings, for the queries to come.

    Raises:
        ArtifactError: it embeds the corpus' queries otherwise than it did: its folder or hub entry has changed since.
        ModelError: the model cannot be found or read.
    """
    dual_encoder, known = DualEncoder(corpus.dual_encoder), corpus.query_embeddings[:COMPARED]
    now = dual_encoder.embed_queries(corpus.queries.texts[:COMPARED])
    if now.shape != known.shape or _cosines(now, known).min() < SAME:
        why = f"dual-encoder {corpus.dual_encoder} has changed since it made the embeddings"
        raise ArtifactError(f"{why}; embed and factorize again, or put the former model back")
    return dual_encoder


def _cosines(left: FloatArray, right: FloatArray) -> FloatArray:
    """Of the rows of two matrices (n, dim) -> (n,)."""
    lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return np.einsum("nd,nd->n", left, right) / np.maximum(lengths, np.finfo(np.float32).tiny)
