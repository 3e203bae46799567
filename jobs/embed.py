"""Stage 1: embed items and queries with the dual-encoder. `python -m jobs.embed --out DIR`."""

from pathlib import Path
from typing import Annotated

import typer

from axn_ray.command import stage_command
from axn_ray.distributed.cluster import join_cluster
from axn_ray.distributed.embed import EmbedConfig, embed


def run(config: EmbedConfig, out: Annotated[Path, typer.Option(help="artifact to write")]) -> None:
    """Embed items and queries with a dual-encoder; every later stage starts from the result."""
    join_cluster()
    embed(config, out)
    print(out)


command = stage_command(EmbedConfig, run)

if __name__ == "__main__":
    typer.run(command)
