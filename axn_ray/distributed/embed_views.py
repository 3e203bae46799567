"""Runs encoders over all items on Ray Data, each once over texts and titles, and freezes each view as a `view` artifact."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray
import torch

from axn_ray.core.artifact import MANIFEST, Manifest, hash_json, new_artifact
from axn_ray.core.closed_form import StoredArray
from axn_ray.core.corpus import Items
from axn_ray.core.embedded_corpus import EmbeddedCorpus
from axn_ray.core.views import KIND, Encoder, LayerEncoder, View, choose_views, load_view, save_view
from axn_ray.distributed.cluster import gpus_per_worker, split_evenly
from axn_ray.distributed.progress import track

logger = logging.getLogger(__name__)

RAW = ".raw.npy"
SHARD_ROWS = 1024


class _Missing(NamedTuple):
    """A view to be made: its folder and manifest, the encoder's layer, and whether the encoder reads titles."""

    folder: Path
    manifest: Manifest
    layer: int
    of_title: bool


class _LayerActor:
    """One encoder in one process; looks at a range of texts or titles at a time."""

    def __init__(self, encoder: Encoder, model: str, layers: list[int], texts: dict[bool, Any], threads: int) -> None:
        torch.set_num_threads(threads)
        self._encoder, self._layers = LayerEncoder(encoder, model), layers
        self._texts: dict[bool, Sequence[str]] = {of_title: ray.get(reference) for of_title, reference in texts.items()}

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        of_title, rows = bool(batch["of_title"][0]), np.arange(batch["start"][0], batch["stop"][0])
        views = self._encoder.embed(self._texts[of_title][rows[0] : rows[-1] + 1], self._layers)
        return {"of_title": np.full(len(rows), of_title), "row": rows, "views": views}


def embed_views(
    items: Items, views: Sequence[View], models: Mapping[Encoder, str], folder: Path, *, workers: int, threads: int = 1
) -> list[Path]:
    """The artifacts of these views below `folder`, in their order; `models` names those of `de` and `ce`.

    An artifact's folder is named by the view and by what it is made from; one that is there is not made again.

    Raises:
        InputError, ModelError: see `View.texts` and `LayerEncoder`; a worker's come wrapped.
    """
    places: dict[View, Path] = {}
    for encoder in sorted({view.encoder for view in views}):
        same, model = [view for view in views if view.encoder == encoder], models[encoder]
        fingerprint, dim, layers = ray.get(ray.remote(num_gpus=gpus_per_worker())(_inspect).remote(encoder, model, same))
        made_from = {"items": items.fingerprint, "encoder": fingerprint}
        missing: list[_Missing] = []
        for view, layer in zip(same, layers, strict=True):
            config = {"encoder": encoder, "model": model, "layer": layer, "of_title": view.of_title}
            places[view] = folder / f"{view.name}-{hash_json([config, made_from])[:12]}"
            if not (places[view] / MANIFEST).exists():
                counts = {"items": len(items), "dim": dim}
                manifest = Manifest(kind=KIND, config=config, counts=counts, made_from=made_from)
                missing.append(_Missing(places[view], manifest, layer, view.of_title))
        if missing:
            texts = {view.of_title: view.texts(items) for view in same}
            needed = {part.of_title: texts[part.of_title] for part in missing}
            _look(encoder, model, needed, missing, dim, workers, threads)
    return [places[view] for view in views]


def open_views(
    names: Sequence[str] | None, corpus: EmbeddedCorpus, cross_encoder: str | None, folder: Path, workers: int, threads: int
) -> list[StoredArray]:
    """The chosen views (n_items, dim) of a corpus, memory-mapped; made first where they are not there.

    Raises:
        InputError, ModelError: see `choose_views` and `embed_views`.
    """
    views = choose_views(names, corpus.items, cross_encoder)
    models: dict[Encoder, str] = {"de": corpus.dual_encoder, "ce": cross_encoder or ""}
    return [load_view(place) for place in embed_views(corpus.items, views, models, folder, workers=workers, threads=threads)]


def _inspect(encoder: Encoder, model: str, views: Sequence[View]) -> tuple[str, int, list[int]]:
    """The encoder's hash and dimension and the views' layers, read once where the actors will run."""
    opened = LayerEncoder(encoder, model)
    return opened.fingerprint, opened.dim, [opened.read_layer(view) for view in views]


def _look(
    encoder: Encoder,
    model: str,
    texts: dict[bool, list[str]],
    missing: list[_Missing],
    dim: int,
    workers: int,
    threads: int,
) -> None:
    """One pass of the encoder over the texts, the titles or both; writes the artifacts of all its views."""
    layers, n_texts = sorted({part.layer for part in missing}), sum(map(len, texts.values()))
    ranges = [
        {"of_title": of_title, "start": r.start, "stop": r.stop}
        for of_title, side in texts.items()
        for r in split_evenly(len(side), SHARD_ROWS)
    ]
    looked = ray.data.from_items(ranges, override_num_blocks=len(ranges)).map_batches(
        _LayerActor,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(workers, -(-n_texts // SHARD_ROWS))),
        num_gpus=gpus_per_worker(),
        fn_constructor_kwargs={
            "encoder": encoder,
            "model": model,
            "layers": layers,
            "texts": {of_title: ray.put(side) for of_title, side in texts.items()},  # handed over as references
            "threads": threads,
        },
    )
    with ExitStack() as stack:
        folders = [stack.enter_context(new_artifact(part.folder, part.manifest)) for part in missing]
        raws = [
            np.lib.format.open_memmap(folder / RAW, mode="w+", dtype=np.float32, shape=(len(texts[part.of_title]), dim))
            for folder, part in zip(folders, missing, strict=True)
        ]
        batches = looked.iter_batches(batch_size=None, batch_format="numpy")
        names = ", ".join(part.folder.name.rpartition("-")[0] for part in missing)
        for batch in track(batches, n_texts, f"views {names}", size=lambda b: len(b["row"])):
            for part, raw in zip(missing, raws, strict=True):
                chosen = batch["of_title"] == part.of_title
                raw[batch["row"][chosen]] = batch["views"][chosen, layers.index(part.layer)]
        for folder, raw in zip(folders, raws, strict=True):
            save_view(folder, raw)
            (folder / RAW).unlink()
