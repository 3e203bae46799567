import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from axn_ray.core.cross_encoder import CrossEncoder, CrossEncoderConfig
from axn_ray.errors import ModelError

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
    cross_encoder = CrossEncoder(CrossEncoderConfig(model=str(tiny_cross_encoder), dtype="float32", batch_tokens=batch_tokens))
    query_index, item_index = pairs()
    scores = cross_encoder.score(cross_encoder.tokenize(QUERIES), cross_encoder.tokenize(ITEMS), query_index, item_index)
    expected = plain_scores(tiny_cross_encoder, [QUERIES[q] for q in query_index], [ITEMS[i] for i in item_index])
    assert scores.dtype == np.float32
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert cross_encoder.n_truncated == 0


def test_bfloat16_encoder_keeps_a_float32_head(tiny_cross_encoder):
    config = CrossEncoderConfig(model=str(tiny_cross_encoder), dtype="bfloat16")
    cross_encoder = CrossEncoder(config)
    query_index, item_index = pairs()
    scores = cross_encoder.score(cross_encoder.tokenize(QUERIES), cross_encoder.tokenize(ITEMS), query_index, item_index)
    expected = plain_scores(tiny_cross_encoder, [QUERIES[q] for q in query_index], [ITEMS[i] for i in item_index])
    np.testing.assert_allclose(scores, expected, atol=0.1 * np.abs(expected).max())
    rounded = torch.from_numpy(scores).bfloat16().float().numpy()
    assert (rounded != scores).all()


def test_overlong_pairs_lose_the_end_of_the_item_and_are_counted(tiny_cross_encoder):
    cross_encoder = CrossEncoder(CrossEncoderConfig(model=str(tiny_cross_encoder), dtype="float32", max_length=12))
    words = "one two three four five six seven eight nine ten".split()
    cut = cross_encoder.score_texts(["a dog", "a dog"], [" ".join(words), " ".join(words[:7])])
    assert cut[0] == cut[1]
    assert cross_encoder.n_truncated == 1


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
    loaded = CrossEncoder(CrossEncoderConfig(model=str(tmp_path), dtype="float32"))
    plain = CrossEncoder(CrossEncoderConfig(model=str(tiny_cross_encoder), dtype="float32"))
    assert loaded.score_texts(QUERIES[:1], ITEMS[:1])[0] == pytest.approx(expected, abs=1e-4)
    assert abs(plain.score_texts(QUERIES[:1], ITEMS[:1])[0] - expected) > 1e-3
    assert loaded.fingerprint["model"] != plain.fingerprint["model"]


def test_models_that_cannot_serve_are_refused(tiny_cross_encoder, tmp_path):
    with pytest.raises(ModelError, match="cross-encoder 'no-such/model' cannot be loaded"):
        CrossEncoder(CrossEncoderConfig(model="no-such/model"))
    two = AutoModelForSequenceClassification.from_pretrained(tiny_cross_encoder, num_labels=2, ignore_mismatched_sizes=True)
    two.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_cross_encoder).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="has 2 outputs"):
        CrossEncoder(CrossEncoderConfig(model=str(tmp_path)))


def test_nan_is_an_error_that_names_the_pair(tiny_cross_encoder, tmp_path):
    broken = AutoModelForSequenceClassification.from_pretrained(tiny_cross_encoder)
    broken.classifier.bias.data.fill_(float("nan"))
    broken.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_cross_encoder).save_pretrained(tmp_path)
    cross_encoder = CrossEncoder(CrossEncoderConfig(model=str(tmp_path)))
    with pytest.raises(ModelError, match="first: query index 0, item index 0"):
        cross_encoder.score_texts(["a"], ["b"])
