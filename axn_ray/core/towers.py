"""The workshop's two models: free embeddings (the paper's MF_Trns), and gated towers over frozen ones (MF_Ind).

Both map rows to vectors and say how the workers of one fit share their parameters. Knows no score, no Ray.
"""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from axn_ray.core.fit_share import FitShare, share_rows
from axn_ray.core.fitting import Rows
from axn_ray.core.score_matrix import FloatArray

State = dict[str, Any]
Lookup = Callable[[Rows, Rows], tuple[Tensor, Tensor]]
BLOCK = 1 << 14
MOMENTS = "exp_avg", "exp_avg_sq"


class Workers(Protocol):
    """The workers of one fit, seen from one of them. All of them make the same calls in the same order."""

    device: torch.device
    rank: int
    size: int
    sent_bytes: int  # so far, by this worker to others

    def replicate(self, towers: nn.Module) -> nn.Module:
        """The same module, with a backward pass that adds up the gradients of all workers."""
        ...

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of every worker, in order of rank: (n of this worker, ...) -> (n of all workers, ...)."""
        ...

    def exchange(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """All to all: the first `send[0]` rows go to worker 0, and so on; `receive[r]` rows come from worker r, in order of r."""
        ...


class Alone:
    """The only worker of a fit, on the CPU."""

    device = torch.device("cpu")
    rank, size, sent_bytes = 0, 1, 0

    def replicate(self, towers: nn.Module) -> nn.Module:
        """See `Workers`."""
        return towers

    def gather(self, rows: Tensor) -> Tensor:
        """See `Workers`."""
        return rows

    def exchange(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
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

    def start(self, queries: Rows, items: Rows) -> tuple[Tensor, Tensor]:
        """The dual-encoder's vectors of these rows."""
        item_embeddings, query_embeddings = self._frozen
        device = self.query_tower.gate.device
        return torch.from_numpy(query_embeddings[queries]).to(device), torch.from_numpy(item_embeddings[items]).to(device)

    def new_optimizer(self, learning_rate: float) -> torch.optim.Optimizer:
        """AdamW over both towers."""
        return torch.optim.AdamW(self.parameters(), lr=learning_rate)

    def share(self, workers: Workers) -> nn.Module:
        """The module to run: its backward pass adds up the gradients of all workers."""
        return workers.replicate(self)

    def fitted_state(self) -> dict[str, Tensor]:
        """A copy of what the factorization ships: both towers."""
        return {name: tensor.to("cpu", copy=True) for name, tensor in self.state_dict().items()}

    def rows(self, optimizer: torch.optim.Optimizer) -> dict[str, tuple[int, Tensor]]:
        """Nothing: towers keep no rows."""
        return {}

    def shared_state(self, optimizer: torch.optim.Optimizer) -> State:
        """Towers and optimizer, which are the same on every worker."""
        return {"towers": self.state_dict(), "optimizer": optimizer.state_dict()}

    def load(self, optimizer: torch.optim.Optimizer, shared: State, rows: dict[str, Tensor]) -> None:
        """Take over what `shared_state` gave."""
        self.load_state_dict(shared["towers"])
        optimizer.load_state_dict(shared["optimizer"])


def split_towers(state: dict[str, Tensor]) -> tuple[GatedTower, GatedTower]:
    """The query tower and the item tower of a state of `GatedTowers`."""
    towers = []
    for name in ("query_tower", "item_tower"):
        with torch.device("meta"):  # random first values would move the seed
            tower = GatedTower(len(state[f"{name}.outer.bias"]))
        tower.load_state_dict({key: state[f"{name}.{key}"] for key in tower.state_dict()}, assign=True)
        towers.append(tower)
    return towers[0], towers[1]


class FreeEmbeddings(nn.Module):
    """MF_Trns: U (queries of this worker, dim) and V (n_items, dim) are free; both start at the dual-encoder's embeddings.

    A worker holds the rows of V that its share owns and their optimizer state; rows that it needs come from their owners by
    an all-to-all, and gradients go back the same way. Only rows of V and U that a step touches have a gradient and move,
    so an item without observations never does.
    """

    def __init__(self, share: FitShare, workers: Workers) -> None:
        super().__init__()
        items = share.items
        self.items = nn.Parameter(torch.from_numpy(np.array(share.item_embeddings[items.start : items.stop])))
        self.queries = nn.Parameter(torch.from_numpy(np.array(share.query_embeddings)))
        self._first = {"items": items.start, "queries": share.queries.start}
        self._workers = workers
        self._bounds = [0, *(rows.stop for rows in share_rows(len(share.item_embeddings), workers.size))]

    def forward(self, queries: Rows, items: Rows) -> tuple[Tensor, Tensor]:
        """Rows of this worker's queries (k,) and of all items (m,), ascending -> vectors (k, dim), (m, dim)."""
        device = self.queries.device
        u = functional.embedding(torch.from_numpy(queries).to(device), self.queries, sparse=True)
        send = np.diff(np.searchsorted(items, self._bounds)).tolist()
        ones = [1] * self._workers.size
        receive = self._workers.exchange(torch.tensor(send, device=device), ones, ones).tolist()
        asked = self._workers.exchange(torch.from_numpy(items).to(device), send, receive) - self._first["items"]
        v: Tensor = _Lookup.apply(self.items, asked, send, receive, self._workers)
        return u, v

    @property
    def start(self) -> Lookup:
        """Before the first step the vectors are the dual-encoder's."""
        return self.forward

    def new_optimizer(self, learning_rate: float) -> torch.optim.Optimizer:
        """Adam that leaves alone the rows that a step does not touch; no weight decay."""
        optimizer = torch.optim.SparseAdam(self.parameters(), lr=learning_rate)
        for parameter in self.parameters():
            moments = {name: torch.zeros_like(parameter, requires_grad=False) for name in MOMENTS}
            optimizer.state[parameter] = {"step": 0, **moments}
        return optimizer

    def share(self, workers: Workers) -> nn.Module:
        """The module to run: itself. `_Lookup` adds up the gradients of V; a row of U lives on one worker, complete."""
        return self

    def fitted_state(self) -> dict[str, Tensor]:
        """A copy of what the factorization ships: this worker's rows of V."""
        return {"items": self.items.detach().to("cpu", copy=True)}

    def rows(self, optimizer: torch.optim.Optimizer) -> dict[str, tuple[int, Tensor]]:
        """By name: the number of the first row and the rows, of V, U and their two moments each."""
        named = {}
        for name, parameter in self.named_parameters():
            named[name] = self._first[name], parameter.data
            for moment in MOMENTS:
                named[f"{name}-{moment}"] = self._first[name], optimizer.state[parameter][moment]
        return named

    def shared_state(self, optimizer: torch.optim.Optimizer) -> State:
        """How many steps were taken."""
        return {"step": optimizer.state[self.items]["step"]}

    def load(self, optimizer: torch.optim.Optimizer, shared: State, rows: dict[str, Tensor]) -> None:
        """Take over `shared_state` and this worker's rows, named as by `rows`."""
        for name, (_, mine) in self.rows(optimizer).items():
            mine.copy_(rows[name])
        for parameter in self.parameters():
            optimizer.state[parameter]["step"] = shared["step"]


class _Lookup(torch.autograd.Function):
    """Rows of a table that is spread over workers: forward fetches them, backward returns gradients to the owners."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, asked: Tensor, send: list[int], receive: list[int], workers: Workers) -> Tensor:
        """`asked`: rows of this worker's table that others want, `receive` of each; it gets `send` rows from each."""
        ctx.save_for_backward(asked)
        ctx.rest = table.shape, send, receive, workers
        return workers.exchange(table.index_select(0, asked), receive, send)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the table: sparse, a row for each that was asked for."""
        (asked,), (shape, send, receive, workers) = ctx.saved_tensors, ctx.rest
        values = workers.exchange(gradients[0].contiguous(), send, receive)
        return torch.sparse_coo_tensor(asked[None], values, shape, check_invariants=False), None, None, None, None
