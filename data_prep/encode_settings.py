"""The settings that a dataset is made with, and what they mean for a video."""

from dataclasses import dataclass

from data_prep.buckets import Size, size_name
from data_prep.codecs import Codec
from data_prep.cuts import THRESHOLD
from data_prep.decoder_worker import Span
from data_prep.geometry import LatentGeometry
from data_prep.rows import Row, fingerprints
from data_prep.text import TextEncoder


@dataclass(frozen=True)
class EncodeSettings:
    """The settings that a dataset is made with; `codec` and `text` as on the command line."""

    fps: float  # frames per second
    size: Size  # (height, width) in pixels; that of the first bucket, if there are any
    frames: int  # video frames of a clip
    codec: str = "default"
    text: str = "default"
    samples_per_shard: int = 256
    videos_per_part: int = 64
    precision: str = "auto"  # of the Wan VAE: auto, bf16 or fp32
    stride: int = 0  # a clip begins every so many frames; 0: every `frames`
    buckets: tuple[Size, ...] = ()  # a dataset for each of these sizes
    cuts: float = 0.0  # threshold of the detector of scene cuts, see `cuts.py`; 0: there is none
    drop_duplicates: bool = False  # videos with the same bytes and span are left out but for the first

    batch: int = 1  # clips that are encoded at once, see `batching.py`; 0: what fits, which the first job finds out

    # These don't change the dataset.
    device: str = "cpu"
    workers: int = 1  # processes that decode
    max_failures: float = 1.0  # share of a job's videos

    def validate(self, geometry: LatentGeometry) -> None:
        """Raises a one-line ValueError for invalid settings."""
        for size in self.buckets or [self.size]:
            geometry.check_patches(*size)
            geometry.latent_shape(self.frames, *size)
        if not 0.01 <= self.fps <= 1000:
            raise ValueError(f"fps {self.fps}: must be from 0.01 to 1000")
        if not (self.cuts == 0 or 0.1 <= self.cuts <= 255):
            raise ValueError(f"cuts {self.cuts}: a threshold from 0.1 to 255, such as {THRESHOLD:g}")
        if self.stride < 0:
            raise ValueError(f"stride {self.stride}: must be at least 1")
        for name in ("samples_per_shard", "videos_per_part", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name.replace('_', ' ')} must be at least 1, not {getattr(self, name)}")
        if self.batch < 0:
            raise ValueError(f"batch {self.batch}: must be at least 1")
        if not 0 <= self.max_failures <= 1:
            raise ValueError(f"max failures {self.max_failures}: a share, from 0 to 1")

    @property
    def clip_stride(self) -> int:
        """Frames from the begin of a clip to that of the next."""
        return self.stride or self.frames

    @property
    def whole_fps(self) -> float:
        """fps, as an int where it is one: 16 and 16.0 make the same bytes."""
        return int(self.fps) if self.fps == int(self.fps) else self.fps

    def record(self, codec: Codec | None, text: TextEncoder, rows: list[Row]) -> dict:
        """Settings and source, as the card records them. Two datasets with the same record are the same.

        `rows` are those of the whole source, also for a bucket.
        """
        chosen: dict = {"buckets": ",".join(map(size_name, self.buckets))} if self.buckets else {}
        chosen |= {"cuts": self.cuts} if self.cuts else {}
        chosen |= {"drop_duplicates": True} if self.drop_duplicates else {}
        chosen |= {"batch": self.batch} if self.batch != 1 else {}
        return {
            "fps": self.whole_fps,
            "height": self.size[0],
            "width": self.size[1],
            "frames": self.frames,
            "stride": self.clip_stride,
            "codec": codec_record(codec),
            "text": f"{text.name} {text.hash}",
            "samples_per_shard": self.samples_per_shard,
            "videos_per_part": self.videos_per_part,
            **chosen,
            **fingerprints(rows),
        }


def codec_record(codec: Codec | None) -> str:
    """What settings record of a codec; None: the built-in one, which is fitted to the source."""
    if codec is None:
        return "default, fitted"
    return f"{codec.name} {codec.hash} {codec.settings.get('dtype', 'float32')}"


def span_of(row: Row, settings: EncodeSettings, skip: int) -> Span:
    """What to decode of a video: all whole clips but the first `skip`."""
    size, frames, stride = row.size or settings.size, settings.frames, settings.clip_stride
    return Span(
        row.path,
        settings.fps,
        size,
        frames,
        row.start,
        row.end,
        skip=skip,
        stride=stride,
        region=row.region,
        cuts=row.cuts,
        cut_threshold=settings.cuts,
    )
