"""The fit of MF_Trns and MF_Ind by gradient steps, epoch by epoch: which observations make a step.

`GradientFit` is one worker's part; with one worker it is the whole. Knows no Ray.
"""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from axn_ray.core.epochs import Epoch, FitProgress
from axn_ray.core.fit_share import FitShare
from axn_ray.core.fitting import FactorizationConfig, Rows, draw_held_out
from axn_ray.core.row_parts import RowParts, write_part
from axn_ray.core.score_matrix import ScoreScale, sum_moments
from axn_ray.core.towers import Alone, FreeEmbeddings, GatedTowers, Lookup, State, Workers

BLOCK = 1 << 15
SHARED_STATE = "state.pt"


class GradientFit:
    """One worker's part of a fit: the observations of its share's queries.

    The order of observations depends on seed and epoch alone. A step takes the next `batch_size` of them, each worker
    those of its own queries, and gradients are summed over workers before they are applied: any number of workers takes
    the same steps, up to the order of floating-point sums. The order costs every worker 16 bytes per observation, and
    while it is drawn 8 more.

    Raises:
        InputError: see `ScoreScale.fit`.
    """

    def __init__(self, share: FitShare, config: FactorizationConfig, workers: Workers | None = None) -> None:
        self._share, self._config, self._workers = share, config, workers or Alone()
        self._query_at = np.repeat(np.arange(len(share.queries)), np.diff(share.matrix.indptr))
        self._item_at = share.matrix.item_index.astype(np.int64)
        self._targets = np.zeros(share.matrix.n_observed, dtype=np.float32)
        held_out = draw_held_out(share.n_observed, config)
        self._train, self._held_out = np.flatnonzero(~held_out), np.flatnonzero(held_out)
        self._model = new_model(config, share, self._workers).to(self._workers.device)
        self._shared = self._model.share(self._workers)
        self._optimizer = self._model.new_optimizer(config.learning_rate)
        self.scale = self._fit_scale()
        self._targets = self.scale.scale(share.matrix.scores)
        self.start_rmse = float(np.sqrt(self._held_out_mse(self._model.start)))
        self.progress = FitProgress(config)

    def run_epoch(self) -> Epoch:
        """Run one epoch.

        Raises:
            FitError: the error is NaN or infinite; every worker raises it after the same epoch.
        """
        number, sent = self.progress.start(), self._workers.sent_bytes
        order = np.random.default_rng([self._config.seed, number]).permutation(self._train)
        squared = torch.zeros(1, dtype=torch.float64, device=self._workers.device)
        for step in _cut(order, self._config.batch_size):
            squared += self._step(self._mine(step), len(step))
        train_mse = self._workers.gather(squared).sum().item() / len(self._train)
        held_out_mse = self._held_out_mse(self._model)
        return self.progress.add(train_mse, held_out_mse, self._workers.sent_bytes - sent)

    def _step(self, rows: Rows, n_observations: int) -> Tensor:
        """One gradient step on the mean squared error; `rows` (n,) are this worker's among `n_observations`."""
        errors = self._errors(self._shared, rows)
        self._optimizer.zero_grad()
        (errors.square().sum() / n_observations).backward()
        self._optimizer.step()
        return _squared(errors.detach())

    def _errors(self, model: Lookup, rows: Rows) -> Tensor:
        """`u_q · v_i - y` for rows (n,) of this worker's observations; a query or item is embedded once."""
        unique_queries, query_at = np.unique(self._query_at[rows], return_inverse=True)
        unique_items, item_at = np.unique(self._item_at[rows], return_inverse=True)
        u, v = model(unique_queries, unique_items)
        at_query, at_item, y = (torch.from_numpy(part).to(u.device) for part in (query_at, item_at, self._targets[rows]))
        return (u.index_select(0, at_query) * v.index_select(0, at_item)).sum(dim=1) - y

    def _mine(self, observations: Rows) -> Rows:
        """Of these observations those that this worker holds, as rows of its own."""
        start = self._share.first_observation
        return observations[(observations >= start) & (observations < start + len(self._targets))] - start

    def _in_step(self, rows: Rows) -> Iterator[Rows]:
        """Blocks of this worker's rows, as many as the worker with the most has: all of them make the same calls."""
        longest = int(self._workers.gather(torch.tensor([len(rows)], device=self._workers.device)).max())
        return (rows[start : start + BLOCK] for start in range(0, longest, BLOCK))

    @torch.no_grad()
    def _fit_scale(self) -> ScoreScale:
        """Brings the observed CE scores to the range of the dual-encoder's, over all workers' pairs."""
        moments = np.zeros(5)
        for rows in self._in_step(np.arange(len(self._targets))):
            approx = self._errors(self._model.start, rows).cpu().numpy()  # targets are still zero
            moments += sum_moments(self._share.matrix.scores[rows], approx)
        total = self._workers.gather(torch.from_numpy(moments)[None].to(self._workers.device)).sum(dim=0)
        return ScoreScale.from_moments(total.cpu().numpy())

    @torch.no_grad()
    def _held_out_mse(self, model: Lookup) -> float:
        squared = torch.zeros(1, dtype=torch.float64, device=self._workers.device)
        for rows in self._in_step(self._mine(self._held_out)):
            squared += _squared(self._errors(model, rows))
        return float(self._workers.gather(squared).sum().item() / len(self._held_out))

    def fitted_state(self) -> dict[str, Tensor]:
        """A copy of what the factorization ships: both towers, or this worker's rows of V."""
        return self._model.fitted_state()

    def save(self, folder: Path) -> None:
        """Write this worker's part of what the fit needs to go on, with any number of workers."""
        for name, (start, rows) in self._model.rows(self._optimizer).items():
            write_part(folder, name, start, rows.detach().cpu().numpy())
        if self._workers.rank == 0:
            state = {
                "model": self._model.shared_state(self._optimizer),
                "epochs": [asdict(epoch) for epoch in self.progress.epochs],
                "scale": asdict(self.scale),
                "start_rmse": self.start_rmse,
            }
            torch.save(state, folder / SHARED_STATE)

    def load(self, folder: Path) -> None:
        """Go on from what all workers, however many, wrote to `folder`."""
        state = read_shared_state(folder)
        own = {
            name: torch.from_numpy(RowParts(folder, name).read(range(start, start + len(rows)))).to(rows.device)
            for name, (start, rows) in self._model.rows(self._optimizer).items()
        }
        self._model.load(self._optimizer, state["model"], own)
        self.progress.epochs = [Epoch(**epoch) for epoch in state["epochs"]]
        self.scale, self.start_rmse = ScoreScale(**state["scale"]), state["start_rmse"]
        self._targets = self.scale.scale(self._share.matrix.scores)


def read_shared_state(folder: Path) -> State:
    """The part of a saved fit that is the same for every worker."""
    state: State = torch.load(folder / SHARED_STATE, weights_only=True, map_location="cpu")
    return state


def new_model(config: FactorizationConfig, share: FitShare, workers: Workers) -> GatedTowers | FreeEmbeddings:
    """The method's model at its start, for one worker's share."""
    if config.method == "mf_ind":
        return GatedTowers(share.item_embeddings, share.query_embeddings, config.seed)
    return FreeEmbeddings(share, workers)


def _cut(rows: Rows, size: int) -> Iterator[Rows]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _squared(errors: Tensor) -> Tensor:
    return errors.double().square().sum()[None]
