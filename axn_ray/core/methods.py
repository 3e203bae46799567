"""The methods that the examiner compares, each a frozen value. Knows no embedding and no CE score."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from axn_ray.core.stopping import Stop
from axn_ray.errors import InputError

BM25, RANDOM, FIXED = "bm25", "random", "fixed"
DE, CUR = "de", "cur"


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to spend the budget.

    `first_round` and `embeddings` name embeddings of the search space; a first round may also be `bm25`, `random`, or
    `fixed`, the same random items for every query. One round is retrieve-and-rerank (RnR); later rounds follow an
    `estimator` over the embeddings or walk the `graph` of their nearest neighbours. `blend` is the paper's lambda for
    `pinv`; the variances belong to `ridge`, learning rate and temperature to `tour`, `n_neighbours` to the graphs and
    `depth` to `ladr`. With a `target_recall` of the CE's top `k`, `ridge` stops before the budget is spent where its
    posterior allows (`core.stopping`).

    Raises:
        InputError: several rounds without embeddings and either an estimator or a graph; a target recall without `ridge`.
    """

    name: str
    first_round: str
    embeddings: str | None = None
    estimator: Literal["pinv", "ridge", "tour"] | None = None
    graph: Literal["gar", "ladr"] | None = None
    rounds: int = 1
    blend: float = 0.0
    noise_variance: float = 0.5
    prior_variance: float = 1.0
    learning_rate: float = 1.0
    temperature: float = 1.0
    n_neighbours: int = 16
    depth: int = 50
    target_recall: float | None = None
    k: int = 10

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise InputError(f"method {self.name!r} has rounds={self.rounds}; give 1 or more")
        has_policy = (self.estimator is None) != (self.graph is None)
        if (self.rounds > 1 or self.graph) and (self.embeddings is None or not has_policy):
            several = f"method {self.name!r} has rounds={self.rounds}"
            raise InputError(f"{several}; name its embeddings and either its estimator or its graph, or set rounds=1")
        if self.target_recall is not None and self.estimator != "ridge":
            raise InputError(f"method {self.name!r} has a target recall but no posterior; use the estimator ridge")

    @property
    def stop(self) -> Stop | None:
        """The rule that ends its searches early, if it has one."""
        return None if self.target_recall is None else Stop(self.target_recall, self.k)

    @property
    def rounds_vary(self) -> bool:
        """Whether the number of rounds is free: not in RnR, and not where one retrieval follows fixed anchors (ANNCUR)."""
        return self.rounds > 1 and self.first_round != FIXED


METHODS: Mapping[str, Method] = {
    "rnr_bm25": Method(name="RnR, BM25", first_round=BM25),
    "rnr_de": Method(name="RnR, DE", first_round=DE),
    "rnr_mf_ind": Method(name="RnR, MF_Ind", first_round="mf_ind"),
    "axn_pinv_de": Method(name="AXN pinv, DE", first_round=DE, embeddings=DE, estimator="pinv", rounds=10),
    "gar_de": Method(name="GAR, DE", first_round=DE, embeddings=DE, graph="gar", rounds=10),
    "ladr_de": Method(name="LADR, DE", first_round=DE, embeddings=DE, graph="ladr", rounds=10),
    # What the sample's 50 dev queries choose (`make bench-recall`); both depend on the ranges of CE and DE.
    "tour_de": Method(
        name="TouR, DE", first_round=DE, embeddings=DE, estimator="tour", rounds=10, learning_rate=16.0, temperature=16.0
    ),
    "anncur": Method(name="ANNCUR", first_round=FIXED, embeddings=CUR, estimator="pinv", rounds=2),
    "adacur": Method(name="ADACUR, DE first", first_round=DE, embeddings=CUR, estimator="pinv", rounds=10),
    "adacur_random": Method(name="ADACUR, random first", first_round=RANDOM, embeddings=CUR, estimator="pinv", rounds=10),
    "axn_pinv_mf_trns": Method(name="AXN pinv, MF_Trns", first_round=DE, embeddings="mf_trns", estimator="pinv", rounds=10),
    "axn_pinv_mf_ind_bm25": Method(
        name="AXN pinv, MF_Ind, BM25 first", first_round=BM25, embeddings="mf_ind", estimator="pinv", rounds=10
    ),
    "axn_pinv_mf_ind_random": Method(
        name="AXN pinv, MF_Ind, random first", first_round=RANDOM, embeddings="mf_ind", estimator="pinv", rounds=10
    ),
    "axn_pinv_mf_ind": Method(name="AXN pinv, MF_Ind", first_round="mf_ind", embeddings="mf_ind", estimator="pinv", rounds=10),
    "axn_blend_mf_ind": Method(
        name="AXN pinv λ=0.5, MF_Ind", first_round="mf_ind", embeddings="mf_ind", estimator="pinv", rounds=10, blend=0.5
    ),
    "axn_bayes": Method(name="AXN bayes", first_round="bayes", embeddings="bayes", estimator="ridge", rounds=10),
    "axn_ridge_mf_ind": Method(name="AXN ridge, MF_Ind", first_round="mf_ind", embeddings="mf_ind", estimator="ridge", rounds=10),
}


def methods_for(embeddings: Iterable[str]) -> list[str]:
    """Keys of all methods that can do with these embeddings (BM25 and random first rounds are always there)."""
    there = {*embeddings, BM25, RANDOM, FIXED, None}
    return [key for key, method in METHODS.items() if {method.first_round, method.embeddings} <= there]


def choose_methods(names: Sequence[str], rounds: Sequence[int]) -> tuple[Method, ...]:
    """Methods by their key in `METHODS`, each whose rounds vary once per number of rounds, the others once.

    Raises:
        InputError: an unknown key.
    """
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise InputError(f"method {unknown[0]!r} is not known; choose among {', '.join(METHODS)}")
    chosen: list[Method] = []
    for method in (METHODS[name] for name in names):
        chosen += [replace(method, rounds=number) for number in rounds] if method.rounds_vary else [method]
    return tuple(chosen)
