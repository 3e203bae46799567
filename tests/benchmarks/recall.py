"""`make bench-recall`: the benchmark of record. Sections run alone or together, and go on where they were cut off.

    make bench-recall                                      # everything: some hours of CE scoring on two cores
    make bench-recall SECTIONS="artifact record"           # one world, and the documents of what there is
    make bench-recall KNOWN="run/scores run/other_scores"  # look pairs up by their texts before paying for them

fixed     the verbs, 13,767 items: 2000 train queries x 100 items, 100 test queries (shipped truth), settings fixed beforehand.
verbs     the same with all rivals, and what is free chosen on 50 dev queries, whose truth is scored here and serves ANNCUR and
          ADACUR as dense rows. One cross-encoder must make all, so it runs in the shipped truth's bfloat16 on any CPU with
          AVX-512, however slow there; where our engine cannot run in it, this stops.
distilled the same world and scores: the dual-encoder learns from them first (`axn distill`), then the closed form is fitted.
sweep     the same world: 100, 500, 2000 train queries x 25, 50, 100, 200 items, all from one scored superset.
artifact  noun.artifact, 11,587 items: its 785 train queries x 100, 100 test queries, with and without a distilled dual-encoder;
          settings chosen by the verbs' dev queries.
all       all 117,659 items: 2000 train queries x 100, 16 test queries; every method with its own settings.
record    documents and figures in docs/benchmarks from the sections that are done: recall (verbs and distilled), recall_artifact,
          recall_all, recall_sweep; the others stay.
"""

import argparse
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from axn_ray import sample
from axn_ray.core.choice import GRID
from axn_ray.core.embedded_corpus import load_embedded_corpus
from axn_ray.core.fitting import FactorizationConfig
from axn_ray.distributed.cluster import join_cluster
from axn_ray.distributed.distill import DistillConfig, distill
from axn_ray.distributed.embed import EmbedConfig, embed
from axn_ray.distributed.evaluate import EvaluateConfig
from axn_ray.distributed.examine import examine
from axn_ray.distributed.factorize import factorize_scores
from axn_ray.distributed.score import ScoreConfig, score
from tests.benchmarks import recall_record

OUT = Path("runs/bench-recall")
SECTIONS = ("fixed", "verbs", "distilled", "sweep", "artifact", "all", "record")
BUDGETS = [50, 100, 200, 500]
KS = [1, 10, 100]
ROUNDS = [10]
# At equal calls: the paper's choice for the rivals, and what helps the closed-form fit (docs/benchmarks/sampling.json) for ours.
NEAR, MIX = {"active_share": 0.0, "random_share": 0.0}, {"active_share": 0.3, "random_share": 0.1}
EXACT = {"dtype": "bfloat16"}  # the shipped truth's
FITS = {"bayes": "g_mix", "mf_ind": "g_near"}
STOPS = [0.5, 0.6, 0.7, 0.8, 0.9, 0.95]
# Methods without a setting to choose; those of `choice.GRID` have one.
FIXED = ["rnr_bm25", "rnr_de", "rnr_mf_ind", "axn_pinv_de", "axn_pinv_mf_ind", "axn_bayes"]
SWEEP = [(n_queries, per_query) for n_queries in (100, 500, 2000) for per_query in (25, 50, 100, 200)]


@dataclass(frozen=True)
class World:
    """A part of the sample: its worlds, how many train queries are scored, how many test queries judge (None: all)."""

    name: str
    worlds: list[str]
    train_queries: int | None
    test_queries: int | None = None

    @property
    def folder(self):
        return OUT / self.name

    @property
    def truth(self):
        """Exact scores of the test queries: shipped for the verbs, else scored where they are first needed."""
        return sample.EXACT_SCORES if self.name == "verbs" else self.folder / "truth"

    @property
    def fitted(self):
        """The factorizations that are there, by the name that the methods use."""
        return {name: self.folder / name for name in (*FITS, "mf_trns") if (self.folder / name / "manifest.json").exists()}


WORLDS = {
    "verbs": World("verbs", ["verb"], 2000),
    "artifact": World("artifact", ["noun.artifact"], None),
    "all": World("all", [], 2000, 16),
}


def make(folder, stage, *arguments, **settings):
    """Run a stage that writes the artifact `folder`, unless it is there; its seconds stand beside it."""
    if (folder / "manifest.json").exists():
        return
    start = time.monotonic()
    stage(*arguments, **settings)
    folder.with_suffix(".seconds").write_text(f"{time.monotonic() - start:.1f}\n")


def score_world(world, known, ways=("g_near", "g_mix")):
    """Embed the world and score its train queries in both ways, or in one."""
    folder = world.folder
    make(folder / "embeddings", embed, EmbedConfig(world=world.worlds, train_queries=world.train_queries), folder / "embeddings")
    corpus = load_embedded_corpus(folder / "embeddings")
    for name, way in (("g_near", NEAR), ("g_mix", MIX)):
        if name not in ways:
            continue
        paid = [*known, *(str(done) for done in [folder / "g_near"] if name == "g_mix" and "g_near" in ways)]
        make(folder / name, score, corpus, ScoreConfig(per_query=100, known_scores=paid, **EXACT, **way), folder / name)


def prepare(world, known):
    """Embed the world, score its train queries in both ways, and fit."""
    score_world(world, known)
    for name, scores in FITS.items():
        fit(world.folder / "embeddings", world.folder / scores, name, world.folder / name)


def fit(embeddings, scores, method, out):
    """Factorize, going on from the checkpoint of a fit that was cut off; then its seconds are those of the last part."""
    storage = out.with_name(f"{out.name}_storage")
    settings = FactorizationConfig.model_validate({"method": method})
    make(out, factorize_scores, embeddings, scores, settings, out, storage=storage)
    shutil.rmtree(storage, ignore_errors=True)


def fixed(known):
    """The world of the shipped truth with the methods' own settings: lambda 0.5 and noise 0.5 are METHOD.md's."""
    world = WORLDS["verbs"]
    prepare(world, known)
    settings = {"methods": [*FIXED, "axn_blend_mf_ind", "axn_ridge_mf_ind"], "rounds": [5, 10], "baseline": "axn_pinv_mf_ind"}
    judge(world, world.folder / "evaluation", settings)


def verbs(known):
    """The same world with every rival; the dev queries' choices serve the other worlds too."""
    world = WORLDS["verbs"]
    fixed(known)
    folder = world.folder
    # ANNCUR and ADACUR have nothing to choose: the dev queries' dense truth is their index.
    make_dev_truth(world, known)
    judge(world, folder / "cur", {"methods": ["anncur", "adacur"]}, dense_rows=folder / "dev_truth")
    judge(world, folder / "stops", {"methods": ["axn_bayes"], "target_recall": STOPS, "k": [10]})
    fit(folder / "embeddings", folder / "g_near", "mf_trns", folder / "mf_trns")
    choose_settings(known)
    inputs = folder / "embeddings", folder / "dev_truth", world.fitted
    judge(world, folder / "chosen", {"methods": ["axn_pinv_mf_trns", *GRID]}, folder / "dev")
    for k in KS:  # the paper's lambda, the best one for each k
        alone = {"methods": ["axn_blend_mf_ind"], "baseline": "axn_blend_mf_ind"}
        plan = EvaluateConfig(choose=True, rounds=ROUNDS, budgets=[100, 500], k=[k], **alone)
        make(folder / f"dev_lambda_{k}", examine, plan, *inputs, folder / f"dev_lambda_{k}")
        judge(world, folder / f"lambda_{k}", {**alone, "k": [k]}, folder / f"dev_lambda_{k}")
    judge(world, folder / "rounds", {"methods": ["axn_pinv_mf_ind", "axn_bayes"], "rounds": [2, 5, 20]})


def choose_settings(known):
    """What the verbs' dev queries choose of the settings that are free."""
    world = WORLDS["verbs"]
    prepare(world, known)
    make_dev_truth(world, known)
    plan = EvaluateConfig(choose=True, methods=[*GRID], rounds=ROUNDS, budgets=[100, 500], k=KS)
    inputs = world.folder / "embeddings", world.folder / "dev_truth", world.fitted
    make(world.folder / "dev", examine, plan, *inputs, world.folder / "dev")


def teach(world, scores, folder, epochs=1):
    """Into `folder`: a dual-encoder that has learned the scores, and its embeddings."""
    student = folder / "dual_encoder"
    make(student, distill, DistillConfig(epochs=epochs), world.folder / "embeddings", scores, student, folder / "storage")
    config = EmbedConfig(world=world.worlds, train_queries=world.train_queries, dual_encoder=str(student))
    make(folder / "embeddings", embed, config, folder / "embeddings")


def distil(world, scores, folder, epochs=1):
    """Into `folder`, beside `teach`: the closed form over the new embeddings, and the verdict on it."""
    teach(world, scores, folder, epochs)
    fit(folder / "embeddings", scores, "bayes", folder / "bayes")
    plan = EvaluateConfig(methods=["rnr_de", "axn_pinv_de", "axn_bayes"], rounds=ROUNDS, budgets=BUDGETS, k=KS)
    inputs = folder / "embeddings", world.truth, {"bayes": folder / "bayes"}
    make(folder / "evaluation", examine, plan, *inputs, folder / "evaluation")


def distilled(known):
    """The verbs after distillation, and the dev queries' verdict on it."""
    world = WORLDS["verbs"]
    prepare(world, known)
    folder = world.folder / "distilled"
    distil(world, world.folder / FITS["bayes"], folder)
    make_dev_truth(world, known)
    plan = EvaluateConfig(choose=True, methods=["axn_bayes"], rounds=ROUNDS, budgets=BUDGETS, k=KS)
    for name, where in (("dev", folder), ("dev_plain", world.folder)):  # the dev queries choose between them
        inputs = where / "embeddings", world.folder / "dev_truth", {"bayes": where / "bayes"}
        make(folder / name, examine, plan, *inputs, folder / name)


def make_dev_truth(world, known):
    """Exact scores of the dev queries."""
    corpus = load_embedded_corpus(world.folder / "embeddings")
    config = ScoreConfig(split="dev", choice="all", known_scores=known, **EXACT)
    make(world.folder / "dev_truth", score, corpus, config, world.folder / "dev_truth")


def judge(world, out, settings, choice=None, dense_rows=None):
    """Evaluate on test queries; their truth is scored first where it is not there."""
    given = {"rounds": ROUNDS, "budgets": BUDGETS, "k": KS, "max_queries": world.test_queries, **EXACT, **settings}
    plan = EvaluateConfig.model_validate(given)
    make(out, examine, plan, world.folder / "embeddings", world.truth, world.fitted, out, dense_rows=dense_rows, choice=choice)


def artifact(known):
    """Another world, judged with the settings that the verbs' dev queries chose, and after distillation."""
    world = WORLDS["artifact"]
    choose_settings(known)
    prepare(world, known)
    judge(world, world.folder / "evaluation", {"methods": FIXED, "known_scores": known})
    judge(world, world.folder / "chosen", {"methods": [*GRID], "known_scores": known}, WORLDS["verbs"].folder / "dev")
    distil(world, world.folder / FITS["bayes"], world.folder / "distilled")


def whole(known):
    """All items, every method with its own settings: their truth is what the hour goes to; no graph over so many items."""
    world = WORLDS["all"]
    prepare(world, known)
    methods = [*FIXED, *(key for key in GRID if key not in ("gar_de", "ladr_de"))]
    judge(world, world.folder / "evaluation", {"methods": methods, "known_scores": known})


def sweep(known):
    """The paper's sweep over train queries and items each, every matrix a part of one that was scored once."""
    folder, world = OUT / "sweep", WORLDS["verbs"]
    embeddings = world.folder / "embeddings"
    make(embeddings, embed, EmbedConfig(world=world.worlds, train_queries=world.train_queries), embeddings)
    corpus = load_embedded_corpus(embeddings)
    paid = [*known, *(str(done) for done in [world.folder / "g_near"] if (done / "manifest.json").exists())]
    make(folder / "superset", score, corpus, ScoreConfig(per_query=200, known_scores=paid, **EXACT, **NEAR), folder / "superset")
    for n_queries, per_query in SWEEP:
        part = folder / f"{n_queries}x{per_query}"
        settings = ScoreConfig(n_queries=n_queries, per_query=per_query, known_scores=[str(folder / "superset")], **EXACT, **NEAR)
        make(part / "scores", score, corpus, settings, part / "scores")
        for name in ("mf_ind", "bayes"):
            fit(embeddings, part / "scores", name, part / name)
        plan = EvaluateConfig(
            methods=["rnr_de", "axn_pinv_de", "axn_pinv_mf_ind", "axn_bayes"], rounds=ROUNDS, budgets=[100, 500], k=KS
        )
        fitted = {name: part / name for name in ("mf_ind", "bayes")}
        make(part / "evaluation", examine, plan, embeddings, sample.EXACT_SCORES, fitted, part / "evaluation")


def main():
    """Run the sections named on the command line, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; default: all")
    parser.add_argument("--known", nargs="*", default=[], help="scores artifacts to look pairs up in")
    given = parser.parse_args()
    sections = given.sections or SECTIONS
    if unknown := set(sections) - set(SECTIONS):
        parser.error(f"section {unknown.pop()!r} is none of {', '.join(SECTIONS)}")
    if sections != ["record"]:
        join_cluster()
    for section in sections:
        match section:
            case "fixed":
                fixed(given.known)
            case "verbs":
                verbs(given.known)
            case "distilled":
                distilled(given.known)
            case "sweep":
                sweep(given.known)
            case "record":
                recall_record.record_all(OUT, SWEEP)
            case "artifact":
                artifact(given.known)
            case "all":
                whole(given.known)


if __name__ == "__main__":
    main()
