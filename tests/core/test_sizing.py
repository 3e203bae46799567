import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from pydantic import ValidationError

from axn_ray.core.sizing import SizingConfig, size_run, sizing_table
from axn_ray.core.tokens import TokenTable

RUN = SizingConfig(
    n_pairs=7_200_000,
    n_items=1000,
    workers=4,
    workers_per_node=2,
    pairs_per_second=500,
    price_per_hour=2.5,
    dim=8,
    tokens_per_item=10,
    process_bytes=10**6,
)


def test_hours_and_cost_by_hand():
    sized = size_run(RUN)
    assert sized.worker_hours == pytest.approx(4.0)
    assert sized.hours == pytest.approx(1.0)
    assert sized.cost == pytest.approx(10.0)


def test_memory_is_what_the_arrays_take():
    sized = size_run(RUN)
    tokens = TokenTable(np.zeros(10 * 1000, np.int32), np.arange(1001, dtype=np.int64) * 10)
    embeddings = np.zeros((1000, 8), np.float32)
    assert sized.embedding_bytes == embeddings.nbytes
    assert sized.shared_bytes == embeddings.nbytes + tokens.ids.nbytes + tokens.offsets.nbytes
    assert sized.worker_bytes == 10**6 + sized.shared_bytes // 2
    row = np.zeros(1, np.dtype([("query_index", np.int32), ("item_index", np.int32), ("score", np.float32)]))
    assert sized.score_bytes == RUN.n_pairs * row.nbytes


@hypothesis.given(workers=st.integers(1, 1000), pairs=st.integers(1, 10**10))
def test_more_workers_cost_the_same_and_take_less_time(workers, pairs):
    one = size_run(RUN.model_copy(update={"workers": 1, "n_pairs": pairs}))
    many = size_run(RUN.model_copy(update={"workers": workers, "n_pairs": pairs}))
    assert many.cost == pytest.approx(one.cost)
    assert many.hours == pytest.approx(one.hours / workers)
    assert many.worker_bytes == one.worker_bytes  # memory follows the items, never the pairs


@pytest.mark.parametrize("field", ["n_pairs", "workers", "pairs_per_second", "dim", "tokens_per_item", "workers_per_node"])
def test_refuses_what_cannot_be_divided_by(field):
    with pytest.raises(ValidationError, match=field):
        SizingConfig.model_validate({**RUN.model_dump(), field: 0})


def test_table_has_a_row_per_run():
    lines = sizing_table({"a": RUN, "b": RUN.model_copy(update={"n_pairs": 3_600_000})}).splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("| a | 7,200,000 | 1,000 | 4 | 500 | 4.00 | 1.00 | 10.00 |")
    assert "| 2.00 | 0.50 | 5.00 |" in lines[3]
