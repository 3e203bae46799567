"""The workshop: from observed CE scores and dual-encoder embeddings to one vector per item, and a way to embed queries.

`fit` is the whole fit in one process; the artifact (kind `factorization`) is what the search starts from. Knows no Ray.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from axn_ray.core.als import fit_als
from axn_ray.core.artifact import Manifest, hash_json, read_manifest
from axn_ray.core.bayes import BayesModel, with_constant
from axn_ray.core.closed_form import (
    Embedded,
    ItemFeatures,
    Spread,
    StoredArray,
    TrainData,
    embed,
    fit_model,
    in_one_process,
)
from axn_ray.core.first_round import Bm25Index
from axn_ray.core.fit_record import FitRecord, judge_fit, record_fit
from axn_ray.core.fit_share import share_inputs
from axn_ray.core.fitting import FactorizationConfig, FitInputs
from axn_ray.core.gradient_fit import GradientFit
from axn_ray.core.held_out import Watch, fit_lexical_weight, held_out_rmse
from axn_ray.core.lexical import LexicalMean, Words
from axn_ray.core.score_matrix import FloatArray, ItemArray, ScoreMatrix, ScoreScale
from axn_ray.core.towers import GatedTower, split_towers
from axn_ray.errors import ArtifactError, FitError, InputError

logger = logging.getLogger(__name__)

KIND = "factorization"
ITEM_EMBEDDINGS = "item_embeddings.npy"
QUERY_TOWER = "query_tower.safetensors"
QUERY_MAP = "query_map.npy"
PRIOR_VARIANCE = "prior_variance.npy"
BM25 = "bm25"


@dataclass(frozen=True)
class Factorization:
    """`item_embeddings (n_items, dim)`, the scale of the scores they approximate, and how queries are embedded.

    The embeddings are float32, those of bayes int8. mf_ind has a `query_tower`; bayes has a `query_map (dim, DE's dim + 1)
    float32`, the `noise_variance` of its scores and the `prior_variance (dim,) float32` of a query's numbers.
    `lexical` is what the words of query and item add to the prior mean of a scaled score, where the fit has found such a part.
    `index_ce_calls` counts the scores it was fitted to, where that is known.
    """

    item_embeddings: ItemArray
    scale: ScoreScale
    query_tower: GatedTower | None = None
    record: FitRecord | None = None
    query_map: FloatArray | None = None
    noise_variance: float | None = None
    index_ce_calls: int | None = None
    lexical: LexicalMean | None = None
    prior_variance: FloatArray | None = None

    def offset(self, query_text: str) -> FloatArray | None:
        """What is known of every item's scaled score beside its embedding, (n_items,) float32, or None where there is nothing."""
        return None if self.lexical is None else self.lexical.of_query(query_text)

    def embed_queries(self, query_embeddings: FloatArray) -> FloatArray:
        """The dual-encoder's query embeddings (n, DE's dim) -> (n, dim): through tower or map, or as they are without one.

        Raises:
            InputError: another dimension than that of the dual-encoder's item embeddings.
        """
        dim = self.item_embeddings.shape[1] if self.query_map is None else self.query_map.shape[1] - 1
        if query_embeddings.ndim != 2 or query_embeddings.shape[1] != dim:
            raise InputError(f"query embeddings are {query_embeddings.shape}, items have dim {dim}; use the same dual-encoder")
        if self.query_map is not None:
            return with_constant(query_embeddings, 1.0) @ self.query_map.T
        return query_embeddings if self.query_tower is None else self.query_tower.embed(query_embeddings)


def fit(
    score_matrix: ScoreMatrix,
    item_embeddings: FloatArray,
    query_embeddings: FloatArray,
    config: FactorizationConfig,
    words: Words | None = None,
) -> Factorization:
    """Factorize in this process: items (n_items, dim) and train queries (n_queries, dim) of the dual-encoder.

    `words` are for `bayes`: see `fit_closed_form`.

    Raises:
        InputError: see `FitInputs` and `ScoreScale.fit`.
        FitError: the fit diverged.
    """
    inputs = FitInputs(score_matrix, item_embeddings, query_embeddings)
    if config.method == "bayes":
        return fit_closed_form(inputs, inputs.fit_scale(), config, words=words)
    if config.method == "als":
        scale = inputs.fit_scale()
        embeddings, epochs = fit_als(inputs, scale, config)
        record = record_fit(epochs, inputs.start_rmse(config, scale), config)
        return Factorization(embeddings, scale, None, record, index_ce_calls=score_matrix.n_observed)
    run = GradientFit(share_inputs(inputs), config)
    best: dict[str, Tensor] = {}
    while not run.progress.is_done:
        run.run_epoch()
        if run.progress.is_at_best:
            best = run.fitted_state()
    record = record_fit(run.progress.epochs, run.start_rmse, config)
    if not all(parameter.isfinite().all() for parameter in best.values()):
        raise FitError(f"epoch {record.best_epoch} left NaN or infinite values; lower learning_rate={config.learning_rate}")
    if config.method == "mf_trns":
        return Factorization(best["items"].numpy(), run.scale, None, record, index_ce_calls=score_matrix.n_observed)
    query_tower, item_tower = split_towers(best)
    embeddings = item_tower.embed(item_embeddings)
    return Factorization(embeddings, run.scale, query_tower, record, index_ce_calls=score_matrix.n_observed)


def fit_closed_form(
    inputs: FitInputs,
    scale: ScoreScale,
    config: FactorizationConfig,
    views: Sequence[StoredArray] = (),
    spread: Spread = in_one_process,
    words: Words | None = None,
) -> Factorization:
    """`bayes`: EM over the dual-encoder's embeddings and other views (n_items, dim) of the items, reduced to `width` numbers.

    With `words`, what they add to the prior mean is fitted to what EM leaves. The held-out RMSE is the posterior mean's, given
    the query's other observations; the iteration with the smallest is kept.

    Raises:
        FitError, InputError: see `core.bayes.iterate_em`, `core.closed_form.embed` and `ItemFeatures`.
    """
    held_out = inputs.held_out(config)
    observed, hidden = inputs.score_matrix.keep(~held_out), inputs.score_matrix.keep(held_out)
    features = ItemFeatures(inputs.item_embeddings, views).reduce(config.width)
    watch, errors = Watch(features, inputs.query_embeddings, scale, observed, hidden), list[float]()

    def judge(model: BayesModel) -> float:
        errors.append(watch.rmse(model))
        logger.info("bayes, iteration %d: held-out RMSE %.5f", model.iterations, errors[-1])
        return errors[-1]

    data = TrainData(features, inputs.query_embeddings, observed, scale)
    model = fit_model(data, config.epochs, spread, judge, config.patience)
    embedded = embed(model, features)
    lexical = None if words is None else _fit_lexical(embedded, inputs, scale, observed, words)
    offset = None if words is None or lexical is None else lambda query: lexical.of_query(words.query_texts[query])
    rmse = held_out_rmse(embedded, inputs.query_embeddings, scale, observed, hidden, offset)
    record = FitRecord(len(errors), model.iterations, rmse, inputs.start_rmse(config, scale))
    known_mean = scale.scale(observed.scores).mean(dtype=np.float64)
    spread_of_scores = float(np.sqrt(np.mean(np.square(scale.scale(hidden.scores) - known_mean))))
    judge_fit(record, cure="score more pairs", of_one_score=spread_of_scores)
    n_observed = inputs.score_matrix.n_observed
    return Factorization(
        embedded.item_embeddings,
        scale,
        record=record,
        query_map=embedded.query_map,
        noise_variance=embedded.noise_variance,
        index_ce_calls=n_observed,
        lexical=lexical,
        prior_variance=embedded.prior_variance,
    )


def _fit_lexical(
    embedded: Embedded, inputs: FitInputs, scale: ScoreScale, observed: ScoreMatrix, words: Words
) -> LexicalMean | None:
    weight = fit_lexical_weight(embedded, inputs.query_embeddings, scale, observed, words.feature)
    logger.info("weight of shared words in the prior mean: %.5f", weight)
    return LexicalMean(words.index, weight) if weight else None


def name_scorer(fingerprint: Any) -> str | None:
    """A hash of a cross-encoder's fingerprint without how it rounds; None where it is only a name, as of imported scores."""
    if not isinstance(fingerprint, Mapping) or "imported" in fingerprint:
        return None
    return hash_json({name: value for name, value in fingerprint.items() if name not in ("dtype", "engine")})


def warn_of_other_scorer(folder: Path, made_from: Mapping[str, str], fingerprint: Any) -> None:
    """Say so where a factorization approximates the scores of another cross-encoder than the one with this fingerprint."""
    known, asked = made_from.get("scorer"), name_scorer(fingerprint)
    if known is not None and asked is not None and known != asked:
        logger.warning(
            "%s was fitted to the scores of another cross-encoder, or of other settings of it, and will find less with this one; "
            "name the one that scored (--cross-encoder), or score and factorize with this one",
            folder,
        )


def describe_factorization(factorization: Factorization, config: FactorizationConfig, made_from: Mapping[str, str]) -> Manifest:
    """The manifest of the artifact that `save_factorization` fills."""
    n_items, dim = factorization.item_embeddings.shape
    scale, record = factorization.scale, factorization.record
    counts: dict[str, int | float] = {"items": n_items, "dim": dim, "scale_alpha": scale.alpha, "scale_beta": scale.beta}
    if record is not None:
        counts.update(asdict(record))
    if factorization.noise_variance is not None:
        counts["noise_variance"] = factorization.noise_variance
    if factorization.index_ce_calls is not None:
        counts["index_ce_calls"] = factorization.index_ce_calls
    if factorization.lexical is not None:
        counts["lexical_weight"] = factorization.lexical.weight
    return Manifest(kind=KIND, config=config.model_dump(mode="json"), counts=counts, made_from=dict(made_from))


def save_factorization(folder: Path, factorization: Factorization) -> None:
    """Write the files of the artifact into an empty folder."""
    np.save(folder / ITEM_EMBEDDINGS, factorization.item_embeddings, allow_pickle=False)
    if factorization.query_tower is not None:
        save_file(factorization.query_tower.state_dict(), folder / QUERY_TOWER)
    if factorization.query_map is not None:
        np.save(folder / QUERY_MAP, factorization.query_map, allow_pickle=False)
    if factorization.prior_variance is not None:
        np.save(folder / PRIOR_VARIANCE, factorization.prior_variance, allow_pickle=False)
    if factorization.lexical is not None:
        factorization.lexical.index.save(folder / BM25)


def load_factorization(folder: Path) -> Factorization:
    """Read a `factorization` artifact; the item embeddings are memory-mapped.

    Raises:
        ArtifactError: not such an artifact, or a damaged one.
    """
    manifest = read_manifest(folder, KIND)
    counts = manifest.counts
    shape = int(counts["items"]), int(counts["dim"])
    query_tower = query_map = lexical = prior_variance = None
    try:
        item_embeddings = np.load(folder / ITEM_EMBEDDINGS, mmap_mode="r", allow_pickle=False)
        if QUERY_TOWER in manifest.files:
            query_tower = GatedTower(shape[1])
            query_tower.load_state_dict(load_file(folder / QUERY_TOWER))
        if QUERY_MAP in manifest.files:
            query_map = np.load(folder / QUERY_MAP, allow_pickle=False)
        if PRIOR_VARIANCE in manifest.files:
            prior_variance = np.load(folder / PRIOR_VARIANCE, allow_pickle=False)
        if "lexical_weight" in counts:
            lexical = LexicalMean(Bm25Index.load(folder / BM25), counts["lexical_weight"])
    except (ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise ArtifactError(f"{folder} has a damaged file ({reason}); run the factorization again") from error
    if item_embeddings.shape != shape:
        raise ArtifactError(f"{folder} holds item embeddings {item_embeddings.shape}, its manifest says {shape}; make it again")
    record = None
    if "best_epoch" in counts:
        record = FitRecord(
            int(counts["epochs"]), int(counts["best_epoch"]), float(counts["held_out_rmse"]), float(counts["start_rmse"])
        )
    scale = ScoreScale(counts["scale_alpha"], counts["scale_beta"])
    noise_variance, calls = counts.get("noise_variance"), counts.get("index_ce_calls")
    return Factorization(
        item_embeddings,
        scale,
        query_tower,
        record,
        query_map=query_map,
        noise_variance=noise_variance,
        index_ce_calls=None if calls is None else int(calls),
        lexical=lexical,
        prior_variance=prior_variance,
    )
