"""The evaluation stage: artifacts in, one `evaluation` artifact out (rows, summary, table, figure)."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import pyarrow.parquet

from axn_ray.core import report
from axn_ray.core.artifact import Manifest, new_artifact, read_manifest
from axn_ray.core.embedded_corpus import EmbeddedCorpus, load_embedded_corpus
from axn_ray.core.evaluation import ExactScores, Examination, index_labels
from axn_ray.core.factorization import Factorization, load_factorization
from axn_ray.core.first_round import Bm25Index
from axn_ray.core.graph_search import neighbour_graph
from axn_ray.core.methods import BM25, CUR, DE, Embeddings, SearchSpace, cur_embeddings
from axn_ray.core.score_store import Scores, load_scores
from axn_ray.distributed.evaluate import EvaluateConfig, evaluate
from axn_ray.errors import ArtifactError, InputError

logger = logging.getLogger(__name__)


def examine(
    config: EvaluateConfig,
    embeddings: Path,
    truth: Path,
    factorizations: Mapping[str, Path],
    out: Path,
    dense_rows: Path | None = None,
) -> list[report.Row]:
    """Compare the methods on the truth's queries; write `out`; returns the summary rows.

    `factorizations` maps a name that the methods use (`mf_trns`, `mf_ind`, `bayes`) to its artifact. `dense_rows` are
    scores of every item for some train queries, for ANNCUR and ADACUR.

    Raises:
        ArtifactError: artifacts that were made from different items, or truth or dense rows that are not dense.
        InputError: the truth's queries are not in the corpus, or see `Examination` and `read_dense_rows`.
    """
    given = {**factorizations, **({} if dense_rows is None else {CUR: dense_rows})}
    corpus, exact = load_embedded_corpus(embeddings), load_scores(truth)
    for folder in (truth, *given.values()):
        kind = "scores" if folder in (truth, dense_rows) else "factorization"
        if read_manifest(folder, kind).made_from.get("items") != corpus.items.fingerprint:
            raise ArtifactError(f"{folder} was made from other items than {embeddings}; make both from one corpus")
    fitted = {name: load_factorization(path) for name, path in factorizations.items()}
    rows = None if dense_rows is None else read_dense_rows(dense_rows, exact)
    examination = build_examination(corpus, exact, fitted, config, rows)
    table = evaluate(examination, workers=config.workers, threads=config.threads, shard_queries=config.shard_queries)
    summary = report.summarize(table)
    manifest = Manifest(
        kind="evaluation",
        config=config.model_dump(mode="json"),
        counts={"rows": table.num_rows, "queries": examination.n_queries},
        made_from={"items": corpus.items.fingerprint, **{name: str(path.name) for name, path in given.items()}},
    )
    with new_artifact(out, manifest) as folder:
        pyarrow.parquet.write_table(table, folder / "rows.parquet", compression="zstd")
        (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        (folder / "table.md").write_text(report.markdown_table(summary))
        report.save_figure(report.draw_recall(summary, f"{len(corpus.items):,} items"), folder / "recall")
    logger.info("evaluated %d queries into %s", examination.n_queries, out)
    return summary


def read_dense_rows(folder: Path, exact: Scores) -> Embeddings:
    """The CUR embeddings of a scores artifact that holds every item for some train queries.

    Raises:
        ArtifactError: see `load_scores`; a pair is missing, or another cross-encoder made the scores than the truth.
        InputError: a query of the truth is among them.
    """
    rows = load_scores(folder)
    if rows.made_from.get("cross_encoder") != exact.made_from.get("cross_encoder"):
        why = "another model, dtype or setting"
        raise ArtifactError(f"{folder} was scored by another cross-encoder than the truth ({why}); score both with one")
    if seen := set(rows.query_ids) & set(exact.query_ids):
        raise InputError(f"{folder} holds {len(seen)} queries of the truth (such as {min(seen)!r}); score train queries")
    return cur_embeddings(rows.dense())


def build_examination(
    corpus: EmbeddedCorpus,
    exact: Scores,
    fitted: Mapping[str, Factorization],
    config: EvaluateConfig,
    cur: Embeddings | None = None,
) -> Examination:
    """Bring truth, embeddings and plan together, over the truth's queries.

    The dual-encoder's own embeddings come without a scale: a search over them has nothing that was scored offline.
    Graphs of nearest neighbours are built here, for the methods that walk them.

    Raises:
        InputError: a query of the truth is not in the corpus.
    """
    unknown = [query_id for query_id in exact.query_ids if query_id not in corpus.queries.index_of]
    if unknown:
        raise InputError(f"the exact scores know query {unknown[0]!r}, the corpus does not; embed the same queries")
    limit = config.max_queries or len(exact.query_ids)
    query_ids = exact.query_ids[:limit]
    rows = [corpus.queries.index_of[query_id] for query_id in query_ids]
    queries, query_embeddings = corpus.queries.take(rows), corpus.query_embeddings[rows]
    embeddings = {DE: Embeddings(corpus.item_embeddings, query_embeddings, scale=None, index_ce_calls=0)}
    for name, part in fitted.items():
        embedded = part.embed_queries(query_embeddings)
        embeddings[name] = Embeddings(part.item_embeddings, embedded, part.scale, part.noise_variance, part.index_ce_calls)
    if cur is not None:
        embeddings[CUR] = cur
    plan = config.plan(embeddings)
    walks = [method for method in plan.methods if method.graph]
    graphs = {
        name: neighbour_graph(embeddings[name].items, max(walk.n_neighbours for walk in walks if walk.embeddings == name))
        for name in {str(walk.embeddings) for walk in walks} & embeddings.keys()
    }
    needs_bm25 = any(method.first_round == BM25 for method in plan.methods)
    bm25 = Bm25Index(corpus.items.full_texts) if needs_bm25 else None
    space = SearchSpace(embeddings, queries.texts, bm25, graphs)
    dense = ExactScores(query_ids, exact.dense()[:limit])
    return Examination(space, dense, plan, index_labels(corpus.items, queries))
