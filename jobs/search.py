"""Search once with the live cross-encoder. `python -m jobs.search "he [ran] home" --embeddings DIR --factorization DIR`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from axn_ray.command import stage_command
from axn_ray.core.embedded_corpus import load_embedded_corpus
from axn_ray.core.searcher import SearchConfig, Searcher, hits_table


def run(
    config: SearchConfig,
    query: Annotated[str, typer.Argument(help="the query's text")],
    embeddings: Annotated[Path, typer.Option(help="artifact of the embed stage")],
    factorization: Annotated[Path, typer.Option(help="artifact of the factorize stage")],
) -> None:
    """Find the items that the cross-encoder ranks highest for one query, under an exact budget of its calls."""
    searcher = Searcher(load_embedded_corpus(embeddings), factorization, config)
    Console().print(hits_table(query, searcher.search(query), searcher))


command = stage_command(SearchConfig, run)

if __name__ == "__main__":
    typer.run(command)
