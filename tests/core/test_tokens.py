import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from axn_ray.core.models import MINILM, locate_model
from axn_ray.core.tokens import PairTemplate, TokenTable, token_budget_batches
from axn_ray.errors import InputError


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(locate_model(MINILM))


def test_table_keeps_each_text_and_empty_ones(tokenizer):
    table = TokenTable.from_texts(["a dog", "", "walking slowly"], tokenizer)
    assert [len(table[row]) for row in range(3)] == [2, 0, 2]
    assert table[2].tolist() == tokenizer("walking slowly", add_special_tokens=False)["input_ids"]


def test_table_refuses_offsets_that_do_not_span():
    with pytest.raises(InputError, match="offsets do not span"):
        TokenTable(np.zeros(3, dtype=np.int32), np.array([0, 2], dtype=np.int64))


@pytest.mark.parametrize(("query", "item"), [("he [ran] home", "run: move fast"), ("alpha", "beta"), ("a a a", "a a")])
def test_template_joins_like_the_tokenizer(tokenizer, query, item):
    t = PairTemplate.of(tokenizer)
    table = TokenTable.from_texts([query, item], tokenizer)
    expected = tokenizer(query, item)
    assert [*t.prefix, *table[0], *t.middle, *table[1], *t.suffix] == expected["input_ids"]
    types = [t.query_type] * (len(t.prefix) + len(table[0])) + [*t.middle_types]
    assert types + [t.item_type] * (len(table[1]) + len(t.suffix)) == expected["token_type_ids"]


@given(st.lists(st.integers(0, 60), min_size=1, max_size=200), st.integers(1, 500))
def test_batches_hold_each_row_once_within_the_budget(lengths, batch_tokens):
    lengths = np.array(lengths)
    batches = list(token_budget_batches(lengths, batch_tokens))
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    for rows in batches:
        assert len(rows) == 1 or len(rows) * lengths[rows].max() <= batch_tokens
    longest = [lengths[rows].max() for rows in batches]
    assert longest == sorted(longest, reverse=True)
