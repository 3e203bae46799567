"""Scores you already have become an artifact. `python -m jobs.import_scores FILE --embeddings DIR --model NAME --out DIR`."""

from pathlib import Path
from typing import Annotated

import typer

from axn_ray.command import stage_command
from axn_ray.core.artifact import locate_folder
from axn_ray.core.embedded_corpus import load_embedded_corpus
from axn_ray.core.score_import import ImportScoresConfig, import_scores


def run(
    config: ImportScoresConfig,
    source: Annotated[str, typer.Argument(help="Parquet file with ids and scores, or a TREC run (.gz, too)")],
    embeddings: Annotated[Path, typer.Option(help="artifact of the embed stage: the queries and items that the ids name")],
    out: Annotated[str, typer.Option(help="artifact to write")],
) -> None:
    """Import scores from a Parquet file or a TREC run; rows that cannot be used go to quarantine.jsonl with the reason."""
    import_scores(load_embedded_corpus(embeddings), locate_folder(source), config, locate_folder(out))
    print(out)


command = stage_command(ImportScoresConfig, run)

if __name__ == "__main__":
    typer.run(command)
