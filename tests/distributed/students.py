"""A tiny dual-encoder that can be trained in a test: random weights, no dropout, the real MiniLM vocabulary."""

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import AutoTokenizer, BertConfig, BertModel

from axn_ray.core.models import MINILM, locate_model


def make_student(folder, prompts=None):
    """Write it into `folder`; returns its path as a string."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(
        vocab_size=30522, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.3, **sizes
    )
    BertModel(config).save_pretrained(folder / "bert")
    AutoTokenizer.from_pretrained(locate_model(MINILM)).save_pretrained(folder / "bert")
    parts = [Transformer(str(folder / "bert"), max_seq_length=32), Pooling(32), Normalize()]
    SentenceTransformer(modules=parts, device="cpu", prompts=prompts or {}).save(str(folder / "student"))
    return str(folder / "student")
