"""The fast BERT engine against the plain one: the same scores up to rounding, whatever stands beside a row."""

import copy

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from axn_ray.core.bert_engine import BertCpuEngine, BertCpuForward, is_fast_bert
from axn_ray.core.cross_encoder import CrossEncoder
from axn_ray.core.cross_encoder_config import CrossEncoderConfig
from axn_ray.core.engines import TorchEngine

CPU = torch.device("cpu")
needs_bfloat16 = pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no bfloat16 products")
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16)])
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 0.05}


def tiny_bert(**changes):
    torch.manual_seed(0)
    config = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    model = BertForSequenceClassification(BertConfig(**config | {"num_labels": 2} | changes))
    for parameter in model.parameters():  # the initial weights give logits too close to each other to tell engines apart
        parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    return model.eval()


def batch(lengths, seed=0):
    rng = np.random.default_rng(seed)
    mask = (np.arange(max(lengths))[None, :] < np.array(lengths)[:, None]).astype(np.int64)
    ids = rng.integers(1, 50, mask.shape) * mask
    types = (np.arange(max(lengths))[None, :] >= 3) * mask
    return ids, mask, types


@each_dtype
@pytest.mark.parametrize("column", [0, 1])
@pytest.mark.parametrize("lengths", [[9] * 16, list(range(16, 0, -1)), [3, 9, 3, 16, 1, 9]])
def test_errs_no_more_than_the_plain_engine(lengths, column, dtype):
    model = tiny_bert()
    exact = TorchEngine(copy.deepcopy(model), torch.float32, CPU).logits(*batch(lengths), column)
    plain = TorchEngine(copy.deepcopy(model), dtype, CPU).logits(*batch(lengths), column)
    fast = BertCpuEngine(model, dtype).logits(*batch(lengths), column)
    assert fast.dtype == np.float32
    assert np.ptp(exact) > 0.5
    assert np.abs(fast - exact).max() < max(ROUNDING[dtype], 2 * np.abs(plain - exact).max())


@each_dtype
def test_without_token_types(dtype):
    ids, mask, types = batch([6, 4])
    engine = BertCpuEngine(tiny_bert(), dtype)
    np.testing.assert_array_equal(engine.logits(ids, mask, None), engine.logits(ids, mask, np.zeros_like(types)))
    assert not np.allclose(engine.logits(ids, mask, None), engine.logits(ids, mask, types), atol=1e-3)


@each_dtype
def test_padding_does_not_reach_the_score(dtype):
    ids, mask, types = batch([12, 5])
    engine = BertCpuEngine(tiny_bert(), dtype)
    alone = engine.logits(ids[1:, :5], mask[1:, :5], types[1:, :5])
    np.testing.assert_allclose(engine.logits(ids, mask, types)[1:], alone, atol=ROUNDING[dtype])
    other = np.where(mask == 1, ids, 7)
    np.testing.assert_array_equal(engine.logits(ids, mask, types), engine.logits(other, mask, types))


@each_dtype
@pytest.mark.parametrize("lengths", [[4], [9] * 16, [3, 9, 3, 16, 1, 9]])
def test_last_hidden_state_errs_no_more_than_the_plain_encoder(lengths, dtype):
    exact, plain = tiny_bert().bert, tiny_bert().bert.to(dtype)
    ids, mask, types = map(torch.from_numpy, batch(lengths))
    named = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    with torch.inference_mode():
        right, rounded = exact(**named).last_hidden_state, plain(**named).last_hidden_state.float()
    fast = BertCpuForward(tiny_bert().bert, dtype)(**named, return_dict=True)["last_hidden_state"]
    assert fast.dtype == torch.float32 and fast.shape == right.shape
    text, padding = mask.bool(), ~mask.bool()
    assert right[text].std() > 0.5
    assert (fast - right)[text].abs().max() < max(ROUNDING[dtype], 2 * (rounded - right)[text].abs().max())
    assert (fast[padding] == 0).all()


@pytest.mark.parametrize(
    ("changes", "dtype", "expected"),
    [
        pytest.param({}, torch.bfloat16, True, marks=needs_bfloat16),
        ({}, torch.float32, True),
        ({}, torch.float16, False),
        ({"hidden_act": "relu"}, torch.float32, False),
    ],
)
def test_takes_only_models_that_it_computes(changes, dtype, expected):
    model = tiny_bert(**changes)
    assert is_fast_bert(model, dtype, CPU) is is_fast_bert(model.bert, dtype, CPU, "BertModel") is expected
    assert not is_fast_bert(model.bert, dtype, CPU)


@needs_bfloat16
def test_fingerprint_names_the_engine_where_it_rounds(tiny_cross_encoder):
    fast, plain = (
        CrossEncoder(CrossEncoderConfig(cross_encoder=str(tiny_cross_encoder), dtype=d)) for d in ("bfloat16", "float32")
    )
    assert fast.fingerprint == {**plain.fingerprint, "dtype": "bfloat16", "engine": BertCpuEngine.name}


def test_fingerprint_of_float32_names_no_engine(tiny_cross_encoder):
    assert "engine" not in CrossEncoder(CrossEncoderConfig(cross_encoder=str(tiny_cross_encoder), dtype="float32")).fingerprint
