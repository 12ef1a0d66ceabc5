"""Decoding batch after batch: the passes of a static plan recorded once as a CUDA graph and replayed."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, lru_cache, partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from vgen.errors import UserError
from vgen.generators.places import Located
from vgen.generators.transformer import Transformer
from vgen.layers.availability import check_available, why_not
from vgen.sampling.decode import Request, Watch, check_request, run_passes
from vgen.sampling.settings import Sampling, SpatialGuidance
from vgen.schedules.plan import Plan

Engine = Literal["auto", "eager", "graph", "fused"]
Record = Callable[[Callable[[], Tensor], torch.device], Callable[[], Tensor]]


def pick_engine(engine: Engine, device: torch.device) -> Engine:
    """The engine that a setting stands for: ``auto`` is the fastest one of the device, ``eager`` on the CPU.

    Raises:
        UserError: for an unknown engine, or ``fused`` without what it needs.
    """
    if engine not in get_args(Engine):
        raise UserError(f"engine={engine} is unknown; choose one of {', '.join(get_args(Engine))}")
    if engine == "fused":
        check_available(device)
    if engine != "auto":
        return engine
    if device.type != "cuda":
        return "eager"
    return "graph" if why_not(device) else "fused"


class GraphRecorder:
    """Records functions as CUDA graphs.

    All graphs of one recorder share their memory, so that several cost as much as the largest: they are replayed one at
    a time, and a result is taken before the next replay.
    """

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, run: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
        """Record a function.

        Args:
            run: launches kernels on fixed buffers and never waits for the device; it has run before, so that everything
                it compiles or allocates once is there.
            device: a CUDA device.

        Returns:
            A function that replays the kernels and returns the tensor that ``run`` returned, overwritten by every
            replay of any graph of this recorder.

        Raises:
            torch.OutOfMemoryError: if the device's memory does not hold the recording.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            try:
                with torch.cuda.graph(graph, pool=self._pool, stream=_recording_stream(device)):
                    result = run()
            except RuntimeError as error:
                # Ending a capture that ran out of memory fails too and hides why.
                if isinstance(error.__context__, torch.OutOfMemoryError):
                    raise error.__context__ from None
                raise
        self._pool = graph.pool()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


@lru_cache(maxsize=8)
def _without_seed(sampling: Sampling) -> Sampling:
    """What a recording depends on."""
    return replace(sampling, seed=0)


@cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """Recorded kernels keep the priority of this stream wherever they are replayed, above that of a pixel decoder."""
    return torch.cuda.Stream(device, priority=-1)


class Recording:
    """A recorded decoding.

    Args:
        inputs: the buffers it reads.
        replay: runs it and returns ids int64 [B, N], valid until the next replay.
    """

    def __init__(self, inputs: Request, replay: Callable[[], Tensor]) -> None:
        self._buffers, self._replay = inputs.tensors(), replay
        self._seed: Tensor | None = None

    def run(self, request: Request) -> Tensor:
        """Ids int64 [B, N] of another request of the same shapes."""
        values = request.tensors()
        # Nothing is copied that is there: at batch 1 a copy costs the device as much as a layer.
        if values["seed"] is self._seed:
            del values["seed"]
        self._seed = request.seed
        for name, value in values.items():
            self._buffers[name].copy_(value)
        return self._replay().clone()


class Decoder:
    """Decodes batches of one generator and plan.

    A graph holds all passes of a decoding for one batch size, set of inputs and sampling settings; seed, sample indices
    and conditions are its inputs. The first batch of a kind runs eagerly, which warms up what a recording must not do;
    the second records; a job with a single batch never pays for a recording. Orders that are decided at run time and
    calls that watch the passes run without a graph always. ``graph`` and ``eager`` draw the same tokens; the kernels of
    ``fused`` round differently.

    Args:
        generator: network in eval mode; its weights may change in place, not move. ``fused`` itself moves some when the
            first decoder of a network is made: make it before one of another engine records.
        plan: decode order.
        engine: ``eager``, ``graph``, ``fused`` (graphs of the kernels of :mod:`vgen.layers.fused`), or ``auto``, see
            :func:`pick_engine`.
        largest: graphs kept at once; the one unused for longest goes first.
        record: makes a replay of a function; for tests on devices without graphs.

    Raises:
        UserError: for an unknown engine, or one that the device does not have.
    """

    def __init__(
        self,
        generator: Transformer,
        plan: Plan,
        *,
        engine: Engine = "auto",
        largest: int = 4,
        record: Record | None = None,
    ) -> None:
        engine = pick_engine(engine, generator.device)
        on_cuda = generator.device.type == "cuda"
        if engine == "graph" and not (on_cuda or record):
            raise UserError(
                f"engine={engine} records CUDA graphs and this device is {generator.device}; use engine=auto"
            )
        self.generator, self.plan, self.engine = generator, plan, engine
        self._device = generator.device
        fixed = plan.policy is None and not generator.works_on_host
        self.recorded = fixed and engine != "eager" and (on_cuda or record is not None)
        self._own_record, self._largest = record, largest
        self._record: Record = record or GraphRecorder()
        self._recordings: dict[tuple, Recording | None] = {}
        self._too_large: set[tuple] = set()
        self._located: list[Located] | None = None
        if engine == "fused":
            # Moves weights now, not between two recordings.
            generator.fuse_decoding()
            generator.fuse_decoding(False)

    @torch.inference_mode()
    def __call__(
        self,
        condition: Tensor,
        *,
        sampling: Sampling,
        sample_index: Tensor,
        padding: Tensor | None = None,
        known_ids: Tensor | None = None,
        known: Tensor | None = None,
        spatial: SpatialGuidance | None = None,
        num_passes: int | None = None,
        watch: Watch | None = None,
    ) -> Tensor:
        """Decode token ids; arguments, result and errors as in :func:`vgen.sampling.decode.decode`."""
        request = Request.make(
            condition, seed=sampling.seed, sample_index=sample_index, padding=padding, known_ids=known_ids, known=known
        )
        # What autocast keeps of the weights dies with its context, a recording would go on reading it.
        if not self.recorded or watch is not None or torch.is_autocast_enabled(self._device.type):
            check_request(self.generator, self.plan, request, sampling)
            return self._run(request, sampling, spatial, num_passes, watch)
        shapes = tuple((name, value.shape, value.dtype) for name, value in request.tensors().items())
        key = (shapes, _without_seed(sampling), spatial, num_passes)
        recording = self._recordings.get(key)
        # What a recording was made of has been checked, but for the tokens given.
        if recording is None or request.known is not None:
            check_request(self.generator, self.plan, request, sampling)
        if key not in self._recordings or key in self._too_large:
            self._recordings[key] = None
            return self._run(request, sampling, spatial, num_passes)
        del self._recordings[key]
        if recording is None:
            try:
                recording = self._make(request, sampling, spatial, num_passes)
            except torch.OutOfMemoryError:
                self._too_large.add(key)
        if recording is None:
            # A recording holds its memory beside what else is in use; without one the batch still fits.
            self.forget()
            return self._run(request, sampling, spatial, num_passes)
        self._recordings[key] = recording
        return recording.run(request)

    def forget(self) -> None:
        """Drop all recordings and the memory they hold."""
        self._wait()
        self._recordings.clear()
        self._record = self._own_record or GraphRecorder()
        if self._device.type == "cuda":
            with torch.cuda.device(self._device):
                torch.cuda.empty_cache()

    def _wait(self) -> None:
        """Until no recording is being replayed, so that it may be dropped."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _make(
        self, request: Request, sampling: Sampling, spatial: SpatialGuidance | None, num_passes: int | None
    ) -> Recording:
        held = [key for key, recording in self._recordings.items() if recording is not None]
        dropped = held[: max(0, len(held) + 1 - self._largest)]
        if dropped:
            self._wait()
        for key in dropped:
            self._recordings[key] = None
        inputs = Request(**{name: value.clone() for name, value in request.tensors().items()})
        return Recording(inputs, self._record(partial(self._run, inputs, sampling, spatial, num_passes), self._device))

    def _run(
        self,
        request: Request,
        sampling: Sampling,
        spatial: SpatialGuidance | None = None,
        num_passes: int | None = None,
        watch: Watch | None = None,
    ) -> Tensor:
        self.generator.fuse_decoding(self.engine == "fused")
        try:
            return run_passes(
                self.generator,
                self.plan,
                request,
                sampling=sampling,
                spatial=spatial,
                num_passes=num_passes,
                located=self._places(request),
                watch=watch,
            )
        finally:
            self.generator.fuse_decoding(False)

    def _places(self, request: Request) -> list[Located] | None:
        """What the passes take from the places of their slots, looked up once where all samples share one order."""
        plan = self.plan
        if plan.policy is not None or plan.shuffled or (plan.any_order and request.known is not None):
            return None
        if self._located is None:
            tensors = plan.on(self._device)
            self._located = [
                self.generator.locate(forward.feed, tensors.order, forward.mask) for forward in tensors.forwards
            ]
        return self._located
