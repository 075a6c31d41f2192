"""The built-in codec, fitted to the videos of a source."""

import itertools
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_prep.decoder import Decoders
from data_prep.default_codec import FIT_CLIPS, DefaultCodec
from data_prep.encode_parts import NoClip, no_clip
from data_prep.encode_settings import EncodeSettings, span_of
from data_prep.rows import Row

FIT_FRAMES = 17  # at most this many frames per clip of the fit, if pictures are larger than FIT_SIDE x FIT_SIDE
FIT_SIDE = 128
FIT_SEED = 0


def fit_codec(rows: list[Row], settings: EncodeSettings, src: str | Path) -> DefaultCodec:
    """Fits the built-in codec to the source, in all its buckets. Raises NoClip if there is no clip to fit it on."""
    began = time.monotonic()
    problems: Counter[str] = Counter()
    with Decoders(settings.workers) as decoders:
        found = fitting_clips(rows, settings, decoders, problems)
        clips = iter(tqdm(found, desc="fit codec", unit="clip", leave=False))
        first = next(clips, None)
        if first is None:
            raise NoClip(no_clip(src, len(rows), dict(sorted(problems.items()))))
        codec = DefaultCodec.fit(itertools.chain([first], clips), FIT_SEED)
    seconds = time.monotonic() - began
    print(f"fitted the default codec on {codec.settings['clips']} clips in {seconds:.1f} s", file=sys.stderr)
    return codec


def fitting_clips(
    rows: list[Row], settings: EncodeSettings, decoders: Decoders, problems: Counter[str]
) -> Iterator[np.ndarray]:
    """Yields up to FIT_CLIPS clips, uint8 [T, H, W, 3], from random places all over the source, for the codec's fit.

    Clips of large pictures have at most FIT_FRAMES frames. Videos that cannot be read are skipped, and their reasons
    counted in `problems`.
    """
    rng = np.random.default_rng(FIT_SEED)
    order, found, turn = [rows[i] for i in rng.permutation(len(rows)) if not rows[i].trouble], 0, 0
    problems.update(row.trouble.reason for row in rows if row.trouble)
    while order and found < FIT_CLIPS:
        again = []
        for row in order:
            if found == FIT_CLIPS:
                break
            whole = span_of(row, settings, 0)
            small = whole.size[0] * whole.size[1] <= FIT_SIDE**2
            length = settings.frames if small else min(settings.frames, FIT_FRAMES)
            for place in (rng.random(), 0.0):  # the video may end early
                span = replace(whole, frames=length, clips=1, place=place)
                videos = decoders.videos([span])
                video = next(videos)
                clip = next(video, None)
                if clip is not None:
                    break
            if clip is None:
                problems[video.problem.reason if video.problem else "too short"] += 1
                continue
            found += 1
            yield clip
            next(video, None)  # then its room is known
            if (turn + 1) * length / settings.fps < video.room:  # a longer video may be used again
                again.append(row)
        order, turn = again, turn + 1
