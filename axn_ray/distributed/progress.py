"""One progress bar for every stage: what is being done, how far, how fast, how long still."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")
LOG_EVERY = 0.1


def track(results: Iterable[T], total: int, description: str, size: Callable[[T], int] = lambda _: 1) -> Iterator[T]:
    """Pass `results` on while a bar on stderr advances by their `size` towards `total`; a plain line where no terminal is."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:>12}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    shown = 0.0
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(description, total=total, rate="")
        for result in results:
            progress.advance(task, size(result))
            state = progress.tasks[0]
            elapsed = state.elapsed or 0.0
            rate = f"{state.completed / elapsed:,.0f}/s" if elapsed else ""
            progress.update(task, rate=rate)
            done = state.completed / max(1, total)
            if not console.is_terminal and (done - shown >= LOG_EVERY or done >= 1 > shown):
                shown = done
                console.print(f"{description}: {state.completed:,.0f}/{total:,} after {elapsed:.0f} s {rate}", highlight=False)
            yield result
