"""Stage 2: score query-item pairs with the cross-encoder. `python -m jobs.score --embeddings DIR --out DIR`."""

from pathlib import Path
from typing import Annotated

import typer

from axn_ray.command import stage_command
from axn_ray.core.artifact import locate_folder
from axn_ray.core.embedded_corpus import load_embedded_corpus
from axn_ray.distributed.cluster import join_cluster
from axn_ray.distributed.estimate import estimate
from axn_ray.distributed.score import ScoreConfig, score


def run(
    config: ScoreConfig,
    embeddings: Annotated[Path, typer.Option(help="artifact of the embed stage")],
    out: Annotated[str, typer.Option(help="artifact to write, or an unfinished one to finish; a folder or s3://, gs://, ...")],
    only_estimate: Annotated[bool, typer.Option("--estimate", help="time a sample and say what the run would take")] = False,
    price_per_hour: Annotated[float | None, typer.Option(help="of one worker, for the estimate")] = None,
) -> None:
    """Score query-item pairs with a cross-encoder; a run that was cut off goes on where it stopped."""
    corpus = load_embedded_corpus(embeddings)
    join_cluster()
    if only_estimate:
        print(estimate(corpus, config, locate_folder(out), price_per_hour))
        return
    score(corpus, config, locate_folder(out))
    print(out)


command = stage_command(ScoreConfig, run)

if __name__ == "__main__":
    typer.run(command)
