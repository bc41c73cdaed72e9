"""Windows of tokenised texts that the host reads from files mapped into memory, in an order that can be resumed."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from training.errors import UserError

Transform = Callable[[np.ndarray], Any]


class WindowSource(Sequence):
    """Windows of `length + 1` tokens one after the other, the last of each being the first of the next; no copies.

    Args:
      shards: [tokens] each; a window may reach over several of them.
      length: labels in a window.
    """

    def __init__(self, shards: Sequence[np.ndarray], length: int) -> None:
        self._shards, self._length = shards, length
        self._ends = np.cumsum([len(shard) for shard in shards])

    def __len__(self) -> int:
        return int((self._ends[-1] - 1) // self._length)

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        return self.at(index * self._length)

    def at(self, begin: int) -> np.ndarray:
        """The window that begins at a token."""
        end, pieces = begin + self._length + 1, []
        number = int(np.searchsorted(self._ends, begin, side="right"))
        while begin < end:
            first = int(self._ends[number]) - len(self._shards[number])
            pieces.append(self._shards[number][begin - first : end - first])
            begin, number = int(self._ends[number]), number + 1
        return np.concatenate(pieces)


class Batches:
    """Batches without end: each epoch has every window once, in an order of its own. The state is a number.

    Args:
      source: of windows.
      batch_size: windows of all processes together.
      part: of each batch, what is made here.
      seed: of the order.
      transform: what is returned of the windows [part, length + 1].

    Raises:
      UserError: there are fewer windows than a batch has.
    """

    def __init__(
        self, source: WindowSource, batch_size: int, part: slice, seed: int, transform: Transform = lambda x: x
    ) -> None:
        self._steps = len(source) // batch_size
        if not self._steps:
            raise UserError(f"the texts have {len(source)} windows, fewer than a batch of {batch_size}")
        self._source, self._batch_size, self._part = source, batch_size, part
        self._seed, self._transform, self._next = seed, transform, 0
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, int))

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Any:
        epoch, step = divmod(self._next, self._steps)
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng((self._seed, epoch)).permutation(len(self._source))
        chosen = self._order[1][step * self._batch_size : (step + 1) * self._batch_size][self._part]
        self._next += 1
        return self._transform(np.stack([self._source[int(i)] for i in chosen]))

    def get_state(self) -> int:
        return self._next

    def set_state(self, state: int) -> None:
        self._next = state


class GrainBatches:
    """As `Batches`, read ahead by grain's threads or processes, in grain's order.

    Args:
      source, batch_size, part, seed, transform: as of `Batches`.
      workers: processes that read; 0 is threads of this one.

    Raises:
      UserError: the package grain is missing.
    """

    def __init__(
        self, source: WindowSource, batch_size: int, part: slice, seed: int, transform: Transform, workers: int = 0
    ) -> None:
        try:
            import grain
        except ModuleNotFoundError as error:
            raise UserError("reading ahead needs the package grain: pip install grain") from error
        count = part.stop - part.start
        order = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
        mine = order.slice(slice(part.start // count, None, batch_size // count))
        stream = mine.batch(count).to_iter_dataset()
        if workers:
            stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
        self._iterator, self._transform = iter(stream), transform

    def __iter__(self) -> "GrainBatches":
        return self

    def __next__(self) -> Any:
        return self._transform(next(self._iterator))

    def get_state(self) -> Any:
        return self._iterator.get_state()

    def set_state(self, state: Any) -> None:
        self._iterator.set_state(state)
