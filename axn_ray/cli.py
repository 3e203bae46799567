"""The `axn` command: the stages of `jobs`, under one name."""

import typer

import axn_ray
from jobs import (
    advise,
    distill,
    embed,
    evaluate,
    export_corpus,
    export_scores,
    factorize,
    import_corpus,
    import_scores,
    score,
    search,
    serve,
    train_cross_encoder,
)
from jobs import demo as demo_job

app = typer.Typer(
    help="Find the items a cross-encoder would rank first, at the price of a hundred of its calls.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        print(axn_ray.__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None: ...


app.command("demo")(demo_job.command)
app.command("import")(import_corpus.command)
app.command("export")(export_corpus.command)
app.command("embed")(embed.command)
app.command("score")(score.command)
app.command("import-scores")(import_scores.command)
app.command("export-scores")(export_scores.command)
app.command("distill")(distill.command)
app.command("factorize")(factorize.command)
app.command("search")(search.command)
app.command("serve")(serve.command)
app.command("evaluate")(evaluate.command)
app.command("advise")(advise.command)
app.command("train-cross-encoder")(train_cross_encoder.command)


def main() -> None:
    """Entry point."""
    app()


if __name__ == "__main__":
    main()
