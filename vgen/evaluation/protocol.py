"""How a paper's number was measured, and what a job did differently."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vgen.errors import UserError


@dataclass(frozen=True)
class Protocol:
    """A published way of measuring, stated so that a job can follow it and a report can say where it did not.

    Attributes:
        name: of the protocol, the same as its configuration file.
        source: paper, repository or thread that states it.
        num_samples: samples scored; the default of ``num_samples``.
        image_size: side of the pictures or frames in pixels.
        labels: how classes are asked of a generator; the default of ``labels``.
        reference: what the samples are compared with, in words.
        num_reference: real pictures or clips behind the statistics, None if the source does not say.
        reference_sha256: of the published reference file, None if not known.
        clip_frames: frames of a clip, None for pictures.
        figures: published figures measured this way, name to value, to check a setup against.
        remarks: what a reader should know before quoting the number.
    """

    name: str
    source: str
    num_samples: int | None
    image_size: int | None
    labels: str | None
    reference: str
    num_reference: int | None = None
    reference_sha256: str | None = None
    clip_frames: int | None = None
    figures: Mapping[str, float] | None = None
    remarks: str | None = None

    def __post_init__(self) -> None:
        for key in ("num_samples", "image_size", "num_reference", "clip_frames"):
            value = getattr(self, key)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise UserError(f"evaluation.protocol.{key}={value} must be a whole number of at least 1, or null")

    def deviations(
        self,
        *,
        num_samples: int,
        size: tuple[int, int],
        labels: str | None,
        num_reference: int | None,
        reference_sha256: str | None,
    ) -> list[str]:
        """What a job did differently, for the report.

        Args:
            num_samples: samples scored.
            size: (height, width) of the samples.
            labels: how classes were asked for, None where the samples came from elsewhere.
            num_reference: real items scored, None if unknown.
            reference_sha256: of the reference file, None where there is none.
        """
        found = []
        if self.num_samples not in (None, num_samples):
            found.append(f"{num_samples} samples, {self.name} uses {self.num_samples}")
        if self.image_size is not None and size != (self.image_size, self.image_size):
            found.append(f"samples of {size[1]}x{size[0]}, {self.name} uses {self.image_size}x{self.image_size}")
        if None not in (self.labels, labels) and labels != self.labels:
            found.append(f"labels={labels}, {self.name} uses {self.labels}")
        if None not in (self.num_reference, num_reference) and num_reference != self.num_reference:
            found.append(f"{num_reference} reference items, {self.name} uses {self.num_reference}")
        if None not in (self.reference_sha256, reference_sha256) and reference_sha256 != self.reference_sha256:
            found.append(f"another reference file than that of {self.name}")
        return found

    def describe(self) -> dict[str, Any]:
        """What a report says about the protocol."""
        return {**asdict(self), "figures": dict(self.figures or {})}
