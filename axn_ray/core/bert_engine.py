"""A faster engine for BERT on CPUs, in bfloat16 or float32: the same arithmetic, without what nobody needs.

Weights are reordered once for oneDNN; bias, GELU and the residual sum happen inside the product that they follow, before
its result is rounded; nothing sees padding, for attention takes rows of one length at once; a cross-encoder's last layer is
computed for the first token alone, the only one that the pooler reads. Knows no pair, no text and no policy.
"""

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

Int64Array = npt.NDArray[np.int64]
TOKENS, ROWS, TEXT_ROWS = 64, 16, 8  # what a batch is filled up to a multiple of: many tokens, few of pairs, few of lone texts
FEW = 512  # tokens up to which they are few; oneDNN keeps some hundred products at a time


def is_fast_bert(model: Any, dtype: torch.dtype, device: torch.device, kind: str = "BertForSequenceClassification") -> bool:
    """Whether a class below computes what this model of a `kind` does: a plain BERT encoder, a CPU with oneDNN for `dtype`."""
    config = model.config
    return (
        type(model).__name__ == kind
        and config.hidden_act == "gelu"
        and not config.is_decoder
        and device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and (dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()))
    )


class _Product:
    """`x Wᵀ + b` in `dtype`, weights (out, in) reordered for oneDNN."""

    def __init__(self, dtype: torch.dtype, *layers: torch.nn.Linear) -> None:
        weight = torch.cat([layer.weight for layer in layers]).detach().to(dtype)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self._bias = torch.cat([layer.bias for layer in layers]).detach().to(dtype)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")

    def gelu(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "gelu", [], "none")

    def plus(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self._weight, self._bias, "add")


class _Tokens:
    """The m tokens of a batch of n rows that is padded on the right, longest row first, and a few more that nobody reads.

    Rows of one length follow each other: attention takes them at once, and sees no padding either. oneDNN compiles its
    products once for each number of rows: `place (m',)` and `first (n',)` fill up to a multiple.
    """

    def __init__(self, mask: Int64Array, rows: int = ROWS) -> None:
        lengths = mask.sum(1)
        self.order = np.argsort(-lengths, kind="stable")
        lengths = lengths[self.order]
        starts = np.cumsum(lengths) - lengths
        row, column = np.nonzero(mask[self.order])
        self.place = _fill_up(self.order[row] * mask.shape[1] + column, rows if len(row) <= FEW else TOKENS)
        self.first = _fill_up(starts, rows)  # each row's first token, among the m
        bounds = [*np.flatnonzero(np.diff(lengths, prepend=-1)), len(lengths)]
        # Of the rows of each length: these rows, their tokens, the length.
        self.groups = [
            (slice(a, b), slice(starts[a], starts[a] + (b - a) * lengths[a]), int(lengths[a])) for a, b in pairwise(bounds)
        ]


def _fill_up(rows: Int64Array, multiple: int) -> torch.Tensor:
    return torch.from_numpy(np.pad(rows, (0, -len(rows) % multiple)))


class _Layer:
    """One encoder layer over tokens (m', dim); `first` gives it for each row's first token alone, (n', dim)."""

    def __init__(self, layer: Any, heads: int, dtype: torch.dtype) -> None:
        inner, self._heads = layer.attention.self, heads
        self._query_key_value = _Product(dtype, inner.query, inner.key, inner.value)
        self._query, self._key_value = _Product(dtype, inner.query), _Product(dtype, inner.key, inner.value)
        self._output = _Product(dtype, layer.attention.output.dense)
        self._up, self._down = _Product(dtype, layer.intermediate.dense), _Product(dtype, layer.output.dense)
        self._norms = [norm.to(dtype) for norm in (layer.attention.output.LayerNorm, layer.output.LayerNorm)]

    def all(self, x: torch.Tensor, tokens: _Tokens) -> torch.Tensor:
        projected, attended = self._query_key_value(x), torch.zeros_like(x)
        for _, part, length in tokens.groups:
            attended[part] = self._attend(*self._split(projected[part], length, 3))
        return self._finish(x, attended)

    def first(self, x: torch.Tensor, tokens: _Tokens) -> torch.Tensor:
        projected, x = self._key_value(x), x[tokens.first]
        query, attended = self._query(x), torch.zeros_like(x)
        for rows, part, length in tokens.groups:
            attended[rows] = self._attend(*self._split(query[rows], 1, 1), *self._split(projected[part], length, 2))
        return self._finish(x, attended)

    def _split(self, x: torch.Tensor, length: int, parts: int) -> tuple[torch.Tensor, ...]:
        """(n * length, parts * dim) -> `parts` tensors (n, heads, length, dim / heads)."""
        return x.view(-1, length, parts, self._heads, x.shape[-1] // (parts * self._heads)).permute(2, 0, 3, 1, 4).unbind(0)

    @staticmethod
    def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """(n, heads, length, dim / heads), key and value perhaps longer -> (n * length, dim)."""
        return functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2).flatten(0, 1)

    def _finish(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        x = self._norms[0](self._output.plus(attended, x))
        return self._norms[1](self._down.plus(self._up.gelu(x), x))


class _Encoder:
    """A BERT's embeddings, in float32, and its layers."""

    def __init__(self, bert: Any, dtype: torch.dtype) -> None:
        self._dtype, self._embeddings = dtype, bert.embeddings
        self.layers = [_Layer(layer, bert.config.num_attention_heads, dtype) for layer in bert.encoder.layer]

    def embed(self, ids: torch.Tensor, types: torch.Tensor | None, tokens: _Tokens) -> torch.Tensor:
        """What enters the first layer, of a padded batch (n, longest) -> (m', dim)."""
        position = (tokens.place % ids.shape[1])[None]
        flat, flat_types = (each.flatten()[tokens.place][None] for each in (ids, ids * 0 if types is None else types))
        return self._embeddings(input_ids=flat, token_type_ids=flat_types, position_ids=position)[0].to(self._dtype)


class BertCpuEngine:
    """A `BertForSequenceClassification` that `is_fast_bert`; takes the model over. Embeddings, pooler and head in float32."""

    name = "bert-cpu-1"  # of bfloat16, stands in fingerprints: a change that rounds otherwise takes another number

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        bert = model.float().eval().bert
        self._encoder, self._pooler, self._head = _Encoder(bert, dtype), bert.pooler, model.classifier

    @torch.inference_mode()
    def logits(self, ids: Int64Array, mask: Int64Array, types: Int64Array | None, column: int = 0) -> npt.NDArray[np.float32]:
        """One output of each row of a padded batch: (n, longest) -> (n,) float32."""
        tokens = _Tokens(mask)
        x = self._encoder.embed(torch.from_numpy(ids), None if types is None else torch.from_numpy(types), tokens)
        for layer in self._encoder.layers[:-1]:
            x = layer.all(x, tokens)
        first = self._encoder.layers[-1].first(x, tokens)[: len(ids)]
        logits = np.empty(len(ids), dtype=np.float32)
        logits[tokens.order] = self._head(self._pooler(first.float()[:, None]))[:, column].numpy()
        return logits


class BertCpuForward:
    """Stands in for the `forward` of a `BertModel` that `is_fast_bert`, which it takes over, and gives the last hidden state."""

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self._encoder = _Encoder(model.float().eval(), dtype)
        model.encoder = torch.nn.Module()  # the layers' weights are kept once

    @torch.inference_mode()
    def __call__(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None, **_: Any
    ) -> dict[str, torch.Tensor]:
        """A batch padded on the right, (n, longest) -> `last_hidden_state` (n, longest, dim) float32, 0 where it is padded."""
        tokens = _Tokens(attention_mask.numpy(), TEXT_ROWS)
        x = self._encoder.embed(input_ids, token_type_ids, tokens)
        for layer in self._encoder.layers:
            x = layer.all(x, tokens)
        m = int(attention_mask.sum())
        hidden = torch.zeros(input_ids.numel(), x.shape[1])
        hidden[tokens.place[:m]] = x[:m].float()
        return {"last_hidden_state": hidden.view(*input_ids.shape, -1)}
