"""The factorize stage: artifacts `embeddings` and `scores` in, the artifact `factorization` out, fitted on Ray."""

import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from axn_ray.core.artifact import (
    MANIFEST,
    Manifest,
    check_replaceable,
    check_same_inputs,
    hash_file,
    hash_json,
    is_local,
    new_artifact,
    read_manifest,
)
from axn_ray.core.embedded_corpus import EmbeddedCorpus, load_embedded_corpus
from axn_ray.core.factorization import (
    KIND,
    Factorization,
    describe_factorization,
    fit_closed_form,
    load_factorization,
    name_scorer,
    save_factorization,
)
from axn_ray.core.first_round import Bm25Index
from axn_ray.core.fit_share import StoredInputs
from axn_ray.core.fitting import FactorizationConfig, FitInputs
from axn_ray.core.lexical import Words
from axn_ray.core.score_store import load_scores, match_rows, read_scored_queries, read_spans
from axn_ray.distributed.als import factorize_by_als
from axn_ray.distributed.bayes_fit import spread_on_ray
from axn_ray.distributed.cluster import warn_of_threads
from axn_ray.distributed.embed_views import open_views
from axn_ray.distributed.train_factorization import train_factorization
from axn_ray.errors import InputError

logger = logging.getLogger(__name__)


def factorize_scores(
    embeddings: Path,
    scores: Path,
    config: FactorizationConfig,
    out: Path,
    *,
    num_workers: int | tuple[int, int] = 2,
    threads: int = 1,
    storage: Path = Path("runs/train"),
) -> Factorization:
    """Write the `factorization` artifact `out`, with what `core.factorization.fit` gives, by processes of `threads` CPUs each.

    `num_workers`, `storage`: see `train_factorization`; the closed forms take the most workers and keep no checkpoints.

    Raises:
        ArtifactError: scores of other items or queries than those embedded, or a damaged artifact.
        InputError: see `find_queries`, `FitInputs` and `ScoreScale.fit`.
        FitError: the fit diverged.
    """
    check_replaceable(out, KIND)
    warn_of_threads(threads)
    corpus, manifest = load_embedded_corpus(embeddings), read_manifest(scores, "scores")
    rows = find_queries(corpus, embeddings, scores, manifest)
    made_from = {**manifest.made_from, "dual_encoder": corpus.dual_encoder, "scores": hash_file(scores / MANIFEST)}
    if (scorer := name_scorer(manifest.config.get("fingerprint"))) is not None:
        made_from["scorer"] = scorer
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as parts:
        most = num_workers if isinstance(num_workers, int) else num_workers[1]
        # Ray Train's workers have another working directory.
        absolute = scores.resolve() if is_local(scores) else scores
        stored = StoredInputs(embeddings.resolve(), absolute, rows, read_spans(scores))
        if config.method == "bayes":
            inputs = FitInputs(load_scores(scores).matrix, np.asarray(corpus.item_embeddings), corpus.query_embeddings[rows])
            cross_encoder, folder = manifest.config.get("cross_encoder"), embeddings.parent / "views"
            views = open_views(config.views, corpus, cross_encoder, folder, most, threads)
            words = index_words(corpus, rows) if config.lexical else None
            fitted = fit_closed_form(inputs, inputs.fit_scale(), config, views, spread_on_ray(most, threads), words)
        elif config.method == "als":
            fitted = factorize_by_als(stored, config, Path(parts).resolve(), most, threads)
        else:
            name = name_run(config, embeddings, scores)
            settings: dict[str, Any] = {"num_workers": num_workers, "threads": threads, "storage": storage}
            fitted = train_factorization(stored, config, Path(parts).resolve(), name=name, **settings)
        with new_artifact(out, describe_factorization(fitted, config, made_from)) as folder:
            save_factorization(folder, fitted)
    return load_factorization(out)


def find_queries(corpus: EmbeddedCorpus, embeddings: Path, scores: Path, manifest: Manifest) -> npt.NDArray[np.int64]:
    """The rows in `embeddings` of the queries of `scores`, (n_queries,).

    Raises:
        ArtifactError: scores of other items or queries, or of other texts of theirs, than those embedded.
        InputError: scores of dev or test queries, which judge what is fitted to train queries.
    """
    check_same_inputs(scores, manifest, {"items": corpus.items.fingerprint})
    queries = corpus.queries
    rows = np.array(match_rows("query", *read_scored_queries(scores), queries.index_of, queries.texts), dtype=np.int64)
    held_out = [row for row in rows if corpus.splits[row] != "train"]
    if held_out:
        such = f"{len(held_out)} dev or test queries (such as {corpus.queries.ids[held_out[0]]!r})"
        raise InputError(f"{scores} holds scores of {such}, which are to judge the fit; give scores of train queries alone")
    return rows


def index_words(corpus: EmbeddedCorpus, rows: npt.NDArray[np.int64]) -> Words | None:
    """BM25 over the items, beside the texts of the queries in these rows; None where no item has a word."""
    try:
        index = Bm25Index(corpus.items.full_texts)
    except InputError as error:
        logger.warning("without shared words in the prior mean: %s", error)
        return None
    return Words(index, [corpus.queries.texts[row] for row in rows])


def name_run(config: FactorizationConfig, embeddings: Path, scores: Path) -> str:
    """The same for the same fit of the same artifacts, whose manifests hold the hashes of all their files."""
    identity = {**config.model_dump(), "embeddings": hash_file(embeddings / MANIFEST), "scores": hash_file(scores / MANIFEST)}
    return f"factorization-{hash_json(identity)[:12]}"
