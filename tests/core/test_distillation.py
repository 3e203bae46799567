import numpy as np
import pytest
import torch

from axn_ray.core.distillation import DistillationConfig, choose_listed, distillation_loss, new_student
from axn_ray.core.dual_encoder import DualEncoder
from axn_ray.core.train_steps import new_optimizer, rows_of_step
from axn_ray.errors import ModelError
from tests.distributed.students import make_student

QUERIES = ["he [ran] home", "the bank was [closed]", "she sings"]
ITEMS = ["run: move fast", "close: shut", "sing: make music", "bank: a slope", "walk: go on foot"]
LISTED = [[0, 1, 4], [1, 3], [2, 0, 1, 3, 4]]
SCORES = [np.array([5.0, -3.0, 1.0], np.float32), np.array([2.0, 1.0], np.float32), np.arange(5, dtype=np.float32)]


@pytest.fixture(scope="module", params=[None, {"query": "ask: ", "document": "told: "}], ids=["plain", "prompts"])
def folder(request, tmp_path_factory):
    return make_student(tmp_path_factory.mktemp("student"), request.param)


def loss_of(student, temperature=20.0):
    texts = [[ITEMS[item] for item in listed] for listed in LISTED]
    return distillation_loss(student, student, QUERIES, texts, SCORES, temperature)


def test_the_loss_is_that_of_the_embeddings_which_the_dual_encoder_gives(folder):
    dual_encoder = DualEncoder(folder, "float32")
    asked, items = dual_encoder.embed_queries(QUERIES), dual_encoder.embed_items(ITEMS)
    expected = []
    for query, listed, scores in zip(asked, LISTED, SCORES, strict=True):
        logits = 20 * items[listed] @ query
        wanted = np.exp(scores) / np.exp(scores).sum()
        expected.append(-(wanted * (logits - np.log(np.exp(logits).sum()))).sum())
    assert loss_of(new_student(folder)).item() == pytest.approx(np.mean(expected), rel=0.02)  # bfloat16 where that is fast


def test_steps_teach_the_order_of_the_scores(folder):
    student = new_student(folder)
    optimizer, schedule = new_optimizer(student, 3e-3, 30)
    first = loss_of(student).item()
    for _ in range(30):
        optimizer.zero_grad()
        loss = loss_of(student)
        loss.backward()
        optimizer.step()
        schedule.step()
    entropy = np.mean([-(p * np.log(p)).sum() for p in (np.exp(s) / np.exp(s).sum() for s in SCORES)])
    assert entropy <= loss.item() < entropy + 0.2 * (first - entropy)
    asked = torch.from_numpy(student.encode_query(QUERIES))
    for query, listed, scores in zip(asked, LISTED, SCORES, strict=True):
        similar = student.encode_document([ITEMS[item] for item in listed]) @ query.numpy()
        assert np.argmax(similar) == np.argmax(scores)


def test_a_third_of_what_is_listed_is_the_best_and_the_rest_is_drawn():
    scores = np.arange(30, dtype=np.float32)[::-1].copy()
    chosen = choose_listed(scores, 9, np.random.default_rng(0))
    assert chosen[:3].tolist() == [0, 1, 2]
    assert len(set(chosen.tolist())) == 9
    assert sorted(choose_listed(scores, 9, np.random.default_rng(1)).tolist()) != sorted(chosen.tolist())
    assert sorted(choose_listed(scores[:4], 9, np.random.default_rng(0)).tolist()) == [0, 1, 2, 3]


def test_no_query_is_seen_twice_in_an_epoch_and_less_than_a_step_of_them_is_left_out():
    config = DistillationConfig(epochs=2, queries_per_step=4)
    steps = config.steps(13)
    assert steps == 6
    seen = [rows_of_step(step, 13, 4, 0).tolist() for step in range(steps)]
    for epoch in (seen[:3], seen[3:]):
        assert len({row for rows in epoch for row in rows}) == 12
    assert seen[:3] != seen[3:]
    assert config.steps(2) == 2


def test_a_dual_encoder_that_is_missing_is_named():
    with pytest.raises(ModelError, match="'no-such-model' cannot be loaded"):
        new_student("no-such-model")
