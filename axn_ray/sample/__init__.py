"""The bundled real corpus (WordNet 3.0), its cross-encoder adapter and its exact scores: names and paths only."""

from pathlib import Path

FOLDER = Path(__file__).parent
ITEMS = FOLDER / "items.parquet"
QUERIES = FOLDER / "queries.parquet"
CROSS_ENCODER = "axn-ray/wordnet-cross-encoder"
CROSS_ENCODER_FOLDER = FOLDER / "cross_encoder"
EXACT_SCORES = FOLDER / "exact_scores"
