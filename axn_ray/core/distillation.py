"""Distillation of the observed scores into the dual-encoder, which learns to rank a query's items as the cross-encoder does.

Needs no further CE call and leaves the CE as it is. Knows no Ray.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field

from axn_ray.core.models import choose_device, choose_dtype, load_dual_encoder
from axn_ray.core.score_matrix import FloatArray

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

ITEM_PROMPTS = ("document", "passage", "corpus")  # those of `SentenceTransformer.encode_document`


class DistillationConfig(BaseModel):
    """How to train the dual-encoder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(1, ge=1, description="passes over the train queries")
    queries_per_step: int = Field(8, ge=1, description="over all workers")
    items_per_query: int = Field(24, ge=2, description="of a query's scored items: a third its best by the CE, others at random")
    learning_rate: float = Field(5e-5, gt=0)
    temperature: float = Field(20.0, gt=0, description="what inner products are multiplied with, to be logits like the CE's")
    seed: int = Field(0, ge=0)

    def steps(self, n_queries: int) -> int:
        """Of all epochs, over so many train queries."""
        return self.epochs * max(1, n_queries // self.queries_per_step)


def new_student(name: str) -> "SentenceTransformer":
    """The dual-encoder to train, in float32.

    Raises:
        ModelError: it cannot be found or read.
    """
    return load_dual_encoder(name, str(choose_device())).float().train()


def choose_listed(scores: FloatArray, n: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Places of `n` of a query's scores (m,): the best third of n, then others at random; all where there are no more."""
    ranked = np.argsort(-scores, kind="stable")
    n_best = n // 3
    others = ranked[n_best:]
    return np.concatenate([ranked[:n_best], rng.choice(others, min(n - n_best, len(others)), replace=False)])


def distillation_loss(
    model: torch.nn.Module,
    student: "SentenceTransformer",
    queries: Sequence[str],
    items: Sequence[Sequence[str]],
    scores: Sequence[FloatArray],
    temperature: float,
) -> torch.Tensor:
    """Mean cross-entropy of the softmax over each query's inner products with its items to that over their CE scores.

    `model` runs `student`, perhaps in parallel. Queries (n), a list of items and their scores of each.
    """
    prompts = student.prompts
    item_prompt = next((prompts[name] for name in ITEM_PROMPTS if prompts.get(name)), "")
    texts = [f"{prompts.get('query') or ''}{query}" for query in queries]
    texts += [f"{item_prompt}{item}" for listed in items for item in listed]
    device = student.device
    features = {name: value.to(device) for name, value in student.preprocess(texts).items() if isinstance(value, torch.Tensor)}
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=choose_dtype("auto", device) == torch.bfloat16):
        embeddings = model(features)["sentence_embedding"].float()
    asked, listed = embeddings[: len(queries)], embeddings[len(queries) :].split([len(part) for part in items])
    losses = []
    for query, documents, target in zip(asked, listed, scores, strict=True):
        wanted = torch.softmax(torch.from_numpy(target).to(device), 0)
        losses.append(-(wanted * torch.log_softmax(temperature * (documents @ query), 0)).sum())
    return torch.stack(losses).mean()
