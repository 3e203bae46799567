"""Fine-tune the dual-encoder on the scores. `python -m jobs.distill --embeddings DIR --scores DIR --out DIR`."""

from pathlib import Path
from typing import Annotated

import typer

from axn_ray.command import stage_command
from axn_ray.distributed.cluster import join_cluster
from axn_ray.distributed.distill import DistillConfig, distill


def run(
    config: DistillConfig,
    embeddings: Annotated[Path, typer.Option(help="artifact of the embed stage")],
    scores: Annotated[Path, typer.Option(help="artifact of the score stage")],
    out: Annotated[Path, typer.Option(help="dual-encoder folder to write")],
    storage: Annotated[Path, typer.Option(help="checkpoints; the same folder again resumes")] = Path("runs/train"),
) -> None:
    """Teach the dual-encoder the observed scores; then embed with it and factorize the same scores."""
    join_cluster()
    distill(config, embeddings, scores, out, storage)
    print(out)


command = stage_command(DistillConfig, run)

if __name__ == "__main__":
    typer.run(command)
