"""Next-token prediction on prepared texts, as tasks of the training loop."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from data import scored_tests, token_shards
from data.packing import segments
from data.text_batches import Batches, GrainBatches, WindowSource
from data.tokenizers import Tokenizer
from data.tokenizers import load as load_tokenizer
from deltanet.evaluators import scores
from models.losses import next_token_loss
from training.config import build
from training.errors import UserError

_TRAINING = "training tokens"


@dataclasses.dataclass(frozen=True)
class _PreparedText:
    """What the two tasks share.

    Args:
      model: the model's import path and arguments.
      batch_size: windows per step.
      folder: of the prepared texts, see `scripts/prepare_data.py`.
      length: labels in a window.
      split: for training.
      held_out: splits whose losses are measured.
      tests: scored tests that are measured: files `<name>.npz` in the folder.
      reset: whether documents in one window know nothing of each other.
      chunk: tokens whose logits exist at once.
      eval_batch: windows, or sequences of a test, that are measured at once.
      resident: what `residents` returned, on the device.
    """

    model: Mapping[str, Any]
    batch_size: int
    folder: str
    length: int
    split: str = "train"
    held_out: Sequence[str] = ()
    tests: Sequence[str] = ()
    reset: bool = False
    chunk: int = 8192
    eval_batch: int = 32
    resident: Any = None

    resample_every = 1
    batch_axis = 0

    @property
    def _texts(self) -> token_shards.TokenSet:
        return _load(self.folder)

    @property
    def tokenizer(self) -> Tokenizer:
        """That of the texts."""
        return load_tokenizer(self._texts.folder / "tokenizer.json")

    @property
    def examples_per_epoch(self) -> int:
        """Windows of the training split."""
        tokens = self._texts.split(self.split).tokens
        if tokens <= 2 * self.length:
            raise UserError(f"the split {self.split!r} has {tokens} tokens, too few for windows of {self.length}")
        return tokens // self.length - 1  # one less: where the first begins is drawn

    def init(self, key: jax.Array) -> nnx.Module:
        """A fresh model.

        Raises:
          UserError: its vocabulary is less than the texts'.
        """
        has, needs = self.model["vocabulary_size"], self._texts.vocabulary_size
        if has < needs:
            raise UserError(
                f"the texts in {self.folder} have {needs} kinds of tokens; set model.vocabulary_size={needs}"
            )
        return build(self.model, rngs=nnx.Rngs(key))

    def residents(self) -> dict[str, Any]:
        """What stays on the device: the held-out tokens and the tests."""
        arrays = {name: np.concatenate(self._texts.shards(name)) for name in self.held_out}
        for name in self.tests:
            test = scored_tests.load(self._texts.folder / f"{name}.npz")
            arrays[name] = scored_tests.Scored(*(array.astype(np.uint16) for array in test[:2]), test.weights)
        return arrays

    def loss(
        self, model: nnx.Module, batch: dict[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        return next_token_loss(model, batch, self.chunk, nnx.Rngs(key))

    def evaluators(self) -> dict[str, Callable[..., dict[str, jax.Array]]]:
        """A loss for each held-out split, and the tests."""
        found: dict[str, Callable[..., dict[str, jax.Array]]] = {}
        for name in self.held_out:
            words = self._texts.split(name).words
            found[name] = functools.partial(self._stream, name=name, words=words)
        for name in self.tests:
            found[name] = functools.partial(self._test, name=name)
        return found

    def _stream(self, model: nnx.Module, key: jax.Array, *, name: str, words: int) -> dict[str, jax.Array]:
        model.eval()
        return scores.stream_loss(model, self.resident[name], self.length, self.eval_batch, words)

    def _test(self, model: nnx.Module, key: jax.Array, *, name: str) -> dict[str, jax.Array]:
        model.eval()
        return scores.lambada(model, self.resident[name], self.eval_batch)

    def _batch(self, rows: Any, xp: Any) -> dict[str, Any]:
        """Windows of `length + 1` tokens as a batch."""
        rows = rows.astype(xp.int32)
        batch = {"tokens": rows[:, :-1], "labels": rows[:, 1:], "weights": xp.ones(rows[:, 1:].shape, xp.float32)}
        if self.reset:
            batch["segment_ids"] = segments(batch["tokens"], self._texts.document, xp)
        return batch


class DeviceText(_PreparedText):
    """For a corpus that the device's memory has room for.

    Each epoch has every window once, in an order of its own, and cuts the text at other places. Windows that do not
    fill a batch at an epoch's end are left out.
    """

    def residents(self) -> dict[str, Any]:
        return super().residents() | {_TRAINING: np.concatenate(self._texts.shards(self.split))}

    def batch(self, key: jax.Array, index: jax.Array) -> dict[str, jax.Array]:
        count = self.examples_per_epoch
        steps = max(1, count // self.batch_size)
        order_key, shift_key = jax.random.split(jax.random.fold_in(key, index // steps))
        order = jax.random.permutation(order_key, count)
        shift = jax.random.randint(shift_key, (), 0, self.length)
        places = (index % steps * self.batch_size + jnp.arange(self.batch_size)) % count
        starts = order[places] * self.length + shift
        tokens = self.resident[_TRAINING]
        rows = jax.vmap(lambda start: jax.lax.dynamic_slice(tokens, (start,), (self.length + 1,)))(starts)
        return self._batch(rows, jnp)


@dataclasses.dataclass(frozen=True)
class HostText(_PreparedText):
    """For a corpus of any size: the host reads windows from files that are mapped into memory.

    Args:
      workers: processes of grain that read ahead; 0 reads in this one, without grain.
    """

    workers: int = 0

    def batches(self, seed: int, process_index: int, process_count: int) -> Batches | GrainBatches:
        share = self.batch_size // process_count
        part = slice(process_index * share, (process_index + 1) * share)
        source = WindowSource(self._texts.shards(self.split), self.length)
        arguments = (source, self.batch_size, part, seed, lambda rows: self._batch(rows, np))
        return GrainBatches(*arguments, workers=self.workers) if self.workers else Batches(*arguments)


@functools.cache
def _load(folder: str) -> token_shards.TokenSet:
    return token_shards.load(folder)
