"""The training of a cross-encoder on Ray Train: what it ships scores pairs, and other labels are another training."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from axn_ray.core.artifact import check_files, read_manifest
from axn_ray.core.cross_encoder import CrossEncoder
from axn_ray.core.cross_encoder_config import CrossEncoderConfig
from axn_ray.distributed.train_cross_encoder import TrainCrossEncoderConfig, train_cross_encoder
from tests.distributed.students import make_student

WORDS = ["tree", "fire", "bank", "song", "river", "stone", "light", "house"]


def write_queries(path, labels):
    ids = [f"q{n}" for n in range(len(WORDS))]
    pq.write_table(pa.table({"query_id": ids, "text": [f"what is a {w}" for w in WORDS], "item_id": labels}), path)
    return path


def test_it_ships_a_cross_encoder_and_other_labels_are_another_training(ray_session, tiny_cross_encoder, tmp_path):
    pq.write_table(pa.table({"item_id": WORDS, "text": [f"the {w} of words" for w in WORDS]}), tmp_path / "items.parquet")
    config = TrainCrossEncoderConfig(
        items=tmp_path / "items.parquet",
        queries=write_queries(tmp_path / "queries.parquet", WORDS),
        base=str(tiny_cross_encoder),
        dual_encoder=make_student(tmp_path),
        lora_rank=2,
        steps=4,
        queries_per_step=4,
        threads=1,
    )
    counts = train_cross_encoder(config, tmp_path / "one", tmp_path / "storage")
    assert (counts["queries"], counts["step"]) == (8, 4)
    check_files(tmp_path / "one", read_manifest(tmp_path / "one", "cross_encoder"))
    write_queries(tmp_path / "queries.parquet", [*WORDS[1:], WORDS[0]])
    train_cross_encoder(config, tmp_path / "relabelled", tmp_path / "storage")
    configs = [CrossEncoderConfig(cross_encoder=str(tmp_path / name), dtype="float32") for name in ("one", "relabelled")]
    one, relabelled = (CrossEncoder(config).score_texts(["a tree"], ["the tree"]) for config in configs)
    assert np.isfinite(one).all()
    assert (one != relabelled).all()
