"""Free settings: which are tried on dev queries, and the winners, frozen before a test query is looked at.

Knows no search and no scores but their means.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from axn_ray.core.comparison import Row
from axn_ray.core.methods import METHODS, Method, choose_methods
from axn_ray.errors import ArtifactError, InputError

CHOICE = "choice.json"
# Settings of `Method` to try, all combinations of a method; the number of rounds comes from the evaluation's config.
GRID: Mapping[str, Mapping[str, Sequence[float]]] = {
    "axn_blend_mf_ind": {"blend": (0.1, 0.2, 0.35, 0.5, 0.65, 0.8)},
    "axn_ridge_mf_ind": {"noise_variance": (0.1, 0.25, 0.5, 1.0, 2.0)},
    "tour_de": {"learning_rate": (4.0, 16.0, 64.0), "temperature": (4.0, 16.0, 64.0)},
    "gar_de": {"n_neighbours": (8, 16, 64)},
    "ladr_de": {"n_neighbours": (16, 64), "depth": (20, 50)},
}


@dataclass(frozen=True)
class Trial:
    """A method of `METHODS` with some of its settings replaced; the method's name tells them."""

    key: str
    settings: Mapping[str, float]
    method: Method


class Choice(BaseModel):
    """The settings that won, by key of the method, and the dev queries (ids) that chose them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: dict[str, dict[str, float]]
    queries: list[str]
    cross_encoder: str
    budgets: list[int]
    ks: list[int]

    def apply(self, names: Sequence[str], rounds: Sequence[int]) -> tuple[Method, ...]:
        """The named methods with the chosen settings; those that had none to choose, once per number of rounds.

        Raises:
            InputError: an unknown key.
        """
        found: list[Method] = []
        for name in names:
            settings = self.settings.get(name)
            found += choose_methods([name], rounds) if settings is None else [_with(METHODS[name], settings)]
        return tuple(found)

    def check_unseen(self, query_ids: Iterable[str]) -> None:
        """Refuse to judge on queries that have chosen.

        Raises:
            InputError: a query of these is among the ones that chose.
        """
        if seen := set(self.queries) & set(query_ids):
            raise InputError(f"{len(seen)} of the queries to judge (such as {min(seen)!r}) chose the settings; judge on others")


def list_trials(names: Sequence[str], rounds: Sequence[int]) -> list[Trial]:
    """Every setting to try of the named methods: the grid's, times the numbers of rounds where these vary.

    Raises:
        InputError: an unknown key.
    """
    choose_methods(names, rounds)
    trials = []
    for name in names:
        free: dict[str, Sequence[float]] = dict(GRID.get(name, {}))
        if METHODS[name].rounds_vary:
            free["rounds"] = rounds
        for values in product(*free.values()):
            settings = dict(zip(free, values, strict=True))
            method = _with(METHODS[name], settings)
            told = ", ".join(f"{key}={value:g}" for key, value in settings.items() if key not in ("rounds", "blend"))
            trials.append(Trial(name, settings, replace(method, name=f"{method.name} ({told})") if told else method))
    return trials


def choose(trials: Sequence[Trial], summary: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Of each method the settings with the highest recall, averaged over all budgets and k; of equals the first."""
    best: dict[str, tuple[float, dict[str, float]]] = {}
    for trial in trials:
        mine = (trial.method.name, trial.method.rounds)
        mean = float(np.mean([row["recall"] for row in summary if (row["method"], row["rounds"]) == mine]))
        if trial.settings and mean > best.get(trial.key, (-1.0, {}))[0]:
            best[trial.key] = (mean, dict(trial.settings))
    return {key: settings for key, (_, settings) in best.items()}


def read_choice(folder: Path) -> Choice:
    """The choice of an evaluation that was run to choose.

    Raises:
        ArtifactError: there is none, or it cannot be read.
    """
    path = folder / CHOICE
    if not path.is_file():
        raise ArtifactError(f"{folder} holds no {CHOICE}; evaluate on dev queries with --choose first")
    try:
        return Choice.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ArtifactError(f"{path} cannot be read ({error.error_count()} bad fields); choose again") from error


def _with(method: Method, settings: Mapping[str, float]) -> Method:
    """The method with these settings, whole numbers where the method's own are; its name tells a chosen lambda."""
    typed = {name: type(getattr(method, name))(value) for name, value in settings.items()}
    name = method.name.replace(f"λ={method.blend:g}", f"λ={typed['blend']:g}") if "blend" in typed else method.name
    return replace(method, name=name, **typed)
