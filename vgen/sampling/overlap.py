"""Where the two parts of a batch run: tokens, then pixels, in turn, or beside those of its neighbours on a GPU.

Deciding tokens moves bytes and a convolutional decoder multiplies, so a GPU has something left for one while it does
the other: while the pixels of a batch are decoded on one stream, the tokens of the next are decided on a second one of
higher priority, and a third copies finished samples to the host. Where both keep the whole device busy they hold each
other up; then one stream for both is faster, and only the copies and what the host does lie beside them.
"""

from collections.abc import Callable
from functools import cache
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor

Decode = Callable[[], Tensor]
Finish = Callable[[Tensor], Tensor]
Ready = Callable[[], Tensor]


class Lanes(Protocol):
    """Runs the two parts of batches; used as a context, on leaving which nothing is left running.

    Attributes:
        ahead: batches worth starting before the oldest one is fetched.
    """

    ahead: int

    def __enter__(self) -> "Lanes":
        """Begin after what the device was told before."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Have what the device is told later wait for what was started here."""

    def start(self, decode: Decode, finish: Finish) -> Ready:
        """Start a batch.

        Args:
            decode: makes tokens, on the device.
            finish: makes samples of them, uint8, on the device.

        Returns:
            A function that waits for the samples and returns them on the CPU; to be called once, in the order of the
            starts.

        Raises:
            torch.OutOfMemoryError: by either part; what was started before is not affected.
        """

    def wait(self) -> None:
        """Wait for everything that was started."""


class InTurn:
    """One part after the other, batch by batch."""

    ahead = 0

    def __enter__(self) -> "InTurn":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def start(self, decode: Decode, finish: Finish) -> Ready:
        """See :class:`Lanes`."""
        samples = finish(decode()).cpu()
        return lambda: samples

    def wait(self) -> None:
        """Nothing runs outside of :meth:`start`."""


class SideBySide:
    """Tokens, pixels and copies to the host on three streams of a CUDA device.

    One thread starts the batches, so nothing is launched or allocated while a decoding is recorded as a graph; the
    recorder waits for the whole device first. Tensors that cross streams are kept until their batch is finished: the
    allocator could otherwise give their memory to the stream they came from while another still reads them.

    Args:
        device: a CUDA device.
        apart: tokens and pixels on a stream each; otherwise they share one.
    """

    ahead = 1

    def __init__(self, device: torch.device, apart: bool = True) -> None:
        self._device = device
        tokens, pixels, copies = _streams(device)
        self._streams = self._tokens, self._pixels, self._copies = tokens, pixels if apart else tokens, copies
        self._buffers: list[Tensor] = []

    def __enter__(self) -> "SideBySide":
        for stream in self._streams:
            stream.wait_stream(torch.cuda.current_stream(self._device))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for stream in self._streams:
            torch.cuda.current_stream(self._device).wait_stream(stream)

    def start(self, decode: Decode, finish: Finish) -> Ready:
        """See :class:`Lanes`; returns as soon as the device knows what to do."""
        with torch.cuda.stream(self._tokens):
            tokens = decode()
        self._pixels.wait_stream(self._tokens)
        with torch.cuda.stream(self._pixels):
            samples = finish(tokens).contiguous()
        self._copies.wait_stream(self._pixels)
        buffer = self._buffer(samples.numel())
        on_host = buffer[: samples.numel()].view(samples.shape)
        with torch.cuda.stream(self._copies):
            on_host.copy_(samples, non_blocking=True)
            # Blocking leaves the core to those who write files.
            copied = self._copies.record_event(torch.cuda.Event(blocking=True))
        held = [tokens, samples]

        def ready() -> Tensor:
            copied.synchronize()
            held.clear()
            result = on_host.clone()
            self._buffers.append(buffer)
            return result

        return ready

    def wait(self) -> None:
        """See :class:`Lanes`."""
        torch.cuda.synchronize(self._device)

    def _buffer(self, size: int) -> Tensor:
        """Pinned uint8 memory of at least a size; no more of it than batches that were started and not fetched.

        It stays here: if a writer's thread freed it, that could break off a recording.
        """
        large = [buffer for buffer in self._buffers if buffer.numel() >= size]
        if large:
            self._buffers = [buffer for buffer in self._buffers if buffer is not large[0]]
            return large[0]
        self._buffers.clear()
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def lanes_of(device: torch.device, apart: bool = True) -> Lanes:
    """The lanes of a device: side by side on CUDA, see :class:`SideBySide`, in turn elsewhere."""
    return SideBySide(device, apart) if device.type == "cuda" else InTurn()


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; from the CPU without waiting for what the device is doing."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@cache
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream, torch.cuda.Stream]:
    """For tokens, pixels and copies; the same for every job, since the allocator keeps memory by stream."""
    return torch.cuda.Stream(device, priority=-1), torch.cuda.Stream(device), torch.cuda.Stream(device)
