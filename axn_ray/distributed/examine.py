"""The evaluation stage: artifacts in, one `evaluation` artifact out (see `core.evaluation_store`)."""

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from axn_ray.core.artifact import Manifest, check_replaceable, check_same_inputs, new_artifact, read_manifest
from axn_ray.core.choice import CHOICE, Choice, choose, list_trials, read_choice
from axn_ray.core.comparison import Row, summarize
from axn_ray.core.embedded_corpus import EmbeddedCorpus, load_embedded_corpus
from axn_ray.core.evaluation import ExactScores, Examination, exact_label_metrics, index_labels
from axn_ray.core.evaluation_store import KIND, Evaluation, write_evaluation, write_runs
from axn_ray.core.factorization import Factorization, load_factorization, warn_of_other_scorer
from axn_ray.core.first_round import Bm25Index
from axn_ray.core.graph_search import neighbour_graph
from axn_ray.core.methods import BM25, CUR, DE
from axn_ray.core.score_store import Scores, load_scores
from axn_ray.core.search_space import Embeddings, SearchSpace, cur_embeddings
from axn_ray.distributed.evaluate import EvaluateConfig, evaluate
from axn_ray.distributed.truth import calls_per_second, find_truth
from axn_ray.errors import ArtifactError, InputError

logger = logging.getLogger(__name__)


def examine(
    config: EvaluateConfig,
    embeddings: Path,
    truth: Path | None,
    factorizations: Mapping[str, Path],
    out: Path,
    dense_rows: Path | None = None,
    choice: Path | None = None,
) -> list[Row]:
    """Compare the methods on the truth's queries; write `out`; returns the summary rows.

    `truth` is scored first where it is not there, beside `out` where it is None. `factorizations` maps a name that the
    methods use (`mf_trns`, `mf_ind`, `bayes`) to its artifact. `dense_rows` are scores of every item for some train
    queries, for ANNCUR and ADACUR. `choice` is the evaluation on dev queries whose settings are to be judged.

    Raises:
        ArtifactError: artifacts that were made from different items or over different dual-encoders, or truth or
            dense rows that are not dense.
        InputError: see `find_truth`, `Examination`, `read_dense_rows` and `read_settings`.
    """
    check_replaceable(out, KIND)
    truth = out.with_name(f"{out.name}_truth") if truth is None else truth
    given = {**factorizations, **({} if dense_rows is None else {CUR: dense_rows})}
    corpus = load_embedded_corpus(embeddings)
    exact = find_truth(corpus, config, truth)
    for folder in (truth, *given.values()):
        check_made_alike(folder, "scores" if folder in (truth, dense_rows) else "factorization", corpus, exact)
    chosen = None if choice is None else read_settings(choice, config, exact)
    fitted = {name: load_factorization(path) for name, path in factorizations.items()}
    rows = None if dense_rows is None else read_dense_rows(dense_rows, exact)
    examination = build_examination(corpus, exact, fitted, config, rows, chosen)
    table = evaluate(examination, workers=config.workers, threads=config.threads, shard_queries=config.shard_queries)
    baseline = None if config.choose else config.find_baseline(chosen)
    counts = {"rows": table.num_rows, "queries": examination.n_queries, "items": len(corpus.items)}
    counts |= {f"exact_{name}": value for name, value in exact_label_metrics(examination).items()}
    if speed := calls_per_second(truth):
        counts["ce_calls_per_second"] = speed
    sources = {name: str(path.name) for name, path in given.items()}
    manifest = Manifest(
        kind=KIND,
        config={**config.model_dump(mode="json"), "settings": {} if chosen is None else chosen.settings, "baseline_at": baseline},
        counts=counts,
        made_from={"items": corpus.items.fingerprint, "cross_encoder": exact.made_from["cross_encoder"], **sources},
    )
    summary = summarize(table, baseline=baseline)
    with new_artifact(out, manifest) as folder:
        write_evaluation(folder, Evaluation(table, summary, manifest))
        write_runs(folder / "runs", table, examination.exact, corpus.items.ids)
        if config.choose:
            made = choose_settings(config, examination, summary, exact)
            (folder / CHOICE).write_text(made.model_dump_json(indent=1) + "\n")
    logger.info("evaluated %d queries into %s", examination.n_queries, out)
    return summary


def check_made_alike(folder: Path, kind: str, corpus: EmbeddedCorpus, exact: Scores) -> None:
    """Refuse an artifact of other items or over another dual-encoder; name a factorization of other scores than the truth's.

    Raises:
        ArtifactError: no such artifact, or one of these.
    """
    manifest = read_manifest(folder, kind)
    if manifest.made_from.get("items") != corpus.items.fingerprint:
        raise ArtifactError(f"{folder} was made from other items than the embeddings; make both from one corpus")
    check_same_inputs(folder, manifest, {"dual_encoder": corpus.dual_encoder})
    warn_of_other_scorer(folder, manifest.made_from, exact.config.get("fingerprint"))


def choose_settings(config: EvaluateConfig, examination: Examination, summary: list[Row], exact: Scores) -> Choice:
    """The best of the settings that were tried, with all that they hold for."""
    trials = list_trials(config.method_names(examination.space.embeddings), config.rounds)
    return Choice(
        settings=choose(trials, summary),
        queries=list(examination.exact.query_ids),
        cross_encoder=exact.made_from["cross_encoder"],
        budgets=config.budgets,
        ks=config.k,
    )


def read_settings(folder: Path, config: EvaluateConfig, exact: Scores) -> Choice:
    """The settings that an evaluation on dev queries has chosen, to be judged on the truth's queries.

    Raises:
        ArtifactError: no such evaluation, or one with another cross-encoder.
        InputError: this evaluation chooses itself, or one of its queries has chosen.
    """
    if config.choose:
        raise InputError(f"--choose and --choice {folder} exclude each other; choose on dev queries, judge on test queries")
    check_same_inputs(folder, read_manifest(folder, KIND), {"cross_encoder": exact.made_from["cross_encoder"]})
    choice = read_choice(folder)
    choice.check_unseen(exact.query_ids)
    return choice


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
    chosen: Choice | None = None,
) -> Examination:
    """Bring truth, embeddings and plan together, over the truth's queries.

    The dual-encoder's own embeddings come without a scale: a search over them has nothing that was scored offline.
    Graphs of nearest neighbours are built here, for the methods that walk them.

    Raises:
        InputError: see `EvaluationPlan` and `Examination`.
    """
    limit = config.max_queries or len(exact.query_ids)
    query_ids = exact.query_ids[:limit]
    rows = [corpus.queries.index_of[query_id] for query_id in query_ids]
    queries, query_embeddings = corpus.queries.take(rows), corpus.query_embeddings[rows]
    embeddings = {DE: Embeddings(corpus.item_embeddings, query_embeddings, scale=None, index_ce_calls=0)}
    for name, part in fitted.items():
        embedded = part.embed_queries(query_embeddings)
        known = part.noise_variance, part.index_ce_calls, part.lexical, part.prior_variance
        embeddings[name] = Embeddings(part.item_embeddings, embedded, part.scale, *known)
    if cur is not None:
        embeddings[CUR] = cur
    plan = config.plan(embeddings, chosen)
    walks = [method for method in plan.methods if method.graph]
    graphs = {
        name: neighbour_graph(
            np.asarray(embeddings[name].items, dtype=np.float32),
            max(walk.n_neighbours for walk in walks if walk.embeddings == name),
        )
        for name in {str(walk.embeddings) for walk in walks} & embeddings.keys()
    }
    needs_bm25 = any(method.first_round == BM25 for method in plan.methods)
    bm25 = Bm25Index(corpus.items.full_texts) if needs_bm25 else None
    space = SearchSpace(embeddings, queries.texts, bm25, graphs)
    dense = ExactScores(query_ids, exact.dense()[:limit])
    return Examination(space, dense, plan, index_labels(corpus.items, queries))
