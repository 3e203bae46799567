"""A dual-encoder that no longer embeds as it did when the index was made is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding
from tokenizers import Tokenizer

from axn_ray.core.bert_engine import BertCpuForward
from axn_ray.core.corpus import Items, Queries
from axn_ray.core.dual_encoder import DualEncoder, open_dual_encoder
from axn_ray.core.embedded_corpus import EmbeddedCorpus
from axn_ray.core.models import MINILM, locate_model
from axn_ray.core.views import LayerEncoder
from axn_ray.errors import ArtifactError, ModelError
from tests.distributed.students import make_student

TEXTS = ("he [ran] home", "the bank was [closed]", "she sings", "they walk", "it burns")


@pytest.fixture
def corpus(tmp_path):
    name = make_student(tmp_path)
    model = DualEncoder(name, "float32")
    ids = tuple(f"i{n}" for n in range(len(TEXTS)))
    items, queries = Items(ids, ("",) * len(TEXTS), TEXTS), Queries(ids, TEXTS)
    splits = ("train",) * len(TEXTS)
    return EmbeddedCorpus(items, queries, splits, model.embed_items(TEXTS), model.embed_queries(TEXTS), name)


def test_the_model_that_embedded_the_corpus_is_opened_in_any_dtype(corpus):
    opened = open_dual_encoder(corpus).embed_queries(TEXTS)  # in bfloat16 where that is fast
    np.testing.assert_allclose(opened, corpus.query_embeddings, atol=0.03)


@pytest.mark.parametrize("prompts", [{}, {"query": "what is ", "document": "text: "}])
def test_a_plain_bert_embeds_as_sentence_transformers_does(tmp_path, prompts):
    name = make_student(tmp_path, prompts)
    fast, plain = DualEncoder(name, "float32"), SentenceTransformer(name, device="cpu")
    assert isinstance(fast._model[0].auto_model.forward, BertCpuForward)
    texts = [*TEXTS, "long " * 50, ""]
    np.testing.assert_allclose(fast.embed_items(texts), plain.encode_document(texts), atol=1e-5)
    np.testing.assert_allclose(fast.embed_queries(texts), plain.encode_query(texts), atol=1e-5)
    np.testing.assert_allclose(fast.embed_queries(texts[1:2]), plain.encode_query(texts[1:2]), atol=1e-5)


@pytest.mark.parametrize("change", ["left_padding", "hidden_states"])
def test_what_the_fast_engine_cannot_do_is_left_to_the_model(tmp_path, change):
    name = make_student(tmp_path)
    plain = SentenceTransformer(name, device="cpu")
    if change == "left_padding":
        plain[0].tokenizer.padding_side = "left"
    else:
        plain[0].auto_model.config.output_hidden_states = True
    plain.save(name)
    model = DualEncoder(name, "float32")
    assert not isinstance(model._model[0].auto_model.forward, BertCpuForward)
    np.testing.assert_allclose(model.embed_items(TEXTS), plain.encode_document(list(TEXTS)), atol=1e-5)


def test_a_model_that_was_trained_since_is_refused(corpus):
    student = SentenceTransformer(corpus.dual_encoder, device="cpu")
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in student.parameters():
            weight += 0.1 * weight.std(correction=0) * torch.randn_like(weight)
    student.save(corpus.dual_encoder)
    with pytest.raises(ArtifactError, match=r"student has changed since it made the embeddings; embed and factorize again"):
        open_dual_encoder(corpus)


def test_a_model_of_another_width_is_refused(corpus):
    wider = EmbeddedCorpus(
        corpus.items,
        corpus.queries,
        corpus.splits,
        np.zeros((5, 40), np.float32),
        np.zeros((5, 40), np.float32),
        corpus.dual_encoder,
    )
    with pytest.raises(ArtifactError, match="has changed since"):
        open_dual_encoder(wider)


@pytest.mark.parametrize("normalized", [True, False])
def test_a_table_of_word_vectors_is_a_dual_encoder_too(tmp_path, normalized):
    tokenizer = Tokenizer.from_file(str(Path(locate_model(MINILM)) / "tokenizer.json"))
    modules = [StaticEmbedding(tokenizer, embedding_dim=8), *([Normalize()] if normalized else [])]
    SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path / "static"))
    embedded = DualEncoder(str(tmp_path / "static")).embed_queries(TEXTS)
    assert embedded.shape == (5, 8) and embedded.dtype == np.float32
    assert np.allclose(np.linalg.norm(embedded, axis=1), 1.0) == normalized
    with pytest.raises(ModelError, match="has no layers to look at; name views of the CE alone"):
        LayerEncoder("de", str(tmp_path / "static"))
