import numpy as np

from axn_ray.core.dual_encoder import DualEncoder
from axn_ray.distributed.embed import embed_texts
from tests.distributed.students import make_student


def test_shards_of_two_workers_equal_one_process(ray_session, tmp_path):
    name = make_student(tmp_path)
    items, queries = [f"the {n} of words" for n in range(9)], [f"what is a {n}" for n in range(5)]
    model = DualEncoder(name, "float32")
    embedded = embed_texts(items, queries, name, "float32", workers=2, shard_rows=4)
    for mine, theirs in zip(embedded, (model.embed_items(items), model.embed_queries(queries)), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)
