"""What the whole road takes around the cross-encoder, from embedding to factorization, by costs fitted to measured runs.

Holds no measurement of its own. Knows no clock and no machine.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from scipy.optimize import nnls

from axn_ray.core.sizing import SizingConfig, size_run
from axn_ray.errors import InputError

TERMS = ("constant", "item", "pair", "cell")


class RunSize(NamedTuple):
    """How large a run is: items, scored pairs, and the queries that these belong to."""

    items: int
    pairs: int
    queries: int


class Cost(BaseModel):
    """`constant + item * items + pair * pairs + cell * items * queries`, in seconds or bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    constant: float = Field(0.0, ge=0)
    item: float = Field(0.0, ge=0)
    pair: float = Field(0.0, ge=0)
    cell: float = Field(0.0, ge=0)

    def at(self, size: RunSize) -> float:
        """The cost of a run of this size."""
        return self.constant + self.item * size.items + self.pair * size.pairs + self.cell * size.items * size.queries


def fit_cost(runs: Sequence[tuple[RunSize, float]], terms: Sequence[str]) -> Cost:
    """The cost, of these of its `TERMS` alone, that explains measured values best: least squares of relative errors, none < 0.

    Raises:
        InputError: fewer runs than terms, or a value that is not above 0.
    """
    if len(runs) < len(terms) or min(value for _, value in runs) <= 0:
        raise InputError(f"{len(runs)} runs cannot fit {len(terms)} terms, each above 0; measure more runs or name fewer terms")
    columns = {"constant": lambda size: 1.0, "item": lambda size: size.items, "pair": lambda size: size.pairs}
    columns["cell"] = lambda size: float(size.items) * size.queries
    matrix = np.array([[columns[term](size) / value for term in terms] for size, value in runs])
    scale = matrix.max(axis=0)
    found, _ = nnls(matrix / scale, np.ones(len(runs)))
    return Cost(**dict(zip(terms, (found / scale).tolist(), strict=True)))


class RoadCosts(BaseModel):
    """What was measured around the cross-encoder: seconds of each stage, and bytes that a process has for itself.

    `choose` is in seconds of one worker, the work that workers share: which pairs to score. The other seconds are those of
    the driver and of what it waits for, and are not divided.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    embed: Cost
    choose: Cost
    score: Cost
    factorize: Cost
    driver_bytes: Cost
    worker_bytes: Cost


class RoadConfig(SizingConfig):
    """A run of the whole road; `texts_per_second` is what one worker embeds."""

    n_queries: int = Field(ge=1, description="train queries")
    texts_per_second: float = Field(gt=0, description="of one worker's dual-encoder")


def size_road(config: RoadConfig, costs: RoadCosts) -> dict[str, float]:
    """Hours of each step, one after the other, and of the `whole`; bytes of the `driver` and of a `worker`.

    embed and cross_encoder are divided by the workers' rates, choose by the workers; the rest is as it was measured.
    """
    size = RunSize(config.n_items, config.n_pairs, config.n_queries)
    seconds = {
        "embed": (config.n_items + config.n_queries) / (config.texts_per_second * config.workers) + costs.embed.at(size),
        "choose": costs.choose.at(size) / config.workers,
        "cross_encoder": 3600 * size_run(config).hours,
        "score": costs.score.at(size),
        "factorize": costs.factorize.at(size),
    }
    hours = {step: value / 3600 for step, value in seconds.items()}
    return {**hours, "whole": sum(hours.values()), "driver": costs.driver_bytes.at(size), "worker": costs.worker_bytes.at(size)}


def road_table(runs: Mapping[str, RoadConfig], costs: RoadCosts) -> str:
    """Markdown, a row per named run: what was given, and what `size_road` makes of it."""
    steps = ("embed", "choose", "cross_encoder", "score", "factorize", "whole")
    named = [f"{step.replace('_', '-')}, h" for step in steps]
    heads = ["run", "items", "queries", "pairs", "workers", *named, "driver", "worker's own"]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    for name, config in runs.items():
        sized = size_road(config, costs)
        cells = [f"{n:,}" for n in (config.n_items, config.n_queries, config.n_pairs, config.workers)]
        cells += [f"{sized[step]:,.2f}" for step in steps] + [f"{sized[kind] / 1e9:,.1f} GB" for kind in ("driver", "worker")]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
