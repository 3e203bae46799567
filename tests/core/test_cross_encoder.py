import json
import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from axn_ray.core.cross_encoder import CrossEncoder
from axn_ray.core.cross_encoder_config import CrossEncoderConfig, with_whole_path
from axn_ray.core.pairs import TextPairScorer
from axn_ray.errors import InputError, ModelError

QUERIES = ["he [ran] home", "the bank was [closed] for a long while after the flood", "a"]
ITEMS = ["run: move fast", "close: shut", "x", "bank: " + "a long definition of a bank " * 3]


def pairs():
    return np.repeat(np.arange(3, dtype=np.int32), 4), np.tile(np.arange(4, dtype=np.int32), 3)


def plain_scores(folder, query_texts, item_texts):
    """The slow twin: one pair at a time, straight through transformers in float32."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        logits = [
            model(**tokenizer(q, i, return_tensors="pt")).logits.item() for q, i in zip(query_texts, item_texts, strict=True)
        ]
    return np.array(logits, dtype=np.float32)


@pytest.mark.parametrize("batch_tokens", [1, 60, 4096])
def test_equals_transformers_pair_by_pair_in_the_order_asked(tiny_cross_encoder, batch_tokens):
    cross_encoder = opened(tiny_cross_encoder, batch_tokens=batch_tokens)
    query_index, item_index = pairs()
    scored = cross_encoder.score_pairs(cross_encoder.tokenize(QUERIES), cross_encoder.tokenize(ITEMS), query_index, item_index)
    scores = scored.scores
    expected = plain_scores(tiny_cross_encoder, [QUERIES[q] for q in query_index], [ITEMS[i] for i in item_index])
    assert scores.dtype == np.float32
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert (scored.n_truncated, scored.failures) == (0, {})


def test_bfloat16_encoder_keeps_a_float32_head(tiny_cross_encoder):
    config = CrossEncoderConfig(cross_encoder=str(tiny_cross_encoder), dtype="bfloat16")
    cross_encoder = CrossEncoder(config)
    query_index, item_index = pairs()
    scores = cross_encoder.score(cross_encoder.tokenize(QUERIES), cross_encoder.tokenize(ITEMS), query_index, item_index)
    expected = plain_scores(tiny_cross_encoder, [QUERIES[q] for q in query_index], [ITEMS[i] for i in item_index])
    np.testing.assert_allclose(scores, expected, atol=0.1 * np.abs(expected).max())
    rounded = torch.from_numpy(scores).bfloat16().float().numpy()
    assert (rounded != scores).all()


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-3), ("bfloat16", 0.1)])
def test_on_a_gpu_equals_transformers_pair_by_pair(tiny_cross_encoder, dtype, error):
    cross_encoder = CrossEncoder(CrossEncoderConfig(cross_encoder=str(tiny_cross_encoder), dtype=dtype))
    assert next(cross_encoder._engine._model.parameters()).device.type == "cuda"
    queries, items = [QUERIES[q] for q in pairs()[0]], [ITEMS[i] for i in pairs()[1]]
    expected = plain_scores(tiny_cross_encoder, queries, items)
    np.testing.assert_allclose(cross_encoder.score_texts(queries, items), expected, atol=error * np.abs(expected).max())


TINY = {
    "vocab_size": 30522,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "num_labels": 1,
}
WORDS_12 = "one two three four five six seven eight nine ten eleven twelve".split()


def opened(folder, **settings):
    return CrossEncoder(CrossEncoderConfig(cross_encoder=str(folder), dtype="float32", **settings))


def score_rows(cross_encoder, queries, items):
    rows = np.arange(len(queries), dtype=np.int32)
    return cross_encoder.score_pairs(cross_encoder.tokenize(queries), cross_encoder.tokenize(items), rows, rows)


def test_truncate_cuts_the_end_of_the_item_and_counts(tiny_cross_encoder):
    cross_encoder = opened(tiny_cross_encoder, max_length=12)  # 3 special tokens and 2 of the query leave 7
    scored = score_rows(cross_encoder, ["a dog", "a dog"], [" ".join(WORDS_12), " ".join(WORDS_12[:7])])
    np.testing.assert_allclose(scored.scores[0], scored.scores[1], rtol=1e-5)
    assert scored.n_truncated == 1


def test_chunk_max_is_the_best_of_the_chunks_and_cuts_nothing(tiny_cross_encoder):
    cross_encoder = opened(tiny_cross_encoder, max_length=12, overlong="chunk-max")
    chunks = [" ".join(WORDS_12[:7]), " ".join(WORDS_12[7:])]
    scored = score_rows(cross_encoder, ["a dog", "no cat", "a dog"], [" ".join(WORDS_12), chunks[1], " ".join(WORDS_12)])
    alone = opened(tiny_cross_encoder).score_texts(["a dog", "a dog", "no cat"], [*chunks, chunks[1]])
    assert abs(alone[0] - alone[1]) > 1e-3
    np.testing.assert_allclose(scored.scores, [max(alone[:2]), alone[2], max(alone[:2])], atol=1e-5)
    assert scored.n_truncated == 0


def test_error_refuses_what_does_not_fit_before_it_scores(tiny_cross_encoder):
    cross_encoder = opened(tiny_cross_encoder, max_length=12, overlong="error")
    assert score_rows(cross_encoder, ["a dog"], [" ".join(WORDS_12[:7])]).n_truncated == 0
    with pytest.raises(InputError, match=r"1 pairs exceed the 9 tokens .* item index 1 .* 10 tokens"):
        score_rows(cross_encoder, ["a dog", "a dog"], ["one", " ".join(WORDS_12[:8])])


def test_policies_have_different_fingerprints(tiny_cross_encoder):
    prints = [opened(tiny_cross_encoder, overlong=policy).fingerprint for policy in ("error", "truncate", "chunk-max")]
    assert len({str(p) for p in prints}) == 3


def test_a_long_query_keeps_half_the_room(tiny_cross_encoder):
    cross_encoder = opened(tiny_cross_encoder, max_length=13)
    scored = score_rows(cross_encoder, [" ".join(WORDS_12)], [" ".join(WORDS_12)])
    assert scored.scores == pytest.approx(cross_encoder.score_texts([" ".join(WORDS_12[:5])], [" ".join(WORDS_12[:5])]))
    assert scored.n_truncated == 1


def test_a_long_query_keeps_what_a_short_item_leaves(tiny_cross_encoder):
    cross_encoder = opened(tiny_cross_encoder, max_length=13)  # 3 special tokens and 2 of the item leave 8
    scored = score_rows(cross_encoder, [" ".join(WORDS_12), " ".join(WORDS_12[:8])], ["one two", "one two"])
    assert scored.scores == pytest.approx(
        plain_scores(tiny_cross_encoder, [" ".join(WORDS_12[:8])] * 2, ["one two"] * 2), rel=1e-4
    )
    assert scored.n_truncated == 1


def test_more_tokens_than_positions_are_refused_when_it_is_opened(tiny_cross_encoder):
    with pytest.raises(ModelError, match="has 512 positions, max_length=600 needs more; lower it"):
        opened(tiny_cross_encoder, max_length=600)


def test_roberta_counts_from_the_place_behind_the_padding(tiny_cross_encoder, tmp_path):
    config = RobertaConfig(**TINY, max_position_embeddings=34)
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tiny_cross_encoder)
    tokenizer.model_max_length = int(1e30)  # as where nobody has said
    tokenizer.save_pretrained(tmp_path)
    cross_encoder = opened(tmp_path)
    assert cross_encoder.max_length == 32
    scored = score_rows(cross_encoder, ["a dog"], [" ".join(WORDS_12 * 4)])
    assert (scored.failures, scored.n_truncated) == ({}, 1)


def test_the_fingerprint_sees_the_tokenizer(tiny_cross_encoder, tmp_path):
    shutil.copytree(tiny_cross_encoder, tmp_path / "cased")
    path = tmp_path / "cased/tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_lower_case": False}))
    assert opened(tiny_cross_encoder).fingerprint["model"] != opened(tmp_path / "cased").fingerprint["model"]


def test_a_local_folder_is_named_by_its_whole_path_for_workers_alone(tiny_cross_encoder, monkeypatch):
    monkeypatch.chdir(tiny_cross_encoder.parent)
    config = CrossEncoderConfig(cross_encoder=tiny_cross_encoder.name)
    assert config.cross_encoder == tiny_cross_encoder.name
    assert with_whole_path(config).cross_encoder == str(tiny_cross_encoder)
    for name in ("", "org/model", "python:module:factory"):
        assert with_whole_path(CrossEncoderConfig(cross_encoder=name)).cross_encoder == name


def test_relative_positions_end_nowhere(tiny_cross_encoder, tmp_path):
    config = DebertaV2Config(**TINY, max_position_embeddings=32, position_biased_input=False, relative_attention=True)
    DebertaV2ForSequenceClassification(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_cross_encoder).save_pretrained(tmp_path)
    assert opened(tmp_path).max_length == 32
    scored = score_rows(opened(tmp_path, max_length=64), ["a dog"], [" ".join(WORDS_12 * 4)])
    assert (scored.failures, scored.n_truncated) == ({}, 0)


class Engine:
    """The real engine behind a fault: `raises(ids)` may raise, as a GPU or a poisoned pair would make it."""

    def __init__(self, engine, raises):
        self._engine, self._raises, self.batches = engine, raises, []

    def logits(self, ids, mask, types, column=0):
        self.batches.append(ids.shape)
        self._raises(ids)
        return self._engine.logits(ids, mask, types, column)


def with_fault(cross_encoder, raises):
    cross_encoder._engine = Engine(cross_encoder._engine, raises)
    return cross_encoder._engine


def test_out_of_memory_halves_the_batch_for_good_and_loses_nothing(tiny_cross_encoder):
    query_index, item_index = (np.tile(rows, 20) for rows in pairs())
    cross_encoder = opened(tiny_cross_encoder)
    tables = cross_encoder.tokenize(QUERIES), cross_encoder.tokenize(ITEMS)
    expected = cross_encoder.score(*tables, query_index, item_index)

    def raises(ids):
        if ids.size > 500:
            raise torch.OutOfMemoryError("CUDA out of memory")

    engine = with_fault(cross_encoder, raises)
    np.testing.assert_allclose(cross_encoder.score(*tables, query_index, item_index), expected, atol=1e-5)
    assert sum(rows * longest > 500 for rows, longest in engine.batches) <= 4
    engine.batches.clear()
    cross_encoder.score(*tables, query_index, item_index)
    assert all(rows * longest <= 500 for rows, longest in engine.batches)


def test_a_pair_too_large_for_memory_fails_alone(tiny_cross_encoder):
    cross_encoder = opened(tiny_cross_encoder)

    def raises(ids):
        if ids.shape[1] > 30:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with_fault(cross_encoder, raises)
    scored = score_rows(cross_encoder, ["a", "b", "c"], ["x", " ".join(WORDS_12 * 3), "y"])
    assert list(scored.failures) == [1]
    assert "out of memory" in scored.failures[1]
    assert np.isfinite(scored.scores).tolist() == [True, False, True]


def test_a_poisoned_pair_fails_alone_and_is_named(tiny_cross_encoder):
    query_index, item_index = pairs()
    cross_encoder = opened(tiny_cross_encoder)
    tables = cross_encoder.tokenize(QUERIES), cross_encoder.tokenize(ITEMS)
    expected = cross_encoder.score(*tables, query_index, item_index)
    poison = cross_encoder.tokenize(["definition"])[0][0]

    def raises(ids):
        if (ids == poison).any():
            raise RuntimeError("device-side assert\nat some address")

    with_fault(cross_encoder, raises)
    scored = cross_encoder.score_pairs(*tables, query_index, item_index)
    assert sorted(scored.failures) == np.flatnonzero(item_index == 3).tolist()
    assert set(scored.failures.values()) == {"RuntimeError: device-side assert"}
    good = item_index != 3
    np.testing.assert_allclose(scored.scores[good], expected[good], atol=1e-5)
    assert np.isnan(scored.scores[~good]).all()


def test_empty_texts_fail_alone(tiny_cross_encoder):
    scored = score_rows(opened(tiny_cross_encoder), ["a", "", "c"], ["x", "y", " "])
    assert scored.failures == {1: "the query has no text", 2: "the item has no text"}
    assert np.isfinite(scored.scores[0])


def test_a_named_label_of_a_model_with_several(tiny_cross_encoder, tmp_path):
    three = AutoModelForSequenceClassification.from_pretrained(tiny_cross_encoder, num_labels=3, ignore_mismatched_sizes=True)
    three.config.label2id = {"contradiction": 0, "entailment": 1, "neutral": 2}
    three.config.id2label = {0: "contradiction", 1: "entailment", 2: "neutral"}
    three.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tiny_cross_encoder)
    tokenizer.save_pretrained(tmp_path)
    with torch.inference_mode():
        expected = three.eval()(**tokenizer("a", "b", return_tensors="pt")).logits[0, 1].item()
    assert opened(tmp_path, label="entailment").score_texts(["a"], ["b"])[0] == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ModelError, match="3 outputs and no label was named; set label to one of contradiction"):
        opened(tmp_path)
    with pytest.raises(ModelError, match="no label 'relevant'"):
        opened(tmp_path, label="relevant")


class Overlap:
    """Five lines that make a cross-encoder of anything."""

    fingerprint = "overlap-v1"

    def score_texts(self, queries, items):
        return [len(set(q.split()) & set(i.split())) for q, i in zip(queries, items, strict=True)]


def test_any_object_with_score_texts_is_a_cross_encoder():
    scorer = TextPairScorer(Overlap(), batch_pairs=2)
    scored = score_rows(scorer, ["a b", "a b", "", "c"], ["b a", "c", "c", "c d"])
    assert scored.scores[[0, 1, 3]].tolist() == [2, 0, 1]
    assert scored.failures == {2: "the query has no text"}
    assert scorer.fingerprint == {"scorer": "overlap-v1"}


def test_a_scorer_that_miscounts_is_refused():
    class Short(Overlap):
        def score_texts(self, queries, items):
            return [1.0]

    with pytest.raises(ModelError, match=r"2 pairs gave scores of shape \(1,\)"):
        score_rows(TextPairScorer(Short()), ["a", "b"], ["c", "d"])


def test_adapter_is_merged_into_its_base(tiny_cross_encoder, tmp_path):
    torch.manual_seed(1)
    base = AutoModelForSequenceClassification.from_pretrained(tiny_cross_encoder)
    adapted = get_peft_model(
        base, LoraConfig(r=4, target_modules="all-linear", modules_to_save=["classifier"], task_type="SEQ_CLS")
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tiny_cross_encoder)
    tokenizer.save_pretrained(tmp_path)
    with torch.inference_mode():
        expected = adapted.eval()(**tokenizer(QUERIES[0], ITEMS[0], return_tensors="pt")).logits.item()
    loaded = CrossEncoder(CrossEncoderConfig(cross_encoder=str(tmp_path), dtype="float32"))
    plain = CrossEncoder(CrossEncoderConfig(cross_encoder=str(tiny_cross_encoder), dtype="float32"))
    assert loaded.score_texts(QUERIES[:1], ITEMS[:1])[0] == pytest.approx(expected, abs=1e-4)
    assert abs(plain.score_texts(QUERIES[:1], ITEMS[:1])[0] - expected) > 1e-3
    assert loaded.fingerprint["model"] != plain.fingerprint["model"]


def test_a_model_that_does_not_exist_is_refused():
    with pytest.raises(ModelError, match="cross-encoder 'no-such/model' cannot be loaded"):
        CrossEncoder(CrossEncoderConfig(cross_encoder="no-such/model"))


def test_nan_is_an_error_that_names_the_pair(tiny_cross_encoder, tmp_path):
    broken = AutoModelForSequenceClassification.from_pretrained(tiny_cross_encoder)
    broken.classifier.bias.data.fill_(float("nan"))
    broken.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_cross_encoder).save_pretrained(tmp_path)
    cross_encoder = CrossEncoder(CrossEncoderConfig(cross_encoder=str(tmp_path)))
    with pytest.raises(ModelError, match="first: query index 0, item index 0: the score is nan"):
        cross_encoder.score_texts(["a"], ["b"])
