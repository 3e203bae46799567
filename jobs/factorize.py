"""Stage 3: factorize the score matrix. `python -m jobs.factorize --embeddings DIR --scores DIR --method mf_ind --out DIR`."""

from pathlib import Path
from typing import Annotated

import typer

from axn_ray.command import stage_command
from axn_ray.core.fitting import FactorizationConfig
from axn_ray.distributed.cluster import join_cluster
from axn_ray.distributed.factorize import factorize_scores
from axn_ray.errors import InputError


def run(
    config: FactorizationConfig,
    embeddings: Annotated[Path, typer.Option(help="artifact of the embed stage")],
    scores: Annotated[Path, typer.Option(help="artifact of the score stage")],
    out: Annotated[Path, typer.Option(help="artifact to write")],
    workers: Annotated[int, typer.Option(help="training processes", min=1)] = 1,
    max_workers: Annotated[int | None, typer.Option(help="grow to so many as nodes come, and shrink as they go")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads of each worker", min=1)] = 2,
    storage: Annotated[Path, typer.Option(help="checkpoints; the same folder again resumes")] = Path("runs/train"),
) -> None:
    """Turn the observed scores into one vector per item, starting from the dual-encoder's."""
    if max_workers is not None and max_workers < workers:
        raise InputError(f"max_workers={max_workers} is less than workers={workers}; raise it or leave it out")
    join_cluster()
    num_workers = workers if max_workers in (None, workers) else (workers, max_workers)
    factorize_scores(embeddings, scores, config, out, num_workers=num_workers, threads=threads, storage=storage)
    print(out)


command = stage_command(FactorizationConfig, run)

if __name__ == "__main__":
    typer.run(command)
