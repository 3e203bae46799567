"""Train pairs chosen by the search itself, from what the first pairs of each query taught. Knows no CE and no files."""

import io
from collections.abc import Generator
from dataclasses import dataclass

import numpy as np

from axn_ray.core.adaptive import split_budget
from axn_ray.core.bayes import BayesModel
from axn_ray.core.closed_form import ItemFeatures, Spread, TrainData, embed, fit_model, in_one_process
from axn_ray.core.estimators import Ridge
from axn_ray.core.fitting import FitInputs
from axn_ray.core.index import ItemIndex, Retrieve
from axn_ray.core.pairs import FloatArray
from axn_ray.core.score_matrix import ItemArray, ScoreMatrix, ScoreScale
from axn_ray.core.tokens import Int32Array

ROUNDS = 3
ITERATIONS = 6
FITTED = 4000  # queries that the fit in between looks at; it is to point to items, not to be kept

Pairs = tuple[Int32Array, Int32Array]


@dataclass(frozen=True)
class ActiveSpace:
    """What a fit on the first scores gives the search: items `(n_items, dim)`, queries `(n_queries, dim)`, scale, variances.

    `observed` are the first scores themselves, `failed (n, 2)` the query and item of the first pairs that could not be scored.
    """

    item_embeddings: ItemArray
    query_embeddings: FloatArray
    scale: ScoreScale
    noise_variance: float
    prior_variance: FloatArray
    observed: ScoreMatrix
    failed: Int32Array


@dataclass(frozen=True)
class ActiveModel:
    """What the closed-form fit learned from the first scores: the few numbers from which a space follows."""

    model: BayesModel
    scale: ScoreScale

    @classmethod
    def fit(
        cls,
        observed: ScoreMatrix,
        item_embeddings: FloatArray,
        query_embeddings: FloatArray,
        spread: Spread = in_one_process,
    ) -> "ActiveModel":
        """Fit to the first scores over the dual-encoder's embeddings (n_items, dim), (n_queries, dim).

        Where there are many queries, to those of `FITTED` of them, evenly spaced.

        Raises:
            FitError, InputError: see `iterate_em` and `FitInputs`.
        """
        n_queries = observed.n_queries
        rows = np.linspace(0, n_queries - 1, min(n_queries, FITTED)).astype(np.int64)
        observed, query_embeddings = observed.take(rows), query_embeddings[rows]
        scale = FitInputs(observed, item_embeddings, query_embeddings).fit_scale()
        data = TrainData(ItemFeatures(item_embeddings), query_embeddings, observed, scale)
        return cls(fit_model(data, ITERATIONS, spread), scale)

    def to_bytes(self) -> bytes:
        """As an .npz file."""
        buffer = io.BytesIO()
        model, scale = self.model, self.scale
        numbers = np.array([model.noise_variance, scale.alpha, scale.beta])
        np.savez(buffer, weights=model.weights, covariance=model.covariance, numbers=numbers)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> "ActiveModel":
        """Read what `to_bytes` wrote."""
        with np.load(io.BytesIO(content), allow_pickle=False) as stored:
            noise_variance, alpha, beta = (float(number) for number in stored["numbers"])
            return cls(BayesModel(stored["weights"], stored["covariance"], noise_variance), ScoreScale(alpha, beta))

    def space(
        self, item_embeddings: FloatArray, query_embeddings: FloatArray, observed: ScoreMatrix, failed: Int32Array
    ) -> ActiveSpace:
        """The search space of this model over the same embeddings that it was fitted to."""
        found = embed(self.model, ItemFeatures(item_embeddings))
        queries, variances = found.embed_queries(query_embeddings), (found.noise_variance, found.prior_variance)
        return ActiveSpace(found.item_embeddings, queries, self.scale, *variances, observed, failed)


def choose_actively(space: ActiveSpace, queries: range, n_active: int) -> Generator[Pairs, FloatArray, None]:
    """Yield pairs to score for all `queries` at once, `n_active` of each over a few rounds; receives their scores (n,).

    A round takes the items that the posterior, given all scores of the query so far, ranks highest. A pair that could
    not be scored (NaN) is not asked for again and teaches nothing.
    """
    index, excluded = ItemIndex(space.item_embeddings), {}
    variances = space.noise_variance, space.prior_variance
    failed = space.failed[(space.failed[:, 0] >= queries.start) & (space.failed[:, 0] < queries.stop)]
    ridges: dict[int, Ridge] = {}
    for query in queries:
        items, scores = space.observed.row(query)
        ridges[query] = Ridge(space.item_embeddings, space.scale, space.query_embeddings[query], *variances)
        excluded[query] = np.concatenate([items, failed[failed[:, 0] == query, 1]])
        if len(items):
            ridges[query].observe(items, scores)
    for share in split_budget(n_active, min(ROUNDS, n_active)):
        requests = [Retrieve(ridges[query].query_embedding, share, excluded[query]) for query in queries]
        chosen = [found.item_index for found in index.retrieve(requests)]
        received = yield np.repeat(np.array(queries, dtype=np.int32), share), np.concatenate(chosen)
        for query, items, scores in zip(queries, chosen, received.reshape(len(queries), share), strict=True):
            good = np.isfinite(scores)
            if good.any():
                ridges[query].observe(items[good], scores[good])
            excluded[query] = np.concatenate([excluded[query], items])
