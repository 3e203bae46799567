"""One index and one running app for all tests of the serving app."""

import socket
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
import pytest

from axn_ray.core.artifact import Manifest, new_artifact
from axn_ray.core.corpus import Items, Queries
from axn_ray.core.dual_encoder import DualEncoder
from axn_ray.core.embedded_corpus import EmbeddedCorpus, save_embedded_corpus
from axn_ray.core.factorization import describe_factorization, fit, save_factorization
from axn_ray.core.fitting import FactorizationConfig
from axn_ray.core.models import MINILM
from axn_ray.core.score_matrix import ScoreMatrix
from serve_app.config import AppArgs
from tests.serve_app.scorers import known_score

N_ITEMS = 60
KNOWN = "python:tests.serve_app.scorers:Known"
VERBS = ("run", "walk", "sing", "grow", "burn", "carry")
PLACES = ("home", "uphill", "in the rain", "at night", "with care", "for a living", "to the sea", "on stage", "slowly", "twice")


def make_index(folder: Path) -> Path:
    """A small corpus, embedded for real, and a `bayes` fit to known scores of six train queries."""
    texts = tuple(f"{verb} {place}" for verb in VERBS for place in PLACES)
    columns = {
        "verb": pa.chunked_array([[text.split()[0] for text in texts]]),
        "place": pa.chunked_array([list(PLACES) * len(VERBS)]),
    }
    items = Items(tuple(f"i{n}" for n in range(N_ITEMS)), tuple(text.split()[0] for text in texts), texts, columns=columns)
    queries = Queries(tuple(f"q{n}" for n in range(6)), tuple(f"they {verb} often" for verb in VERBS))
    model = DualEncoder(MINILM)
    corpus = EmbeddedCorpus(
        items, queries, ("train",) * 6, model.embed_items(items.full_texts), model.embed_queries(queries.texts), MINILM
    )
    made_from = {"items": items.fingerprint, "queries": queries.fingerprint}
    described = Manifest(kind="embeddings", config={"dual_encoder": MINILM}, counts={"items": N_ITEMS}, made_from=made_from)
    with new_artifact(folder / "embeddings", described) as aside:
        save_embedded_corpus(aside, corpus)
    rows, columns = np.divmod(np.arange(6 * N_ITEMS, dtype=np.int32), N_ITEMS)
    scores = np.array([known_score(queries.texts[q], items.full_texts[i]) for q, i in zip(rows, columns, strict=True)])
    matrix = ScoreMatrix.from_triples(rows, columns, scores.astype(np.float32), 6, N_ITEMS)
    config = FactorizationConfig.model_validate({"method": "bayes"})
    fitted = fit(matrix, corpus.item_embeddings, corpus.query_embeddings, config)
    with new_artifact(folder / "bayes", describe_factorization(fitted, config, made_from)) as aside:
        save_factorization(aside, fitted)
    return folder


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="package")
def index_folder(tmp_path_factory):
    return make_index(tmp_path_factory.mktemp("index"))


@pytest.fixture(scope="package")
def serve_url(ray_session):
    """Serve's own processes, at a free port of this machine."""
    from ray import serve

    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"enable_access_log": False})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture(scope="package")
def app_args(index_folder, tmp_path_factory):
    """Batches of some ten pairs: a request of 60 pairs is several batches long."""
    return AppArgs(
        index=str(index_folder),
        cross_encoder=KNOWN,
        cache=tmp_path_factory.mktemp("cache"),
        batch_tokens=64,
        max_queued_pairs=200,
        max_documents=100,
        max_body_bytes=100_000,
        deadline_ms=120_000,
    )


@pytest.fixture(scope="package")
def url(serve_url, app_args):
    """The app, ready."""
    from ray import serve

    from serve_app.app import build_app

    serve.run(build_app(app_args), name="axn", route_prefix="/")
    assert httpx.get(f"{serve_url}/ready", timeout=60).status_code == 200
    return serve_url


@pytest.fixture
def client(url):
    with httpx.Client(base_url=url, timeout=30) as opened:
        yield opened
