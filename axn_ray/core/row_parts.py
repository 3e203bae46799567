"""An array on disk in parts: files of consecutive rows, `NAME.START.npy`, each written by whoever holds those rows.

Knows not what the rows mean. Nobody needs memory for more rows than he asks for.
"""

import bisect
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from axn_ray.core.score_matrix import FloatArray
from axn_ray.errors import ArtifactError, FitError

BLOCK = 1 << 14


def write_part(folder: Path, name: str, start: int, rows: FloatArray) -> None:
    """Write `rows (n, dim)`, the first of which is row `start` of the array; no file where there are none."""
    if len(rows):
        np.save(folder / f"{name}.{start:012d}.npy", rows, allow_pickle=False)


class RowParts:
    """The array `name` in `folder`, memory-mapped.

    Raises:
        ArtifactError: no parts, or parts with a gap between them.
    """

    def __init__(self, folder: Path, name: str) -> None:
        paths = sorted(folder.glob(f"{name}.*.npy"))
        self._starts = [int(path.stem.removeprefix(f"{name}.")) for path in paths]
        self._parts: list[FloatArray] = [np.load(path, mmap_mode="r", allow_pickle=False) for path in paths]
        stops = [start + len(part) for start, part in zip(self._starts, self._parts, strict=True)]
        if self._starts != [0, *stops[:-1]] or not stops:
            raise ArtifactError(f"{folder} lacks rows of {name} (parts {self._starts} end at {stops}); make them again")
        self.shape = (stops[-1], *self._parts[0].shape[1:])

    def read(self, rows: range) -> FloatArray:
        """A copy of consecutive rows."""
        return np.concatenate([self._parts[0][:0], *self._pieces(rows)])

    def __getitem__(self, rows: npt.NDArray[np.int64]) -> FloatArray:
        """A copy of the rows with these numbers, ascending: (n,) -> (n, dim)."""
        bounds = np.searchsorted(rows, [*self._starts, self.shape[0]])
        spans = zip(self._parts, self._starts, bounds[:-1], bounds[1:], strict=True)
        return np.concatenate([part[rows[low:high] - start] for part, start, low, high in spans])

    def join(self, path: Path) -> None:
        """Write the whole array to one `.npy` file, a block of rows at a time.

        Raises:
            FitError: a row is NaN or infinite.
        """
        joined = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=self.shape)
        for start in range(0, self.shape[0], BLOCK):
            block = self.read(range(start, min(start + BLOCK, self.shape[0])))
            if not np.isfinite(block).all():
                raise FitError(
                    f"rows {start} to {start + len(block) - 1} came out NaN or infinite; lower learning_rate, or raise als' ridge"
                )
            joined[start : start + len(block)] = block
        joined.flush()

    def _pieces(self, rows: range) -> Iterator[FloatArray]:
        for place in range(max(0, bisect.bisect_right(self._starts, rows.start) - 1), len(self._parts)):
            start = self._starts[place]
            if start >= rows.stop:
                return
            yield self._parts[place][max(0, rows.start - start) : rows.stop - start]
