"""The main job, end to end, on the bundled corpus: embed, score, factorize, evaluate, search. `python -m jobs.demo`."""

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from axn_ray import sample
from axn_ray.command import one_sentence_errors
from axn_ray.core.fitting import FactorizationConfig
from axn_ray.core.report import terminal_table
from axn_ray.core.searcher import SearchConfig, Searcher, hits_table
from axn_ray.distributed.cluster import join_cluster
from axn_ray.distributed.embed import EmbedConfig, embed
from axn_ray.distributed.evaluate import EvaluateConfig
from axn_ray.distributed.examine import examine
from axn_ray.distributed.factorize import factorize_scores
from axn_ray.distributed.score import ScoreConfig, score

EXAMPLES = 3
VIEWS = ["de_title", "ce", "ce_half"]  # two encoder passes for the default's four
ENGINES = {"bayes": "closed form, Ray tasks"}


def command(
    out: Annotated[Path, typer.Option(help="folder for the artifacts")] = Path("runs/demo"),
    train_queries: Annotated[int, typer.Option(min=1, help="train queries to score")] = 500,
    per_query: Annotated[int, typer.Option(min=1, help="items to score for each")] = 50,
) -> None:
    """Find a cross-encoder's nearest neighbours on real text: 13,767 verb senses, queries it never saw."""
    console = Console(width=None if Console().is_terminal else 160, highlight=False)
    start = time.monotonic()

    def say(text: str) -> None:
        console.print(f"\n[bold]{text}[/bold]  [dim]{time.monotonic() - start:.0f} s[/dim]")

    with one_sentence_errors():
        join_cluster()
        say("1/5 Embed the verb world and its queries with the dual-encoder (Ray Data)")
        corpus = embed(EmbedConfig(world=["verb"], train_queries=train_queries), out / "embeddings")
        say(f"2/5 Score {train_queries} train queries x {per_query} items with the cross-encoder (Ray Data)")
        score(corpus, ScoreConfig(per_query=per_query), out / "scores")
        factorizations = {name: out / name for name in ("mf_trns", "mf_ind", "bayes")}
        for method, folder in factorizations.items():
            say(f"3/5 Factorize the score matrix: {method} ({ENGINES.get(method, 'Ray Train')})")
            config = FactorizationConfig.model_validate({"method": method, "views": VIEWS})
            factorize_scores(out / "embeddings", out / "scores", config, folder, storage=out / "train")
        say("4/5 Evaluate against the exact cross-encoder top-k of held-out queries (Ray Data)")
        settings = EvaluateConfig(max_queries=50, budgets=[50, 100, 200, 500])
        summary = examine(settings, out / "embeddings", sample.EXACT_SCORES, factorizations, out / "evaluation")
        say(f"5/5 Search live for {EXAMPLES} held-out queries")
        searcher = Searcher(corpus, out / "bayes", SearchConfig(top_k=5))
        for row in corpus.rows_of("dev")[:EXAMPLES]:
            query = corpus.queries.texts[row]
            console.print(hits_table(query, searcher.search(query), searcher))
        console.print(terminal_table(summary))
        say(f"Figure: {out / 'evaluation' / 'recall.png'}")
