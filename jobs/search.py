"""Search with the live cross-encoder. `python -m jobs.search "he [ran] home" --embeddings DIR --factorization DIR`.

Or many queries at once: `python -m jobs.search --queries FILE --out run.trec --embeddings DIR --factorization DIR`.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from axn_ray.command import stage_command
from axn_ray.core.corpus import read_queries
from axn_ray.core.embedded_corpus import load_embedded_corpus
from axn_ray.core.searcher import SearchConfig, Searcher, hits_table
from axn_ray.distributed.cluster import join_cluster
from axn_ray.distributed.search import search_queries
from axn_ray.errors import InputError


def run(
    config: SearchConfig,
    embeddings: Annotated[Path, typer.Option(help="artifact of the embed stage")],
    factorization: Annotated[Path, typer.Option(help="artifact of the factorize stage")],
    query: Annotated[str | None, typer.Argument(help="the query's text; or --queries and --out")] = None,
    queries: Annotated[Path | None, typer.Option(help="queries: Parquet, JSONL or TSV with query_id, text")] = None,
    out: Annotated[Path | None, typer.Option(help="TREC run to write, `top_k` lines a query")] = None,
    workers: Annotated[int, typer.Option(help="processes that search --queries", min=1)] = 2,
    threads: Annotated[int, typer.Option(help="CPU threads of each", min=1)] = 1,
) -> None:
    """Find the items that the cross-encoder ranks highest, under an exact budget of its calls."""
    if query is not None and queries is None and out is None:
        searcher = Searcher(load_embedded_corpus(embeddings), factorization, config)
        Console().print(hits_table(query, searcher.search(query), searcher))
    elif query is None and queries is not None and out is not None:
        join_cluster()
        search_queries(read_queries(queries), embeddings, factorization, config, out, workers=workers, threads=threads)
        print(out)
    else:
        raise InputError("give one query's text, or --queries FILE with --out FILE, not both and not half")


command = stage_command(SearchConfig, run)

if __name__ == "__main__":
    typer.run(command)
