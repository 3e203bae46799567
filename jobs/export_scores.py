"""Scores as files for others: TREC runs and training sets. `python -m jobs.export_scores DIR --format trec --out FILE`."""

from pathlib import Path
from typing import Annotated

import typer

from axn_ray.command import stage_command
from axn_ray.core.artifact import locate_folder
from axn_ray.core.embedded_corpus import load_embedded_corpus
from axn_ray.core.score_export import ExportScoresConfig, export_scores
from axn_ray.core.score_store import load_scores


def run(
    config: ExportScoresConfig,
    scores: Annotated[str, typer.Argument(help="artifact of the score stage, or imported")],
    out: Annotated[str, typer.Option(help="file to write")],
    embeddings: Annotated[Path | None, typer.Option(help="artifact of the embed stage; training sets need its texts")] = None,
) -> None:
    """Export scores as a TREC run, or as a training set for sentence-transformers (Parquet)."""
    corpus = load_embedded_corpus(embeddings) if embeddings is not None else None
    export_scores(load_scores(locate_folder(scores)), config, locate_folder(out), corpus)
    print(out)


command = stage_command(ExportScoresConfig, run)

if __name__ == "__main__":
    typer.run(command)
