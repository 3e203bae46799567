"""`make bench-scale`: the whole road at 10^5 and 10^6 items (10^6 and 10^7 pairs), to measure all around the cross-encoder.

Each stage runs in a process of its own (`scale_road`), which also says what is a stand-in. A stage that was measured is
kept in runs/bench-scale and not run again. `SECONDS=400` ends the run after that long: the score stage then goes on where it
was cut off, as a killed run does, and its seconds add up; another stage starts anew.
"""

import argparse
import json
import math
import shutil
import sys
import time

from axn_ray.core.road_sizing import RoadCosts, RunSize, fit_cost
from tests.benchmarks.common import record
from tests.benchmarks.process_tree import run_watched
from tests.benchmarks.scale_road import BUDGET, OUT, PER_QUERY, ROUNDS, SHARD_PAIRS, SIZES, TEST_QUERIES

ARTIFACTS = {"corpus": ["items.parquet", "queries.parquet"], "score": ["scores"], "factorize": ["bayes"], "embed": ["embeddings"]}
ARTIFACTS |= {"truth": ["truth"], "evaluate": ["evaluation"]}
SMALL, LARGE = "1e5", "1e6"
# The terms each cost is fitted with, to all sizes; `checked` fits them to the others and predicts the largest.
TERMS = {
    "embed": ["constant", "item"],
    "choose": ["pair", "cell"],
    "score": ["constant", "item", "pair"],
    "factorize": ["constant", "item", "pair"],
    "driver_bytes": ["constant", "item", "pair"],
    "worker_bytes": ["constant", "item", "pair"],
}
WORKERS = 2


def measure(size, stage, seconds):
    """Run a stage for at most so many seconds; whether it is done. Its figures stand in SIZE/STAGE.json then."""
    folder = OUT / size
    folder.mkdir(parents=True, exist_ok=True)
    kept, cut, figures = (folder / f"{stage}{ending}" for ending in (".json", ".cut.json", ".figures"))
    earlier = json.loads(cut.read_text()) if cut.exists() else {"seconds": 0, "runs": 0, "memory": {}}
    if stage != "score":
        earlier["seconds"] = 0
        for name in ARTIFACTS.get(stage, []):
            shutil.rmtree(folder / name, ignore_errors=True)
    command = [sys.executable, "-m", "tests.benchmarks.scale_road", size, stage, str(figures)]
    code, taken, peaks = run_watched(command, seconds)
    if code:
        raise SystemExit(f"{size} {stage} failed")
    memory = {kind: join_peaks(earlier["memory"].get(kind, {}), peaks.get(kind, {})) for kind in {*earlier["memory"], *peaks}}
    found = {"seconds": round(earlier["seconds"] + taken, 1), "runs": earlier["runs"] + 1, "memory": memory}
    if code is None:
        cut.write_text(json.dumps(found))
        return False
    found |= {"bytes_written": sum(count_bytes(folder / name) for name in ARTIFACTS.get(stage, []))}
    kept.write_text(json.dumps(found | json.loads(figures.read_text())))
    sys.stdout.write(f"{size} {stage} {kept.read_text()}\n")
    return True


def join_peaks(one, other):
    """The higher of each peak."""
    return {key: max(one.get(key, 0), other.get(key, 0)) for key in {*one, *other}}


def count_bytes(path):
    """Of a file, or of all files below a folder."""
    return sum(part.stat().st_size for part in [path, *path.rglob("*")] if part.is_file())


def main():
    """Measure what is missing, then record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    arguments = parser.parse_args()
    ends = time.monotonic() + arguments.seconds
    wanted = [(size, stage) for size in arguments.sizes for stage in SIZES[size].stages]
    for size, stage in [*wanted, ("rates", "rates")]:
        if not (OUT / size / f"{stage}.json").exists() and not measure(size, stage, max(1.0, ends - time.monotonic())):
            sys.stdout.write(f"cut off in {size} {stage}; run again to go on\n")
            return
    every = [(size, stage) for size, described in SIZES.items() for stage in described.stages]
    if all((OUT / size / f"{stage}.json").exists() for size, stage in every):
        record_all({size: {stage: read(size, stage) for stage in described.stages} for size, described in SIZES.items()})


def read(size, stage):
    """What was measured."""
    return json.loads((OUT / size / f"{stage}.json").read_text())


def observe_costs(run, rates):
    """What a run cost beside the models that others replace, as `RoadCosts` has it.

    The stand-in cross-encoder's own time is taken off. The cut dual-encoder's is not, for it cannot be told from what is
    around it: a run of a million texts is faster than the short one that measures its rate.
    """
    workers = sum(run["score"]["worker_seconds"].values())
    return {
        "embed": run["embed"]["seconds"],
        "choose": workers - run["score"]["pairs"] / rates["stand_in_pairs_of_one_process"],
        "score": run["score"]["seconds"] - workers / WORKERS,
        "factorize": run["factorize"]["seconds"],
        "driver_bytes": max(run[stage]["memory"]["driver"]["own"] for stage in ("embed", "score", "factorize")),
        "worker_bytes": run["score"]["memory"]["ScoreActor"]["own"],
    }


def fit_costs(measured, rates):
    """(The costs of the road; what those fitted without the largest size predict for it, over what was measured.)"""
    sizes = {name: RunSize(size.items, size.queries * PER_QUERY, size.queries) for name, size in SIZES.items()}
    seen = {name: observe_costs(run, rates) for name, run in measured.items()}
    fitted = {cost: fit_cost([(sizes[name], seen[name][cost]) for name in seen], terms) for cost, terms in TERMS.items()}
    checked = {}
    for cost, terms in TERMS.items():
        without = fit_cost([(sizes[name], seen[name][cost]) for name in seen if name != LARGE], terms)
        checked[cost] = round(without.at(sizes[LARGE]) / seen[LARGE][cost], 2)
    return RoadCosts(**fitted), checked


def record_all(measured):
    """The file and the closing line; `growth` is by how many powers of ten a figure grows where items and pairs grow by one."""
    small, large = measured[SMALL], measured[LARGE]
    growth = {stage: round(math.log10(large[stage]["seconds"] / small[stage]["seconds"]), 2) for stage in large}
    sizes = {
        name: {"items": size.items, "pairs": size.queries * PER_QUERY, "queries": size.queries} for name, size in SIZES.items()
    }
    settings = {
        "per_query": PER_QUERY,
        "shard_pairs": SHARD_PAIRS,
        "test_queries": TEST_QUERIES,
        "budget": BUDGET,
        "rounds": ROUNDS,
    }
    workers = [large["score"]["memory"]["ScoreActor"]["own"], measured["1e5-1e7"]["score"]["memory"]["ScoreActor"]["own"]]
    rates = read("rates", "rates")["rates"]
    costs, checked = fit_costs(measured, rates)
    figures = {"settings": settings, "sizes": sizes, "growth_in_seconds": growth, "measured": measured, "rates": rates}
    record(
        "scale",
        figures | {"costs": costs.model_dump(), "largest_predicted_over_measured": checked},
        **{f"{stage}_s": round(large[stage]["seconds"]) for stage in large if stage != "corpus"},
        score_growth=growth["score"],
        factorize_growth=growth["factorize"],
        worker_mb=round(workers[0] / 1e6),
        worker_mb_at_1e5_items=round(workers[1] / 1e6),
        driver_mb=round(max(large[stage]["memory"]["driver"]["own"] for stage in large if stage != "corpus") / 1e6),
    )


if __name__ == "__main__":
    main()
