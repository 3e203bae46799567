"""The front door: items and queries come in from files and are checked once.

Inside, an item or a query is its row number (int32); string ids live here and in results only. Knows no model.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from axn_ray.errors import InputError

SPLITS = ("train", "dev", "test")
BLOCK_BYTES = 1 << 26  # of JSONL at once, and so the most that a line may have
TEMPLATE = "{title}: {text}"  # what the encoders read of an item that has a title


def _check_column(what: str, name: str, values: Sequence[str | None]) -> None:
    for row, value in enumerate(values):
        if value is None or not value.strip():
            raise InputError(f"{what}: {name} of row {row} is empty; remove the row or fill it in")


def _check_unique(what: str, ids: Sequence[str]) -> dict[str, int]:
    index: dict[str, int] = {}
    for row, value in enumerate(ids):
        if value in index:
            raise InputError(f"{what}: id {value!r} stands in rows {index[value]} and {row}; ids must be unique")
        index[value] = row
    return index


def _fingerprint(columns: Sequence[Sequence[str]]) -> str:
    digest = hashlib.sha256()
    for column in columns:
        for value in column:
            encoded = value.encode()
            digest.update(len(encoded).to_bytes(4, "little") + encoded)
        digest.update(b"\xff\xff\xff\xff")
    return digest.hexdigest()


@dataclass(frozen=True)
class Items:
    """The items to search among; an item's index is its row. `columns` holds what else is known of them, as text.

    Raises:
        InputError: no rows, a duplicate id or an empty text.
    """

    ids: tuple[str, ...]
    titles: tuple[str, ...]
    texts: tuple[str, ...]
    source: str = field(default="items", compare=False)
    columns: Mapping[str, pa.ChunkedArray] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if not self.ids:
            raise InputError(f"{self.source} holds no items; check the file and the world filter")
        _check_column(self.source, "text", self.texts)
        _ = self.index_of

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def index_of(self) -> dict[str, int]:
        """Item id -> item index."""
        return _check_unique(self.source, self.ids)

    @cached_property
    def full_texts(self) -> list[str]:
        """What the encoders read, one string per item: `title: text`, or the text alone where there is no title."""
        pairs = zip(self.titles, self.texts, strict=True)
        return [TEMPLATE.format(title=title, text=text) if title else text for title, text in pairs]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over ids, titles and texts in order."""
        return _fingerprint([self.ids, self.titles, self.texts])

    def match(self, wanted: Mapping[str, Sequence[str]]) -> npt.NDArray[np.bool_]:
        """Mask (n_items,) of the items that hold, in every column named, one of the values wanted there.

        Raises:
            InputError: no such column.
        """
        matches = np.ones(len(self), dtype=np.bool_)
        for name, values in wanted.items():
            if name not in self.columns:
                known = ", ".join(sorted(self.columns)) or "none"
                raise InputError(f"the items have no column {name!r} to filter by; their columns: {known}")
            matches &= pc.is_in(self.columns[name], value_set=pa.array(values, pa.string())).to_numpy()
        return matches


@dataclass(frozen=True)
class Queries:
    """The queries of one job; a query's index is its row. `labels` holds the ids of the human-labelled items.

    Raises:
        InputError: no rows, a duplicate id or an empty text.
    """

    ids: tuple[str, ...]
    texts: tuple[str, ...]
    labels: tuple[str, ...] | None = None
    source: str = field(default="queries", compare=False)

    def __post_init__(self) -> None:
        if not self.ids:
            raise InputError(f"{self.source} holds no queries; check the file, the world and the split")
        _check_column(self.source, "text", self.texts)
        _ = self.index_of

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def index_of(self) -> dict[str, int]:
        """Query id -> query index."""
        return _check_unique(self.source, self.ids)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over ids and texts in order."""
        return _fingerprint([self.ids, self.texts])

    def take(self, rows: Sequence[int]) -> "Queries":
        """The queries at the given rows, in that order."""
        labels = None if self.labels is None else tuple(self.labels[r] for r in rows)
        return Queries(tuple(self.ids[r] for r in rows), tuple(self.texts[r] for r in rows), labels, self.source)


def read_table(path: Path) -> pa.Table:
    """Read a Parquet, JSONL or TSV file (by its ending) as a table.

    A TSV file holds nothing but text, whatever it looks like: `007` and `2020-01-02` stay as they are.

    Raises:
        InputError: no such file, an ending that is none of these, or a damaged file.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist; check the path")
    try:
        match path.suffix:
            case ".parquet":
                return pa.parquet.read_table(path)
            case ".jsonl":
                return _read_jsonl(path)
            case ".tsv":
                return _read_tsv(path)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path} cannot be read as {path.suffix[1:]} ({reason}); it may be truncated, write it again") from error
    raise InputError(f"{path} ends in {path.suffix!r}; give a .parquet, .jsonl or .tsv file")


def _read_jsonl(path: Path) -> pa.Table:
    """As Arrow infers it, but for what looks like dates: JSON has none, so these were text."""
    blocks = pa.json.ReadOptions(block_size=BLOCK_BYTES)
    table = pa.json.read_json(path, blocks)
    dates = [(field.name, pa.string()) for field in table.schema if pa.types.is_temporal(field.type)]
    if dates:
        table = pa.json.read_json(path, blocks, pa.json.ParseOptions(explicit_schema=pa.schema(dates)))
    return table


def _read_tsv(path: Path) -> pa.Table:
    layout = pa.csv.ParseOptions(delimiter="\t", quote_char=False)
    with pa.csv.open_csv(path, parse_options=layout) as reader:
        kinds = dict.fromkeys(reader.schema.names, pa.string())
    return pa.csv.read_csv(path, parse_options=layout, convert_options=pa.csv.ConvertOptions(column_types=kinds))


def read_texts(table: pa.Table, path: Path, name: str) -> pa.ChunkedArray:
    """A column as text, null where it is empty.

    Raises:
        InputError: no such column, or one of numbers with fractions or of no plain values.
    """
    if name not in table.column_names:
        raise InputError(f"{path} has no column {name!r} (it has {', '.join(table.column_names)}); rename or add it")
    values = table[name]
    if pa.types.is_floating(values.type):  # as pandas writes a column without a value
        values = pc.if_else(pc.is_nan(values), None, values)
        if values.null_count == len(values):
            return pa.nulls(len(values), pa.string())
    if pa.types.is_floating(values.type) or pa.types.is_nested(values.type):
        raise InputError(f"{path}: column {name!r} holds {values.type} values; write them as text")
    try:
        return values.cast(pa.string())
    except pa.ArrowException as error:
        raise InputError(f"{path}: column {name!r} holds {values.type} values that are no text; write them in UTF-8") from error


def _in_worlds(table: pa.Table, path: Path, worlds: Sequence[str]) -> pa.Table:
    """Rows whose world is one of `worlds` or below it: `verb` takes in `verb.motion`."""
    if "world" not in table.column_names:
        raise InputError(f"{path} has no column 'world'; drop the world filter or add the column")
    keep, own = None, read_texts(table, path, "world")
    for world in worlds:
        hit = pc.or_(pc.equal(own, world), pc.starts_with(own, world + "."))
        keep = hit if keep is None else pc.or_(keep, hit)
    kept = table.filter(keep)
    if not kept.num_rows:
        known = ", ".join(sorted(set(own.drop_null().to_pylist()))[:8])
        raise InputError(f"{path} has no rows in the worlds {', '.join(worlds)}; it has {known}, …")
    return kept


def _columns(table: pa.Table, path: Path, names: Sequence[str]) -> list[tuple[str, ...]]:
    return [tuple(read_texts(table, path, name).to_pylist()) for name in names]


def read_items(path: Path, worlds: Sequence[str] = ()) -> Items:
    """Read items from columns `item_id, text` and, where it exists, `title`; others are kept where they are plain values.

    Raises:
        InputError: see `read_table` and `Items`; a missing column; a world that has no rows.
    """
    table = read_table(path)
    if worlds:
        table = _in_worlds(table, path, worlds)
    ids, texts = _columns(table, path, ["item_id", "text"])
    _check_column(str(path), "item_id", ids)
    titles = tuple(t or "" for t in _columns(table, path, ["title"])[0]) if "title" in table.column_names else ("",) * len(ids)
    others = {name: table[name] for name in table.column_names if name not in ("item_id", "title", "text")}
    columns = {name: values.cast(pa.string()) for name, values in others.items() if _is_plain(values.type)}
    return Items(ids, titles, texts, str(path), columns)


def _is_plain(kind: pa.DataType) -> bool:
    return any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_integer, pa.types.is_boolean))


def read_queries(path: Path, worlds: Sequence[str] = (), split: str | None = None) -> Queries:
    """Read queries from columns `query_id, text` and, where they exist, `item_id` (label), `world` and `split`.

    Raises:
        InputError: see `read_table` and `Queries`; a missing column; a world or split that has no rows.
    """
    table = read_table(path)
    if worlds:
        table = _in_worlds(table, path, worlds)
    if split is not None:
        if "split" not in table.column_names:
            raise InputError(f"{path} has no column 'split'; add one with the values {', '.join(SPLITS)}")
        table = table.filter(pc.equal(read_texts(table, path, "split"), split))
        if not table.num_rows:
            raise InputError(f"{path} has no queries in the split {split!r}; its splits are named {', '.join(SPLITS)}")
    ids, texts = _columns(table, path, ["query_id", "text"])
    _check_column(str(path), "query_id", ids)
    labels = _columns(table, path, ["item_id"])[0] if "item_id" in table.column_names else None
    return Queries(ids, texts, labels, str(path))
