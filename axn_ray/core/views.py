"""Frozen views of the items: a hidden layer of an encoder, averaged over the tokens of an item's text or of its title.

A view is named `ENCODER[LAYER][_title]`: the encoder is the dual-encoder (`de`) or the cross-encoder's own, run on the
item alone (`ce`); the layer is a number, `_half` of them, or the last one where none is named. Knows no score and no Ray.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from axn_ray.core.artifact import read_manifest
from axn_ray.core.causal_cross_encoder import is_causal
from axn_ray.core.corpus import Items
from axn_ray.core.cross_encoder import hash_model, load_adapter_or_model, longest_input
from axn_ray.core.models import choose_device, choose_dtype, load_dual_encoder
from axn_ray.core.tokens import token_budget_batches
from axn_ray.errors import ArtifactError, InputError, ModelError

FloatArray = npt.NDArray[np.float32]
Encoder = Literal["de", "ce"]

logger = logging.getLogger(__name__)

KIND = "view"
DEFAULT_VIEWS = ("de_half", "de_title", "de_half_title", "ce", "ce_half", "ce_title", "ce_half_title")
VIEW = "view.npy"
NAME = re.compile(r"(?P<encoder>de|ce)(?P<layer>\d*|_half)(?P<title>_title)?")
BLOCK = 1 << 16
BATCH_TOKENS = 8192


@dataclass(frozen=True)
class View:
    """What is looked at: a layer (a number, `_half` of them, or none: the last) of an encoder, over texts or over titles."""

    name: str
    encoder: Encoder
    layer: str
    of_title: bool

    @classmethod
    def of(cls, name: str) -> "View":
        """Read a view's name.

        Raises:
            InputError: no such view.
        """
        found = NAME.fullmatch(name)
        if found is None:
            raise InputError(
                f"view {name!r} is not known; name de or ce, then a layer or none, then _title or nothing (de3_title)"
            )
        return cls(name, "de" if found["encoder"] == "de" else "ce", found["layer"], found["title"] is not None)

    def texts(self, items: Items) -> list[str]:
        """What the encoder reads, one string per item; among titles, an item without one is seen by its text."""
        if not self.of_title:
            return items.full_texts
        return [title or text for title, text in zip(items.titles, items.texts, strict=True)]


class LayerEncoder:
    """An encoder that gives its hidden layers: the dual-encoder's or the cross-encoder's, by hub id, folder or adapter.

    Raises:
        ModelError: the model cannot be found or read, or is a dual-encoder without layers.
    """

    def __init__(self, encoder: Encoder, name: str) -> None:
        if encoder == "ce":
            kind = AutoModelForCausalLM if is_causal(name) else AutoModelForSequenceClassification
            model, self._tokenizer = load_adapter_or_model(name, kind)
            model = model.base_model
        else:
            transformer: Any = load_dual_encoder(name, "cpu")[0]
            if not hasattr(transformer, "auto_model"):
                raise ModelError(f"dual-encoder {name!r} has no layers to look at; name views of the CE alone (--views ce)")
            model, self._tokenizer = transformer.auto_model, transformer.tokenizer
        self.fingerprint = hash_model(name, model)
        self._name, self._device = name, choose_device()
        self._model = model.to(self._device, choose_dtype("auto", self._device)).eval()
        self._max_length = longest_input(model, self._tokenizer)
        self._tokenizer.padding_side = "right"
        self._tokenizer.pad_token = self._tokenizer.pad_token or self._tokenizer.eos_token
        self.n_layers, self.dim = int(model.config.num_hidden_layers), int(model.config.hidden_size)

    def read_layer(self, view: View) -> int:
        """The view's layer as a number, 0 being the token embeddings.

        Raises:
            InputError: the encoder has no such layer.
        """
        if not view.layer:
            return self.n_layers
        layer = self.n_layers // 2 if view.layer == "_half" else int(view.layer)
        if layer > self.n_layers:
            raise InputError(f"view {view.name!r} names layer {layer}, {self._name!r} has {self.n_layers}; name a lower one")
        return layer

    @torch.inference_mode()
    def embed(self, texts: Sequence[str], layers: Sequence[int]) -> FloatArray:
        """Texts (n) -> (n, len(layers), dim) float32: each layer's mean over the text's tokens.

        Raises:
            ModelError: a value is NaN or infinite.
        """
        encoded = self._tokenizer(list(texts), truncation=True, max_length=self._max_length)["input_ids"]
        lengths = np.array([len(ids) for ids in encoded])
        views = np.empty((len(texts), len(layers), self.dim), dtype=np.float32)
        for rows in token_budget_batches(lengths, BATCH_TOKENS):
            padded = self._tokenizer.pad({"input_ids": [encoded[row] for row in rows]}, return_tensors="pt").to(self._device)
            hidden = self._model(**padded, output_hidden_states=True).hidden_states
            mask = padded["attention_mask"][:, :, None]
            for at, layer in enumerate(layers):
                views[rows, at] = ((hidden[layer].float() * mask).sum(dim=1) / mask.sum(dim=1)).cpu().numpy()
        if not np.isfinite(views).all():
            raise ModelError(f"encoder {self._name!r} gave NaN or infinity; check its weights")
        return views


def choose_views(names: Sequence[str] | None, items: Items, cross_encoder: str | None) -> list[View]:
    """The named views, or as many of `DEFAULT_VIEWS` as the items and the cross-encoder allow.

    `cross_encoder` is None where only its scores are known; a name with a colon has no layers to look at (`python:...`).

    Raises:
        InputError: a named view that is not known or not possible.
    """
    views = [View.of(name) for name in (DEFAULT_VIEWS if names is None else dict.fromkeys(names))]
    lacks_ce = cross_encoder is None or ":" in cross_encoder
    possible = [view for view in views if not (view.encoder == "ce" and lacks_ce) and (any(items.titles) or not view.of_title)]
    for view in views:
        if view in possible:
            continue
        needed = "weights of the cross-encoder" if view.encoder == "ce" and lacks_ce else "titles"
        if names is not None:
            raise InputError(f"view {view.name!r} needs {needed} and there are none; leave it out of the views")
        logger.info("the fit goes without the view %s: there are no %s", view.name, needed)
    return possible


def save_view(folder: Path, raw: FloatArray) -> None:
    """Write the file of a `view` artifact: rows (n_items, dim), centred, each of unit length, in float16."""
    mean = sum(raw[start : start + BLOCK].sum(axis=0, dtype=np.float64) for start in range(0, len(raw), BLOCK)) / len(raw)
    stored = np.lib.format.open_memmap(folder / VIEW, mode="w+", dtype=np.float16, shape=raw.shape)
    for start in range(0, len(raw), BLOCK):
        centred = raw[start : start + BLOCK] - mean
        stored[start : start + BLOCK] = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-9)
    stored.flush()


def load_view(folder: Path) -> npt.NDArray[np.float16]:
    """Read a `view` artifact, (n_items, dim), memory-mapped.

    Raises:
        ArtifactError: not such an artifact, or a damaged one.
    """
    manifest = read_manifest(folder, KIND)
    shape = manifest.counts["items"], manifest.counts["dim"]
    try:
        view = np.load(folder / VIEW, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise ArtifactError(f"{folder} has a damaged file ({error}); remove the folder and run the stage again") from error
    if view.shape != shape:
        raise ArtifactError(f"{folder} holds a view {view.shape}, its manifest says {shape}; remove the folder and run again")
    return view
