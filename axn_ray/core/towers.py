"""The workshop's two models: free embeddings (the paper's MF_Trns), and gated towers over frozen ones (MF_Ind).

Both map rows to vectors and say how the workers of one fit share their parameters. Knows no score, no Ray.
"""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from axn_ray.core.score_matrix import FloatArray

Rows = npt.NDArray[np.int64]
State = dict[str, Any]
BLOCK = 1 << 14


class Workers(Protocol):
    """The workers of one fit, seen from one of them. All of them make the same calls in the same order."""

    device: torch.device

    def replicate(self, towers: nn.Module) -> nn.Module:
        """The same module, with a backward pass that adds up the gradients of all workers."""
        ...

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of every worker, in order of rank: (n of this worker, ...) -> (n of all workers, ...)."""
        ...


class Alone:
    """The only worker of a fit, on the CPU."""

    device = torch.device("cpu")

    def replicate(self, towers: nn.Module) -> nn.Module:
        """See `Workers`."""
        return towers

    def gather(self, rows: Tensor) -> Tensor:
        """See `Workers`."""
        return rows


class GatedTower(nn.Module):
    """`out = σ(gate) x' + (1 - σ(gate)) x` with `x' = W2 gelu(W1 x + b1) + b2`: (n, dim) -> (n, dim).

    The gate is one number and starts at -5, so that a fresh tower changes its input by less than one percent of x'.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.inner = nn.Linear(dim, 2 * dim)
        self.outer = nn.Linear(2 * dim, dim)
        self.gate = nn.Parameter(torch.tensor(-5.0))

    def forward(self, x: Tensor) -> Tensor:
        """(n, dim) -> (n, dim)."""
        share = torch.sigmoid(self.gate)
        return share * self.outer(functional.gelu(self.inner(x))) + (1 - share) * x

    @torch.inference_mode()
    def embed(self, embeddings: FloatArray) -> FloatArray:
        """The tower over an array, in blocks that bound the memory: (n, dim) -> (n, dim)."""
        device = self.gate.device
        embedded = np.empty(embeddings.shape, dtype=np.float32)
        for start in range(0, len(embeddings), BLOCK):
            block = torch.from_numpy(np.array(embeddings[start : start + BLOCK]))
            embedded[start : start + BLOCK] = self(block.to(device)).cpu().numpy()
        return embedded


class GatedTowers(nn.Module):
    """MF_Ind: one tower for queries and one for items, over dual-encoder embeddings that stay as they are.

    `item_embeddings (n_items, dim)`, `query_embeddings (n_queries, dim)`, the queries being this worker's.
    """

    def __init__(self, item_embeddings: FloatArray, query_embeddings: FloatArray, seed: int) -> None:
        super().__init__()
        self._frozen = item_embeddings, query_embeddings
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.query_tower = GatedTower(query_embeddings.shape[1])
            self.item_tower = GatedTower(item_embeddings.shape[1])

    def forward(self, queries: Rows, items: Rows) -> tuple[Tensor, Tensor]:
        """Rows (k,), (m,) -> vectors (k, dim), (m, dim)."""
        device = self.query_tower.gate.device
        item_embeddings, query_embeddings = self._frozen
        u = self.query_tower(torch.from_numpy(query_embeddings[queries]).to(device))
        v = self.item_tower(torch.from_numpy(item_embeddings[items]).to(device))
        return u, v

    def new_optimizer(self, learning_rate: float) -> torch.optim.Optimizer:
        """AdamW over both towers."""
        return torch.optim.AdamW(self.parameters(), lr=learning_rate)

    def share(self, workers: Workers) -> nn.Module:
        """The module to run: its backward pass adds up the gradients of all workers."""
        return workers.replicate(self)

    def sum_gradients(self, workers: Workers) -> None:
        """Nothing is left to add up after the backward pass."""

    def fitted_state(self) -> dict[str, Tensor]:
        """A copy of what the factorization ships: both towers."""
        return {name: tensor.to("cpu", copy=True) for name, tensor in self.state_dict().items()}

    def map_query_rows(self, state: State, change: Callable[[Tensor], Tensor]) -> State:
        """The state itself: towers keep nothing per query."""
        return state


class FreeEmbeddings(nn.Module):
    """MF_Trns: U (queries of this worker, dim) and V (n_items, dim) are free; both start at the dual-encoder's embeddings.

    Only rows of V and U that a step touches have a gradient and move, so an item without observations never does.
    """

    def __init__(self, item_embeddings: FloatArray, query_embeddings: FloatArray) -> None:
        super().__init__()
        self.items = nn.Parameter(torch.from_numpy(np.array(item_embeddings)))
        self.queries = nn.Parameter(torch.from_numpy(np.array(query_embeddings)))

    def forward(self, queries: Rows, items: Rows) -> tuple[Tensor, Tensor]:
        """Rows (k,), (m,) -> vectors (k, dim), (m, dim)."""
        u = functional.embedding(torch.from_numpy(queries).to(self.queries.device), self.queries, sparse=True)
        v = functional.embedding(torch.from_numpy(items).to(self.items.device), self.items, sparse=True)
        return u, v

    def new_optimizer(self, learning_rate: float) -> torch.optim.Optimizer:
        """Adam that leaves alone the rows that a step does not touch; no weight decay."""
        return torch.optim.SparseAdam(self.parameters(), lr=learning_rate)

    def share(self, workers: Workers) -> nn.Module:
        """The module to run: itself, see `sum_gradients`."""
        return self

    def sum_gradients(self, workers: Workers) -> None:
        """Add up the workers' gradients of V, touched rows only. A row of U lives on one worker and is complete there."""
        assert self.items.grad is not None
        mine = self.items.grad.coalesce()
        rows, values = workers.gather(mine.indices()[0]), workers.gather(mine.values())
        self.items.grad = torch.sparse_coo_tensor(rows[None], values, mine.shape, check_invariants=False).coalesce()

    def fitted_state(self) -> dict[str, Tensor]:
        """A copy of what the factorization ships: V."""
        return {"items": self.items.detach().to("cpu", copy=True)}

    def map_query_rows(self, state: State, change: Callable[[Tensor], Tensor]) -> State:
        """The state with `change` applied to each tensor that has one row per query: U and its two moments."""
        names = [name for name, _ in self.named_parameters()]
        place = names.index("queries")
        slots = state["optimizer"]["state"]
        moments = {k: change(v) if isinstance(v, Tensor) else v for k, v in slots[place].items()}
        return {
            "model": {**state["model"], "queries": change(state["model"]["queries"])},
            "optimizer": {**state["optimizer"], "state": {**slots, place: moments}},
        }
