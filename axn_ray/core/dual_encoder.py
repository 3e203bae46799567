"""The dual-encoder (DE): one unit vector per text. Knows no pairs and no cross-encoder."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sentence_transformers import SentenceTransformer

from axn_ray.core.models import Dtype, choose_device, choose_dtype, locate_model
from axn_ray.errors import ModelError

FloatArray = npt.NDArray[np.float32]


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
        try:
            model = SentenceTransformer(locate_model(name), device=str(device))
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ModelError(f"dual-encoder {name!r} cannot be loaded ({reason}); give a hub id or a local folder") from error
        model[0].to(choose_dtype(dtype, device))
        model[1].register_forward_pre_hook(_to_float)
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
