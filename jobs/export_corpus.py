"""An imported corpus as a BEIR folder. `python -m jobs.export_corpus DIR --out FOLDER`."""

from pathlib import Path
from typing import Annotated

import typer

from axn_ray.command import one_sentence_errors
from axn_ray.core.corpus_export import export_corpus


def command(
    corpus: Annotated[Path, typer.Argument(help="folder that the import stage wrote")],
    out: Annotated[Path, typer.Option(help="folder to write")],
) -> None:
    """Export an imported corpus as a BEIR folder: corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv."""
    with one_sentence_errors():
        export_corpus(corpus, out)
        print(out)


if __name__ == "__main__":
    typer.run(command)
