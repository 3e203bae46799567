"""Corpora as others keep them: BEIR folders, the same in Parquet, MS MARCO, ZESHEL, any table, TREC qrels.

Each is read line by line, whatever its size. A `Record` has the names of this project, or the reason why it has nothing.
"""

import gzip
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet

from axn_ray.errors import InputError

BATCH_ROWS = 4096
ZESHEL_SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Record:
    """One line or row: where it stands, its values by name, and what is wrong with it, if anything."""

    place: str
    values: Mapping[str, Any] = field(default_factory=dict)
    wrong: str = ""

    def renamed(self, names: Mapping[str, str], **more: Any) -> "Record":
        """The values under new names (old -> new), and more of them."""
        return Record(self.place, {new: self.values.get(old) for old, new in names.items()} | more, self.wrong)


Records = Iterable[Record]


@dataclass(frozen=True)
class CorpusSource:
    """Three streams of records.

    Items have `item_id, text[, title, world]`, queries `query_id, text[, item_id, world, split]`, judgements `query_id,
    item_id, relevance[, split]`.
    """

    items: Records
    queries: Records
    qrels: Records


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def _text_lines(path: Path) -> Iterator[tuple[str, str | None]]:
    """Each line's place and text, None where it is not UTF-8.

    Raises:
        InputError: no such file, or a damaged one.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist; check the path and the format")
    try:
        with _open(path) as stream:
            for number, line in enumerate(stream, start=1):
                try:
                    yield f"{path.name}:{number}", line.decode().rstrip("\r\n")
                except UnicodeDecodeError:
                    yield f"{path.name}:{number}", None
    except (OSError, EOFError) as error:
        raise InputError(f"{path} cannot be read ({error}); it may be truncated, fetch it again") from error


def read_jsonl(path: Path) -> Iterator[Record]:
    """A record for each line that is not blank."""
    for place, line in _text_lines(path):
        if line is None:
            yield Record(place, wrong="the line is not UTF-8")
            continue
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError as error:
            yield Record(place, wrong=f"no JSON ({error})")
            continue
        yield Record(place, values) if isinstance(values, dict) else Record(place, wrong="the line holds no JSON object")


def read_tsv(path: Path, names: Sequence[str] | None = None) -> Iterator[Record]:
    """A record for each line; without `names` the first line has them."""
    for place, line in _text_lines(path):
        fields = None if line is None else line.split("\t")
        if names is None:
            names = fields or [""]
        elif fields is None:
            yield Record(place, wrong="the line is not UTF-8")
        elif len(fields) != len(names):
            yield Record(place, wrong=f"{len(fields)} fields, {len(names)} are due ({', '.join(names)})")
        else:
            yield Record(place, dict(zip(names, fields, strict=True)))


def read_parquet(paths: Iterable[Path]) -> Iterator[Record]:
    """A record for each row of some files.

    Raises:
        InputError: a damaged file.
    """
    for path in paths:
        try:
            row = 0
            for batch in pa.parquet.ParquetFile(path).iter_batches(batch_size=BATCH_ROWS):
                for values in batch.to_pylist():
                    row += 1
                    yield Record(f"{path.name}:{row}", values)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path} cannot be read as parquet ({str(error).splitlines()[0]}); write it again") from error


def read_any(path: Path) -> Iterator[Record]:
    """A table by its ending: .parquet, .jsonl, .tsv, or either of the last two with .gz.

    Raises:
        InputError: another ending, no such file, a damaged one.
    """
    ending = path.name.removesuffix(".gz").rpartition(".")[2]
    readers: dict[str, Callable[[Path], Iterator[Record]]] = {
        "parquet": lambda one: read_parquet([one]),
        "jsonl": read_jsonl,
        "json": read_jsonl,
        "tsv": read_tsv,
    }
    if ending not in readers:
        raise InputError(f"{path} ends in .{ending}; give .parquet, .jsonl or .tsv")
    if not path.is_file():
        raise InputError(f"{path} does not exist; check the path")
    return readers[ending](path)


def read_qrels(path: Path, split: str | None = None) -> Iterator[Record]:
    """TREC qrels (`query 0 item relevance`, any blanks between), or BEIR's three columns with a header line."""
    for place, line in _text_lines(path):
        fields = [] if line is None else line.split()
        if len(fields) == 3:
            fields.insert(1, "0")
        if fields[:1] == ["query-id"] or fields[:1] == ["query_id"] or (line is not None and not fields):
            continue
        if len(fields) != 4 or not fields[3].lstrip("+-").isdecimal():
            yield Record(place, wrong="no judgement: query, 0, item and a whole number are due")
            continue
        yield Record(place, {"query_id": fields[0], "item_id": fields[2], "relevance": int(fields[3]), "split": split})


def beir(folder: Path) -> CorpusSource:
    """`corpus.jsonl`, `queries.jsonl` and `qrels/SPLIT.tsv`, or the same in Parquet as the Hugging Face hub has it."""
    corpus, queries = _tables(folder, "corpus"), _tables(folder, "queries")
    return CorpusSource(
        items=(r.renamed({"_id": "item_id", "title": "title", "text": "text"}) for r in corpus),
        queries=(r.renamed({"_id": "query_id", "text": "text"}) for r in queries),
        qrels=_beir_qrels(folder),
    )


def _tables(folder: Path, name: str) -> Iterator[Record]:
    for file in (folder / f"{name}.jsonl", folder / f"{name}.jsonl.gz"):
        if file.is_file():
            return read_jsonl(file)
    parts = sorted([*folder.glob(f"{name}*.parquet"), *folder.glob(f"{name}/*.parquet")])
    if not parts:
        raise InputError(f"{folder} has neither {name}.jsonl nor {name}/*.parquet, so it is no BEIR folder; name its format")
    return read_parquet(parts)


def _beir_qrels(folder: Path) -> Iterator[Record]:
    for path in sorted(folder.glob("qrels/*.tsv")):
        yield from read_qrels(path, _split_of(path.stem))
    names = {"query-id": "query_id", "corpus-id": "item_id", "score": "relevance"}
    for path in sorted([*folder.glob("qrels/*.parquet"), *folder.glob("default/*.parquet")]):
        split = _split_of(path.stem.partition("-")[0])
        for record in read_parquet([path]):
            yield record.renamed(names, split=split)


def _split_of(name: str) -> str | None:
    """The split that a file's name means."""
    return {"train": "train", "dev": "dev", "val": "dev", "validation": "dev", "test": "test"}.get(name)


def ms_marco(folder: Path) -> CorpusSource:
    """`collection.tsv`, `queries.SPLIT.tsv` and `qrels.SPLIT.tsv`, as the passage ranking task hands them out."""

    def each(prefix: str) -> Iterator[tuple[Path, str | None]]:
        for path in sorted([*folder.glob(f"{prefix}.*.tsv"), *folder.glob(f"{prefix}.*.tsv.gz")]):
            yield path, _split_of(path.name.split(".")[1])

    def find_collection() -> Path:
        zipped = folder / "collection.tsv.gz"
        return zipped if zipped.is_file() else folder / "collection.tsv"

    return CorpusSource(
        items=read_tsv(find_collection(), ["item_id", "text"]),
        queries=(record for path, _ in each("queries") for record in read_tsv(path, ["query_id", "text"])),
        qrels=(record for path, split in each("qrels") for record in read_qrels(path, split)),
    )


def zeshel(folder: Path, context_words: int) -> CorpusSource:
    """`documents/WORLD.json` and `mentions/SPLIT.json`; a query is a mention between [START] and [END] in its context."""
    worlds = sorted((folder / "documents").glob("*.json"))
    return CorpusSource(
        items=(
            record.renamed({"document_id": "item_id", "title": "title", "text": "text"}, world=path.stem)
            for path in worlds
            for record in read_jsonl(path)
        ),
        queries=_zeshel_queries(folder, worlds, context_words),
        qrels=(),
    )


def _zeshel_queries(folder: Path, worlds: Sequence[Path], context_words: int) -> Iterator[Record]:
    """Mentions stay in memory, and of the documents the one that is read."""
    waiting: dict[tuple[str, str], list[Record]] = {}
    for split in ZESHEL_SPLITS:
        path = folder / "mentions" / f"{split}.json"
        for record in read_jsonl(path) if path.is_file() else ():
            if record.wrong:
                yield record
            else:
                where = str(record.values.get("corpus")), str(record.values.get("context_document_id"))
                waiting.setdefault(where, []).append(record)
    for path in worlds:
        for document in read_jsonl(path):
            for mention in waiting.pop((path.stem, str(document.values.get("document_id"))), ()):
                yield _query_of(mention, str(document.values.get("text", "")).split(), context_words)
    for mentions in waiting.values():
        for mention in mentions:
            yield Record(mention.place, wrong="its context document is not there")


def _query_of(mention: Record, words: Sequence[str], context_words: int) -> Record:
    try:
        start, end = int(mention.values["start_index"]), int(mention.values["end_index"])
    except (KeyError, TypeError, ValueError):
        return Record(mention.place, wrong="no start_index and end_index")
    if not 0 <= start <= end < len(words):
        return Record(mention.place, wrong=f"words {start} to {end} are not in its context document of {len(words)} words")
    left, right = words[max(0, start - context_words) : start], words[end + 1 : end + 1 + context_words]
    text = " ".join([*left, "[START]", *words[start : end + 1], "[END]", *right])
    names = {"mention_id": "query_id", "label_document_id": "item_id", "corpus": "world"}
    return mention.renamed(names, text=text)


def table(records: Records, id_column: str, text: str, new_id: str) -> Iterator[Record]:
    """Rows of any table: `text` is a column's name or a template of columns (`{title}. {abstract}`)."""
    template = text if "{" in text else "{" + text + "}"
    for record in records:
        if record.wrong:
            yield record
            continue
        present = {name: "" if value is None else value for name, value in record.values.items()}
        try:
            filled = template.format_map(present)
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            yield Record(record.place, wrong=f"the text {template!r} needs {error}, the row has {', '.join(present)}")
            continue
        kept = {name: record.values[name] for name in ("title", "world", "item_id", "split") if name in record.values}
        yield Record(record.place, {**kept, new_id: record.values.get(id_column), "text": filled})
