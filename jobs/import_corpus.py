"""A corpus from elsewhere, for the embed stage. `python -m jobs.import_corpus FOLDER --out DIR`."""

from pathlib import Path
from typing import Annotated

import typer

from axn_ray.command import stage_command
from axn_ray.core.corpus_import import ImportCorpusConfig, import_corpus


def run(
    config: ImportCorpusConfig,
    source: Annotated[Path, typer.Argument(help="BEIR, MS MARCO or ZESHEL folder, or a table of items (.parquet, .jsonl, .tsv)")],
    out: Annotated[Path, typer.Option(help="folder to write: items.parquet, queries.parquet, qrels.parquet, quarantine.jsonl")],
) -> None:
    """Import a corpus; lines that cannot be used go to quarantine.jsonl with their place and the reason."""
    import_corpus(source, config, out)
    print(out)


command = stage_command(ImportCorpusConfig, run)

if __name__ == "__main__":
    typer.run(command)
