"""What an evaluation says about its data, in plain sentences. `python -m jobs.advise DIR --recall 0.8 --k 10`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from axn_ray.command import stage_command
from axn_ray.core.advice import AdviceConfig, advise
from axn_ray.core.evaluation_store import load_evaluation
from axn_ray.errors import InputError


def run(
    config: AdviceConfig,
    evaluation: Annotated[Path, typer.Argument(help="artifact of the evaluate stage, on test queries")],
) -> None:
    """Say which method and budget reach a recall on these data at the least cost, and when less would do."""
    read = load_evaluation(evaluation)
    if read.baseline is None:
        raise InputError(f"{evaluation} chose settings on dev queries; evaluate on test queries with --choice {evaluation}")
    for sentence in advise(read.summary, read.manifest.counts, config):
        Console(highlight=False).print(sentence, soft_wrap=True, markup=False)


command = stage_command(AdviceConfig, run)

if __name__ == "__main__":
    typer.run(command)
