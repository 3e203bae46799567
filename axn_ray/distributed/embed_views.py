"""Runs encoders over all items on Ray Data, once per encoder and text, and freezes each view as a `view` artifact."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class _Pass:
    """An encoder over one text of each item."""

    encoder: Encoder
    model: str
    texts: list[str]
    dim: int


class _LayerActor:
    """One encoder in one process; looks at a range of texts at a time."""

    def __init__(self, encoder: Encoder, model: str, layers: list[int], texts: list[Any], threads: int) -> None:
        torch.set_num_threads(threads)
        self._encoder, self._layers = LayerEncoder(encoder, model), layers
        self._texts: Sequence[str] = ray.get(texts[0])

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        start, stop = int(batch["start"][0]), int(batch["stop"][0])
        return {"row": np.arange(start, stop), "views": self._encoder.embed(self._texts[start:stop], self._layers)}


def embed_views(
    items: Items, views: Sequence[View], models: Mapping[Encoder, str], folder: Path, *, workers: int, threads: int = 1
) -> list[Path]:
    """The artifacts of these views below `folder`, in their order; `models` names those of `de` and `ce`.

    An artifact's folder is named by the view and by what it is made from; one that is there is not made again.

    Raises:
        InputError, ModelError: see `View.texts` and `LayerEncoder`; a worker's come wrapped.
    """
    places: dict[View, Path] = {}
    for (encoder, _), group in groupby(sorted(views, key=_pass_of), key=_pass_of):
        same, model = list(group), models[encoder]
        texts = same[0].texts(items)
        fingerprint, dim, layers = ray.get(ray.remote(num_gpus=gpus_per_worker())(_inspect).remote(encoder, model, same))
        made_from = {"items": items.fingerprint, "encoder": fingerprint}
        missing: list[tuple[Path, int, Manifest]] = []
        for view, layer in zip(same, layers, strict=True):
            config = {"encoder": encoder, "model": model, "layer": layer, "of_title": view.of_title}
            places[view] = folder / f"{view.name}-{hash_json([config, made_from])[:12]}"
            if not (places[view] / MANIFEST).exists():
                counts = {"items": len(items), "dim": dim}
                missing.append((places[view], layer, Manifest(kind=KIND, config=config, counts=counts, made_from=made_from)))
        if missing:
            _look(_Pass(encoder, model, texts, dim), missing, workers, threads)
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


def _pass_of(view: View) -> tuple[Encoder, bool]:
    return view.encoder, view.of_title


def _inspect(encoder: Encoder, model: str, views: Sequence[View]) -> tuple[str, int, list[int]]:
    """The encoder's hash and dimension and the views' layers, read once where the actors will run."""
    opened = LayerEncoder(encoder, model)
    return opened.fingerprint, opened.dim, [opened.read_layer(view) for view in views]


def _look(seen: _Pass, missing: list[tuple[Path, int, Manifest]], workers: int, threads: int) -> None:
    """One pass of the encoder over the items; writes the artifacts of all its views."""
    ranges = split_evenly(len(seen.texts), SHARD_ROWS)
    shards = ray.data.from_items([{"start": r.start, "stop": r.stop} for r in ranges], override_num_blocks=len(ranges))
    looked = shards.map_batches(
        _LayerActor,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(ranges))),
        num_gpus=gpus_per_worker(),
        fn_constructor_kwargs={
            "encoder": seen.encoder,
            "model": seen.model,
            "layers": [layer for _, layer, _ in missing],
            "texts": [ray.put(seen.texts)],  # in a list, so that Ray hands over the reference and not the value
            "threads": threads,
        },
    )
    with ExitStack() as stack:
        folders = [stack.enter_context(new_artifact(folder, manifest)) for folder, _, manifest in missing]
        shape = len(seen.texts), seen.dim
        raws = [np.lib.format.open_memmap(folder / RAW, mode="w+", dtype=np.float32, shape=shape) for folder in folders]
        batches = looked.iter_batches(batch_size=None, batch_format="numpy")
        names = ", ".join(folder.name.rpartition("-")[0] for folder, _, _ in missing)
        for batch in track(batches, len(seen.texts), f"views {names}", size=lambda b: len(b["row"])):
            for at, raw in enumerate(raws):
                raw[batch["row"]] = batch["views"][:, at]
        for folder, raw in zip(folders, raws, strict=True):
            save_view(folder, raw)
            (folder / RAW).unlink()
