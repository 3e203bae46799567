import shutil

import numpy as np
import pytest

from axn_ray import sample
from axn_ray.core.artifact import check_files, read_manifest
from axn_ray.core.corpus import Items
from axn_ray.core.models import MINILM
from axn_ray.core.views import LayerEncoder, View, load_view
from axn_ray.distributed import embed_views as module
from axn_ray.distributed.embed_views import embed_views

WORDS = "run walk close open bank dog house river slow fast eat drink speak shut move stand".split()
VIEWS = [View.of(name) for name in ("ce", "de_title", "ce1_title", "ce0")]


@pytest.fixture(scope="module")
def items():
    rng = np.random.default_rng(0)
    texts = tuple(" ".join(rng.choice(WORDS, rng.integers(2, 9))) for _ in range(60))
    return Items(tuple(f"i{n}" for n in range(60)), tuple(text.split()[0] for text in texts), texts)


@pytest.fixture(scope="module", autouse=True)
def small_shards():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SHARD_ROWS", 16)
        yield


@pytest.fixture(scope="module")
def models(tiny_cross_encoder):
    return {"de": MINILM, "ce": str(tiny_cross_encoder)}


@pytest.fixture(scope="module")
def embedded(ray_session, items, models, tmp_path_factory):
    """The views in a folder of their own, which no test changes."""
    return embed_views(items, VIEWS, models, tmp_path_factory.mktemp("views"), workers=2)


def test_views_equal_one_process(embedded, items, models):
    for view, place in zip(VIEWS, embedded, strict=True):
        encoder = LayerEncoder(view.encoder, models[view.encoder])
        raw = encoder.embed(view.texts(items), [encoder.read_layer(view)])[:, 0]
        centred = raw - raw.mean(axis=0)
        expected = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-9)
        np.testing.assert_allclose(load_view(place), expected, atol=0.05)  # bfloat16 rounds by batch
        manifest = read_manifest(place, "view")
        check_files(place, manifest)
        assert manifest.made_from["items"] == items.fingerprint
        assert place.name.startswith(f"{view.name}-")
    assert {path for path in embedded[0].parent.rglob(".*")} == set()


def test_what_is_there_is_not_made_again_and_another_model_gets_its_own(embedded, items, models, tmp_path):
    places = [shutil.copytree(place, tmp_path / place.name) for place in embedded]
    before = [(place / "manifest.json").stat().st_mtime_ns for place in places]
    assert embed_views(items, VIEWS, models, tmp_path, workers=2) == places
    assert [(place / "manifest.json").stat().st_mtime_ns for place in places] == before
    shutil.rmtree(places[3])
    assert embed_views(items, VIEWS, models, tmp_path, workers=2) == places
    assert [(place / "manifest.json").stat().st_mtime_ns for place in places[:3]] == before[:3]
    others = embed_views(items, VIEWS[:2], {**models, "ce": sample.CROSS_ENCODER}, tmp_path, workers=1)
    assert others[0] not in places
    assert others[1] == places[1]
