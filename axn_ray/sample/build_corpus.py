"""Builds the bundled corpus from the WordNet 3.0 database files (format: wndb(5WN)); the same files, byte for byte.

`python -m axn_ray.sample.build_corpus --wordnet /usr/share/wordnet`. Items are synsets; queries are example sentences
with the mention of one of the synset's lemmas marked by square brackets, so a query is a mention in context and its
label the sense that is meant: the shape of ZESHEL, with lexicographer files for worlds.
"""

import argparse
import hashlib
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from axn_ray.errors import InputError

logger = logging.getLogger(__name__)

# Worlds whose queries may train the cross-encoder: all of them are split "train", the other worlds are held out.
CE_TRAIN_WORLDS = (
    "adj.all", "adj.pert", "adv.all", "noun.act", "noun.attribute", "noun.cognition", "noun.communication", "noun.state",
)  # fmt: skip
LEXNAMES = (
    "adj.all adj.pert adv.all noun.Tops noun.act noun.animal noun.artifact noun.attribute noun.body noun.cognition "
    "noun.communication noun.event noun.feeling noun.food noun.group noun.location noun.motive noun.object noun.person "
    "noun.phenomenon noun.plant noun.possession noun.process noun.quantity noun.relation noun.shape noun.state "
    "noun.substance noun.time verb.body verb.change verb.cognition verb.communication verb.competition verb.consumption "
    "verb.contact verb.creation verb.emotion verb.motion verb.perception verb.possession verb.social verb.stative "
    "verb.weather adj.ppl"
).split()
PARTS = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}
# The detachment rules of morphy(7WN): (suffix, replacement).
SUFFIXES: dict[str, tuple[tuple[str, str], ...]] = {
    "n": (("s", ""), ("ses", "s"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"), ("men", "man"), ("ies", "y")),
    "v": (("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", "")),
    "a": (("er", ""), ("est", ""), ("er", "e"), ("est", "e")),
    "r": (),
}
N_TEST, N_DEV = 100, 50
WORD = re.compile(r"[\w.'’/-]*\w|\w")
EXAMPLE = re.compile(r'"([^"]*)"?')


@dataclass(frozen=True)
class Synset:
    """One synset: its id, world, lemmas, definition and example sentences."""

    item_id: str
    world: str
    pos: str
    lemmas: tuple[str, ...]
    definition: str
    examples: tuple[str, ...]


def split_gloss(gloss: str) -> tuple[str, tuple[str, ...]]:
    """A gloss is `definition; "example"; "example"- source`: -> (definition, examples).

    A quoted word inside the definition is no example: examples start at the first quote that follows a semicolon (or
    opens the gloss).
    """
    start = re.search(r'(?:^|[;:,.)]\s*)"', gloss)
    if start is None:
        return gloss.strip().rstrip(";").strip(), ()
    definition = gloss[: start.start()].strip().rstrip(";").strip()
    if not definition:
        return gloss.strip(), ()
    if gloss[start.start()] in ".)":
        definition += gloss[start.start()]
    examples = [e.strip() for e in EXAMPLE.findall(gloss[start.start() :])]
    return definition, tuple(e for e in examples if e)


def read_lines(path: Path) -> list[str]:
    """Lines of a database file.

    Raises:
        InputError: the file is missing.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist; install WordNet 3.0 (apt-get install wordnet-base) or pass --wordnet")
    return path.read_text(encoding="latin-1").splitlines()


def read_synsets(wordnet: Path) -> Iterator[Synset]:
    """All synsets of the four data files."""
    for part, pos in PARTS.items():
        for line in read_lines(wordnet / f"data.{part}"):
            if line.startswith(" "):
                continue
            fields, _, gloss = line.partition("|")
            head = fields.split()
            n_words = int(head[3], 16)
            words = [re.sub(r"\((a|p|ip)\)$", "", w).replace("_", " ") for w in head[4 : 4 + 2 * n_words : 2]]
            definition, examples = split_gloss(gloss)
            lemmas = tuple(dict.fromkeys(words))
            yield Synset(f"wn30-{pos}-{head[0]}", LEXNAMES[int(head[1])], pos, lemmas, definition, examples)


def read_exceptions(wordnet: Path) -> dict[str, dict[str, set[str]]]:
    """Irregular forms: part of speech -> inflected form -> base forms."""
    exceptions: dict[str, dict[str, set[str]]] = {pos: {} for pos in PARTS.values()}
    for part, pos in PARTS.items():
        for line in read_lines(wordnet / f"{part}.exc"):
            form, *bases = (word.replace("_", " ") for word in line.split())
            exceptions[pos].setdefault(form, set()).update(bases)
    return exceptions


def base_forms(word: str, pos: str, exceptions: dict[str, dict[str, set[str]]]) -> set[str]:
    """Every base form that morphy(7WN) would try for a lower-case word, the word itself included."""
    forms = {word} | exceptions[pos].get(word, set())
    for suffix, replacement in SUFFIXES[pos]:
        if word.endswith(suffix) and len(word) > len(suffix):
            base = word[: len(word) - len(suffix)] + replacement
            forms.add(base)
            if not replacement and len(base) > 2 and base[-1] == base[-2]:
                forms.add(base[:-1])
    return forms


def mark_mention(sentence: str, lemmas: Sequence[str], pos: str, exceptions: dict[str, dict[str, set[str]]]) -> str | None:
    """The sentence with one occurrence of a lemma in square brackets; None where there is none.

    The lemma of most words wins, then the longest one, then the leftmost occurrence: no tie is left to chance.
    """
    words = [(m.start(), m.end(), m.group().lower()) for m in WORD.finditer(sentence)]
    forms = [base_forms(word, pos, exceptions) for _, _, word in words]
    found = [
        (-len(lemma), -sum(map(len, lemma)), first)
        for lemma in (tuple(x.lower().split()) for x in lemmas)
        for first in range(len(words) - len(lemma) + 1)
        if all(part in forms[first + n] for n, part in enumerate(lemma))
    ]
    if not found:
        return None
    minus_length, _, first = min(found)
    start, end = words[first][0], words[first - minus_length - 1][1]
    return f"{sentence[:start]}[{sentence[start:end]}]{sentence[end:]}"


def split_of(query_ids: Sequence[str], world: str) -> dict[str, str]:
    """train, dev or test of the queries of one group of worlds; CE-train worlds are all train."""
    if world in CE_TRAIN_WORLDS:
        return dict.fromkeys(query_ids, "train")
    n_test, n_dev = (N_TEST, N_DEV) if len(query_ids) >= 300 else (len(query_ids) // 3, len(query_ids) // 6)
    order = sorted(query_ids, key=lambda i: hashlib.sha256(i.encode()).digest())
    return {i: "test" if n < n_test else "dev" if n < n_test + n_dev else "train" for n, i in enumerate(order)}


def build(wordnet: Path) -> tuple[pa.Table, pa.Table]:
    """The two tables (items, queries), sorted by world and id."""
    exceptions = read_exceptions(wordnet)
    synsets = sorted(read_synsets(wordnet), key=lambda s: (s.world, s.item_id))
    queries, dropped = [], 0
    for synset in synsets:
        for number, example in enumerate(synset.examples):
            marked = None if "[" in example else mark_mention(example, synset.lemmas, synset.pos, exceptions)
            if marked is None:
                dropped += 1
                continue
            queries.append((f"{synset.item_id}-{number}", marked, synset.item_id, synset.world))
    logger.info("%d synsets, %d queries, %d examples without a lemma of their synset", len(synsets), len(queries), dropped)
    groups: dict[str, list[str]] = {}
    for query_id, _, _, world in queries:
        groups.setdefault("verb" if world.startswith("verb.") else world, []).append(query_id)
    splits = {i: split for world, ids in groups.items() for i, split in split_of(ids, world).items()}
    item_table = pa.table({
        "item_id": [s.item_id for s in synsets],
        "title": [", ".join(s.lemmas) for s in synsets],
        "text": [s.definition for s in synsets],
        "world": [s.world for s in synsets],
    })  # fmt: skip
    columns = list(zip(*queries, strict=True))
    names = ["query_id", "text", "item_id", "world"]
    query_table = pa.table(dict(zip(names, columns, strict=True)) | {"split": [splits[q[0]] for q in queries]})
    return item_table, query_table


def write(table: pa.Table, path: Path) -> None:
    """Write zstd Parquet, first written aside and renamed."""
    aside = path.with_suffix(".tmp")
    pa.parquet.write_table(table, aside, compression="zstd", compression_level=19, row_group_size=1 << 20)
    aside.replace(path)


def main() -> None:
    """Command line."""
    logging.basicConfig(level="INFO", format="%(message)s")
    parser = argparse.ArgumentParser(description="Build the bundled corpus from WordNet 3.0.")
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    try:
        items, queries = build(arguments.wordnet)
    except InputError as error:
        parser.exit(1, f"error: {error}\n")
    write(items, arguments.out / "items.parquet")
    write(queries, arguments.out / "queries.parquet")


if __name__ == "__main__":
    main()
