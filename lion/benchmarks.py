"""What a training step and an inference of a vision transformer cost, by mixer, form and resolution (E3 to E6).

A `Case` says what is run; `prepare` compiles it, `measure` times it. The memory is what the compiler plans: arguments,
results and temporaries together, without what a program shares with its arguments. Times are medians of single runs
after one to warm up, on images of noise; the optimiser's step is AdamW's, parameters are float32, the computation is in
bfloat16. Nothing is augmented.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from lion.vision import SIZES, vision_transformer
from models.vision_transformer import VisionTransformer

PATCH = 16
CLASSES = 1000
SCORES = 2**36
"""Bytes of scores that are tried; the search for the fastest product alone needs several times as many."""
SHARED_SCORES = 2**32
"""Bytes of scores up to which a case shares the GPU's memory with others while they compile."""
UNTIMED = "not timed"
"""What is said of a case that is only compiled."""
UNMEASURED = "not measured"
"""What is said of a case before which the measurements were interrupted."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One program to measure.

    Attributes:
      name: of the row.
      mixer: a key of `lion.vision.MIXERS`.
      size: a key of `lion.vision.SIZES`.
      resolution: of the images in pixels; a rest that fills no patch is cut off.
      batch: images.
      training: forward pass, backward pass and AdamW, or the forward pass alone.
      options: of the mixer, as pairs: its form, chunk size, implementation.
      depth: blocks; 0 for those of the size.
      loop: whether the blocks are run by one loop, which compiles in a fraction of the time, or one after another.
      timed: whether it is run, or only compiled, which tells its memory.
    """

    name: str
    mixer: str
    size: str
    resolution: int
    batch: int
    training: bool
    options: tuple[tuple[str, Any], ...] = ()
    depth: int = 0
    loop: bool = True
    timed: bool = True

    @property
    def image_size(self) -> int:
        return self.resolution // PATCH * PATCH

    @property
    def tokens(self) -> int:
        return (self.resolution // PATCH) ** 2 + 1

    @property
    def scores(self) -> int:
        """Bytes of the scores of one layer in float32, where they are held all at once."""
        options = dict(self.options)
        held = options.get("implementation") == "xla" if self.mixer == "softmax" else options.get("form") == "full"
        return 4 * self.batch * SIZES[self.size]["heads"] * self.tokens**2 if held else 0


@dataclasses.dataclass
class Program:
    """A compiled case: `run` takes and gives what is carried from one run to the next."""

    case: Case
    start: Callable[[], tuple[Any, ...]]
    run: Callable[..., tuple[Any, ...]]
    gigabytes: float
    seconds_to_compile: float


@dataclasses.dataclass
class Measured:
    """What a case took; `failure` says why it was not run."""

    case: Case
    milliseconds: float | None = None
    gigabytes: float | None = None
    seconds_to_compile: float | None = None
    failure: str = ""

    @property
    def unexpected(self) -> bool:
        """Whether it failed, and not because it was not tried."""
        return self.failure not in ("", UNTIMED) and self.case.scores <= SCORES

    def summary(self) -> str:
        """One line."""
        case = self.case
        return f"{case.size}, {case.resolution} px, batch {case.batch}: {case.name}: {cost(self.record())}"

    def record(self) -> dict[str, Any]:
        """As JSON holds it."""
        numbers = {key: value for key, value in vars(self).items() if key != "case"}
        return {**dataclasses.asdict(self.case), "options": dict(self.case.options), **numbers}


def cost(record: Mapping[str, Any]) -> str:
    """Time and memory of a record in one cell; of what could not be run, why, and the memory that it needs."""
    time_ = f"{record['milliseconds']:.3g} ms" if record["milliseconds"] else record["failure"]
    return f"{time_}, {record['gigabytes']:.3g} GB" if record["gigabytes"] else time_


def run_cases(cases: Sequence[Case], *, repeats: int, workers: int = 1, seconds_a_case: float = 20.0) -> list[Measured]:
    """Compiles and times all cases, and prints each. An interrupt ends it with what was measured until then.

    Args:
      cases: what to measure.
      repeats: runs of each, at most.
      workers: processes that compile side by side; they are timed one after another when all have done so. What
        holds all its scores comes last and alone, and what failed is tried once more alone. With one, there is no
        other process than this.
      seconds_a_case: after which no further run is begun.
    """
    results: dict[int, Measured] = {}

    def run(wave: Sequence[int]) -> None:
        measured = _wave([cases[place] for place in wave], repeats, seconds_a_case, processes=workers > 1)
        for place, one in zip(wave, measured, strict=True):
            results[place] = one
            print(f"   {place + 1} of {len(cases)}: {one.summary()}", flush=True)

    places = range(len(cases))
    small = [place for place in places if cases[place].scores <= SHARED_SCORES]
    waves = [small[first : first + workers] for first in range(0, len(small), workers)]
    try:
        for wave in [*waves, *([place] for place in places if place not in small)]:
            run(wave)
        for place in places if workers > 1 else ():
            if results[place].unexpected:  # perhaps the others held the memory
                run([place])
    except KeyboardInterrupt:
        print(f"   interrupted: {len(cases) - len(results)} of {len(cases)} are not measured", flush=True)
    return [results.get(place, Measured(case, failure=UNMEASURED)) for place, case in enumerate(cases)]


def _wave(cases: Sequence[Case], repeats: int, seconds: float, processes: bool) -> Iterator[Measured]:
    """The cases, in their order; with `processes` each in one of its own, which also frees what it held."""
    if not processes:
        yield from (_measured(_prepared(case), repeats, seconds) for case in cases)
        return
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        pipes = []
        for case in cases:
            pipe, other = context.Pipe()
            process = context.Process(target=_serve, args=(other, case, repeats, seconds), daemon=True)
            process.start()
            stack.callback(process.terminate)
            other.close()
            pipes.append(pipe)
        compiled = [_received(pipe, case) for pipe, case in zip(pipes, cases, strict=True)]
        for pipe, case, failed in zip(pipes, cases, compiled, strict=True):
            if not failed:
                pipe.send("your turn")
            yield failed or _received(pipe, case)


def _serve(pipe: Any, case: Case, repeats: int, seconds: float) -> None:
    """Compiles a case, and times it when told to."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the others need memory too
    program = _prepared(case)
    pipe.send(None)
    pipe.recv()
    pipe.send(_measured(program, repeats, seconds))


def _received(pipe: Any, case: Case) -> Measured | None:
    try:
        return pipe.recv()
    except EOFError:
        return Measured(case, failure="its process ended")


def _measured(program: "Program | Measured", repeats: int, seconds: float) -> Measured:
    return program if isinstance(program, Measured) else measure(program, repeats, seconds)


def _prepared(case: Case) -> Program | Measured:
    if case.scores > SCORES:
        return Measured(case, failure=f"scores of {case.scores / 1e9:.0f} GB")
    try:
        return prepare(case)
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError, RuntimeError) as error:
        return Measured(case, failure=_reason(error))


def measure(program: Program, repeats: int, seconds: float) -> Measured:
    """Median time of a run, with the first left out; what does not fit into the memory is reported as that."""
    result = Measured(program.case, None, program.gigabytes, program.seconds_to_compile)
    if not program.case.timed:
        result.failure = UNTIMED
        return result
    times = []
    try:
        carried = jax.block_until_ready(program.run(*program.start()))
        began = time.monotonic()
        while len(times) < repeats and (not times or time.monotonic() - began < seconds):
            before = time.perf_counter()
            carried = jax.block_until_ready(program.run(*carried))
            times.append(1e3 * (time.perf_counter() - before))
    except jax.errors.JaxRuntimeError as error:
        result.failure = _reason(error)
        return result
    result.milliseconds = statistics.median(times)
    return result


def prepare(case: Case) -> Program:
    """Compiles a case. Raises what the compiler raises where it cannot, or where the memory does not suffice."""
    parts = _Parts(case)
    if case.training:
        optimizer = optax.adamw(1e-3, weight_decay=0.05)

        def start() -> tuple[Any, ...]:
            weights = parts.weights(jax.random.key(0))
            images = jax.random.normal(jax.random.key(1), parts.images.shape, parts.images.dtype)
            return weights, optimizer.init(weights), images

        def run(weights: Any, state: Any, images: jax.Array) -> tuple[Any, ...]:
            labels = jnp.arange(case.batch) % CLASSES

            def loss(weights: Any) -> jax.Array:
                logits = parts.forward(_narrow(weights), images).astype(jnp.float32)
                return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

            updates, state = optimizer.update(jax.grad(loss)(weights), state, weights)
            return optax.apply_updates(weights, updates), state, images

        step = jax.jit(run, donate_argnums=(0, 1, 2))
    else:

        def start() -> tuple[Any, ...]:
            weights = _narrow(parts.weights(jax.random.key(0)))
            return weights, jax.random.normal(jax.random.key(1), parts.images.shape, parts.images.dtype)

        def run(weights: Any, images: jax.Array) -> tuple[Any, ...]:
            # What comes out goes in again, so that no run can be left out or overlap with the next.
            logits = parts.forward(weights, images)
            return weights, images.at[:, 0, 0, 0].set(logits[:, 0].astype(images.dtype))

        step = jax.jit(run, donate_argnums=(0, 1))
    began = time.monotonic()
    compiled = step.lower(*jax.eval_shape(start)).compile()
    plan = compiled.memory_analysis()
    total = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes - plan.alias_size_in_bytes
    seconds = time.monotonic() - began
    return Program(case, jax.jit(start).lower().compile(), compiled, total / 1e9, seconds)


class _Parts:
    """The model of a case as functions of its weights."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.images = jax.ShapeDtypeStruct((case.batch, case.image_size, case.image_size, 3), jnp.bfloat16)
        self._graph = nnx.graphdef(nnx.eval_shape(lambda: self._make(jax.random.key(0))))

    def _make(self, key: jax.Array) -> VisionTransformer:
        case = self.case
        depth = case.depth or SIZES[case.size]["depth"]
        return vision_transformer(
            case.size,
            case.mixer,
            mixer_options=dict(case.options),
            image_size=case.image_size,
            patch=PATCH,
            classes=CLASSES,
            depth=depth,
            unroll=1 if case.loop else depth,
            rngs=nnx.Rngs(params=key),
        )

    def weights(self, key: jax.Array) -> Any:
        return nnx.state(self._make(key))

    def forward(self, weights: Any, images: jax.Array) -> jax.Array:
        """Logits."""
        return nnx.merge(self._graph, weights)(images)


def _narrow(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return "out of memory" if "RESOURCE_EXHAUSTED" in text else text[:160]


FORMS = ("full", "recurrent", "chunked", "two_sided")
LION = ("lion_lit", "lion_d", "lion_s")
SOFTMAX = {"softmax, naive": "xla", "softmax, fused": "cudnn"}
RESOLUTIONS = (224, 512, 738, 1024, 1248, 1536, 2496)
"""In pixels, those of the paper."""


def training_cases(sizes: dict[str, int], depth: int = 0, resolution: int = 224, loop: bool = True) -> list[Case]:
    """E3: a training step of every variant; `sizes` gives the batch of each size of the model."""
    shared = {"resolution": resolution, "training": True, "depth": depth, "loop": loop}
    cases = []
    for size, batch in sizes.items():
        for name, implementation in SOFTMAX.items():
            cases.append(
                Case(name, "softmax", size, batch=batch, options=(("implementation", implementation),), **shared)
            )
        for mixer in (*LION, "lion_d_two_scans", "lion_s_two_scans"):
            cases.append(Case(mixer, mixer, size, batch=batch, **shared))
    return cases


def resolution_cases(
    size: str, resolutions: Sequence[int], training: bool, batch: Callable[[int], int], depth: int = 0
) -> list[Case]:
    """E4 and E5: softmax and the variants by resolution; in inference each form of each variant.

    Args:
      size: of the model.
      resolutions: in pixels.
      training: a training step or inference.
      batch: images by number of tokens.
      depth: as in `Case`.
    """
    cases = []
    for resolution in resolutions:
        shared = {"size": size, "resolution": resolution, "training": training, "depth": depth}
        images = batch((resolution // PATCH) ** 2 + 1)
        for name, implementation in SOFTMAX.items():
            options = (("implementation", implementation),)
            cases.append(Case(name, "softmax", batch=images, options=options, **shared))
        for mixer in LION:
            if training:
                cases.append(Case(mixer, mixer, batch=images, **shared))
                continue
            for form in FORMS:
                cases.append(Case(f"{mixer}, {form}", mixer, batch=images, options=(("form", form),), **shared))
    return cases


def chunk_cases(size: str, resolution: int, batch: int, chunks: Sequence[int], depth: int = 0) -> list[Case]:
    """E6: the two chunk forms by chunk size; a size of all tokens is the full form."""
    shared = {"size": size, "resolution": resolution, "batch": batch, "training": False, "depth": depth}
    tokens = (resolution // PATCH) ** 2 + 1
    cases = []
    for mixer in ("lion_d", "lion_s"):
        for form in ("chunked", "two_sided"):
            for chunk in sorted({min(chunk, tokens) for chunk in chunks}):
                options = (("form", form), ("chunk_size", chunk))
                cases.append(Case(f"{mixer}, {form}, {chunk}", mixer, options=options, **shared))
        cases.append(Case(f"{mixer}, full", mixer, options=(("form", "full"),), **shared))
    return cases


def by_tokens(budget: int) -> Callable[[int], int]:
    """As many images as have about `budget` tokens together, at least one."""
    return lambda tokens: max(1, int(np.floor(budget / tokens)))
