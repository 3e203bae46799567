"""Train a cross-encoder adapter from labelled pairs. `python -m jobs.train_cross_encoder --out DIR`."""

from pathlib import Path
from typing import Annotated

import typer

from axn_ray.command import stage_command
from axn_ray.distributed.cluster import join_cluster
from axn_ray.distributed.train_cross_encoder import TrainCrossEncoderConfig, train_cross_encoder


def run(
    config: TrainCrossEncoderConfig,
    out: Annotated[Path, typer.Option(help="adapter folder to write")],
    storage: Annotated[Path, typer.Option(help="checkpoints; the same folder again resumes")] = Path("runs/train"),
) -> None:
    """Train a LoRA adapter with a one-logit head: the labelled item against mined and random negatives."""
    join_cluster()
    train_cross_encoder(config, out, storage)
    print(out)


command = stage_command(TrainCrossEncoderConfig, run)

if __name__ == "__main__":
    typer.run(command)
