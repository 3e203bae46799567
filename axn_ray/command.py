"""Turns a stage's config model into command-line flags, and errors into one sentence. Knows no stage.

Every field of the config is a flag; `--config FILE` reads the same names from YAML, and flags win over it.
"""

import inspect
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Optional, TypeVar, get_origin

import ray.exceptions
import transformers
import typer
import yaml
from pydantic import BaseModel, SecretStr, ValidationError
from rich.console import Console
from rich.logging import RichHandler

from axn_ray.errors import AxnError, InputError

C = TypeVar("C", bound=BaseModel)


def read_config(model: type[C], path: Path | None, flags: dict[str, Any]) -> C:
    """Merge YAML and flags (flags that were not given are None) into the config.

    Raises:
        InputError: no such file, no mapping, an unknown name or a value that the config refuses.
    """
    values: dict[str, Any] = {}
    if path is not None:
        if not path.is_file():
            raise InputError(f"config file {path} does not exist; check the path")
        try:
            loaded = yaml.safe_load(path.read_text()) or {}
        except yaml.YAMLError as error:
            raise InputError(f"{path} is not valid YAML ({str(error).splitlines()[0]}); mend it") from error
        if not isinstance(loaded, dict):
            raise InputError(f"{path} must hold `name: value` lines, not a {type(loaded).__name__}; see --help for the names")
        values.update(loaded)
    values.update({name: value for name, value in flags.items() if value not in (None, [])})
    for name, field in model.model_fields.items():
        if values.get(name) is not None and field.annotation == SecretStr | None:
            values[name] = read_secret(name, str(values[name]))
    try:
        return model(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or model.__name__
        raise InputError(f"{name}: {first['msg']} (got {first['input']!r}); see --help for what is allowed") from error


def read_secret(name: str, place: str) -> SecretStr:
    """A secret from `file:PATH` or `env:NAME`; never from the command line or a config file themselves.

    Raises:
        InputError: another form, or nothing is there.
    """
    kind, _, where = place.partition(":")
    if kind not in ("file", "env"):
        raise InputError(f"{name} must be file:PATH or env:NAME, where the secret stands, and never the secret itself")
    path = Path(where)
    found = os.environ.get(where, "") if kind == "env" else path.read_text() if path.is_file() else ""
    if not found.strip():
        raise InputError(f"{name}: nothing stands in {place}; put the secret there")
    return SecretStr(found.strip())


def stage_command(model: type[C], run: Callable[..., None]) -> Callable[..., None]:
    """A Typer command for `run(config, **paths)`: its flags are the config's fields, its paths are `run`'s own."""

    def command(**given: Any) -> None:
        with one_sentence_errors():
            flags = {name: given.pop(name) for name in model.model_fields}
            config = read_config(model, given.pop("config"), flags)
            run(config, **given)

    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter(p.name, keyword, annotation=p.annotation, default=p.default)
        for p in list(inspect.signature(run).parameters.values())[1:]
    ]
    config_flag = Annotated[Path | None, typer.Option(help="YAML file with any of the flags below")]
    parameters.append(inspect.Parameter("config", keyword, annotation=config_flag, default=None))
    for name, field in model.model_fields.items():
        kind: Any = str if field.annotation == SecretStr | None else field.annotation
        kind = kind if get_origin(kind) is not None else Optional[kind]  # noqa: UP045
        default = "" if field.is_required() else f" [default: {field.get_default(call_default_factory=True)}]"
        option = typer.Option(help=(field.description or "") + default, show_default=False)
        parameters.append(inspect.Parameter(name, keyword, annotation=Annotated[kind, option], default=None))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__doc__ = run.__doc__
    return command


class one_sentence_errors:  # noqa: N801 - reads as a statement
    """Context: log to stderr; an `AxnError`, raised here or on a worker, ends the program with one sentence and exit 1."""

    def __enter__(self) -> None:
        handler = RichHandler(console=Console(stderr=True), show_path=False, show_level=False, log_time_format="%X")
        logging.basicConfig(level="WARNING", format="%(message)s", handlers=[handler], force=True)
        logging.getLogger("axn_ray").setLevel("INFO")
        transformers.logging.set_verbosity_error()  # its load reports and bars say nothing that a user of axn needs
        transformers.logging.disable_progress_bar()
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

    def __exit__(self, _: type | None, error: BaseException | None, __: object) -> None:
        known = find_axn_error(error)
        if known is not None:
            sentence = str(known).splitlines()[0]  # Ray appends the worker's traceback
            Console(stderr=True, highlight=False).print(f"error: {sentence}", soft_wrap=True, markup=False)
            sys.exit(1)


def find_axn_error(error: BaseException | None) -> AxnError | None:
    """The `AxnError` behind an error, through Ray's wrappers and chained causes."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else None
        if isinstance(cause, AxnError):
            return cause
        if isinstance(error, AxnError) and not isinstance(error, ray.exceptions.RayError):
            return error
        error = cause or error.__cause__ or error.__context__
    return None
