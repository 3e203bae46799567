"""Training a cross-encoder from labelled pairs: a LoRA adapter with a one-logit head, listwise cross-entropy.

The labelled item stands against hard negatives, mined with a dual-encoder, and random ones. Knows no Ray.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from axn_ray.core.index import nearest_items
from axn_ray.core.models import MINILM, choose_dtype, locate_model
from axn_ray.core.tokens import Int32Array
from axn_ray.errors import InputError

FloatArray = npt.NDArray[np.float32]


class CrossEncoderTrainingConfig(BaseModel):
    """How to train the adapter."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: str = Field(MINILM, description="encoder to adapt: hub id or local folder; kept in the adapter's config")
    lora_rank: int = Field(32, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    steps: int = Field(450, ge=1)
    queries_per_step: int = Field(16, ge=1, description="over all workers")
    hard_negatives: int = Field(3, ge=0, description="per query, drawn from the hard pool")
    random_negatives: int = Field(1, ge=0)
    hard_pool: int = Field(50, ge=1, description="the dual-encoder's nearest items from which hard negatives are drawn")
    max_length: int = Field(56, ge=8, description="tokens per pair in training")
    score_max_length: int = Field(64, ge=8, description="tokens per pair that the trained CE reads by default")
    seed: int = Field(0, ge=0)


def mine_candidates(
    query_embeddings: FloatArray,
    item_embeddings: FloatArray,
    label_index: Int32Array,
    config: CrossEncoderTrainingConfig,
    rng: np.random.Generator,
) -> Int32Array:
    """Candidates per query, the label first: queries (n, dim), items (m, dim), labels (n,) -> (n, 1 + hard + random).

    Raises:
        InputError: fewer items than candidates.
    """
    n_items, n_negatives = len(item_embeddings), config.hard_negatives + config.random_negatives
    if n_items <= n_negatives:
        raise InputError(f"{n_items} items cannot give {n_negatives} negatives per query; add items or ask for fewer")
    pool = min(config.hard_pool + 1, n_items)
    nearest, _ = nearest_items(item_embeddings, query_embeddings, pool)
    candidates = np.empty((len(label_index), 1 + n_negatives), dtype=np.int32)
    for row, label in enumerate(label_index):
        near = nearest[row][nearest[row] != label]
        hard = rng.choice(near, min(config.hard_negatives, len(near)), replace=False)
        taken = [label, *hard]
        while len(taken) < 1 + n_negatives:
            drawn = rng.integers(n_items)
            if drawn not in taken:
                taken.append(drawn)
        candidates[row] = taken
    return candidates


def new_adapter(config: CrossEncoderTrainingConfig) -> tuple[Any, Any]:
    """A base encoder with a fresh LoRA adapter on all linear layers and a fresh one-logit head: (model, tokenizer)."""
    from peft import LoraConfig, get_peft_model  # seconds to import

    torch.manual_seed(config.seed)
    source = locate_model(config.base)
    base = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1)
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_rank,
        target_modules="all-linear",
        modules_to_save=["classifier", "score"],
        task_type="SEQ_CLS",
    )
    return get_peft_model(base, lora), AutoTokenizer.from_pretrained(source)


def listwise_loss(
    model: Any, tokenizer: Any, queries: Sequence[str], candidates: Sequence[Sequence[str]], max_length: int
) -> torch.Tensor:
    """Mean cross-entropy of each query's first candidate among its candidates."""
    width = len(candidates[0])
    repeated = [q for q in queries for _ in range(width)]
    flat = [text for row in candidates for text in row]
    device = next(model.parameters()).device
    batch = tokenizer(repeated, flat, padding=True, truncation="longest_first", max_length=max_length, return_tensors="pt").to(
        device
    )
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=choose_dtype("auto", device) == torch.bfloat16):
        logits = model(**batch).logits
    logits = logits.float().view(len(queries), width)
    return torch.nn.functional.cross_entropy(logits, torch.zeros(len(queries), dtype=torch.long, device=device))


def save_adapter(model: Any, tokenizer: Any, folder: Path, config: CrossEncoderTrainingConfig) -> None:
    """Write the adapter (float16), its config, which names the base by its public id, and the tokenizer."""
    from peft import get_peft_model_state_dict

    peft_config = model.peft_config["default"]
    peft_config.base_model_name_or_path = config.base
    peft_config.inference_mode = True
    peft_config.save_pretrained(folder)
    state = {name: tensor.half().contiguous().cpu() for name, tensor in get_peft_model_state_dict(model).items()}
    save_file(state, folder / "adapter_model.safetensors")
    tokenizer.model_max_length = config.score_max_length
    tokenizer.save_pretrained(folder)


def pick_accuracy(scores: FloatArray) -> float:
    """Share of queries whose first candidate scores highest: scores (n, candidates) -> [0, 1]; a tie is a miss."""
    return float((scores[:, 0] > scores[:, 1:].max(axis=1)).mean())
