"""Stage 4: recall against exact truth. `python -m jobs.evaluate --embeddings DIR --truth DIR --mf-ind DIR --out DIR`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from axn_ray.command import stage_command
from axn_ray.core.report import terminal_table
from axn_ray.distributed.cluster import join_cluster
from axn_ray.distributed.evaluate import EvaluateConfig
from axn_ray.distributed.examine import examine


def run(
    config: EvaluateConfig,
    embeddings: Annotated[Path, typer.Option(help="artifact of the embed stage")],
    out: Annotated[Path, typer.Option(help="artifact to write: rows, table, figures, TREC runs, report.html")],
    truth: Annotated[
        Path | None,
        typer.Option(help="scores of every pair (--choice all), scored first where they are not there; default: OUT_truth"),
    ] = None,
    mf_trns: Annotated[Path | None, typer.Option(help="artifact of the factorize stage, method mf_trns")] = None,
    mf_ind: Annotated[Path | None, typer.Option(help="artifact of the factorize stage, method mf_ind")] = None,
    bayes: Annotated[Path | None, typer.Option(help="artifact of the factorize stage, method bayes")] = None,
    dense_rows: Annotated[
        Path | None, typer.Option(help="scores of every item (--choice all) for train queries, for ANNCUR and ADACUR")
    ] = None,
    choice: Annotated[Path | None, typer.Option(help="an evaluation made with --choose, whose settings are to be judged")] = None,
) -> None:
    """Compare search methods at equal budgets with the exact cross-encoder top-k: table, figures, runs and a report."""
    join_cluster()
    given = {"mf_trns": mf_trns, "mf_ind": mf_ind, "bayes": bayes}
    fitted = {name: path for name, path in given.items() if path}
    summary = examine(config, embeddings, truth, fitted, out, dense_rows, choice)
    Console(width=None if Console().is_terminal else 160).print(terminal_table(summary))
    print(out / "report.html")


command = stage_command(EvaluateConfig, run)

if __name__ == "__main__":
    typer.run(command)
