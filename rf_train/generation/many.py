"""Many prompts, many videos, any number of processes: each video is made once, and no file is ever half of one.

    OUT/job.json           what is made and how, and every video with its prompt and its seed
    OUT/00007-1.mp4        video 1 of prompt 7, counted from 0; it appears when it is whole
    OUT/.locks/            who makes what now

The videos are cut into batches, always in the same way. A process takes the first batch that is not done and that no
other process holds. The operating system frees what a killed process held. So processes may come, go and be restarted
in any number, and the videos are the same bytes: a video depends on its prompt, its seed, and the videos in its batch.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep.files import write_json
from data_prep.video import VideoWriter
from rf_train.engine.shared_work import claimed, held
from rf_train.generation.generator import Generator
from rf_train.generation.memory import BatchPlan
from rf_train.generation.prompts import Prompts, seed_of
from rf_train.generation.stream import Videos
from rf_train.settings import differences

JOB = "job.json"


@dataclass(frozen=True)
class Job:
    """A folder of videos to make: `settings` are all that the videos' bytes depend on."""

    out: Path
    settings: dict[str, Any]
    plan: BatchPlan
    videos: list[dict[str, Any]]  # {"file", "prompt", "seed"}

    @property
    def batches(self) -> list[list[dict[str, Any]]]:
        size = self.plan.videos
        return [self.videos[begin : begin + size] for begin in range(0, len(self.videos), size)]

    def missing(self, videos: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Those of `videos` that are not there yet."""
        return [video for video in videos if not (self.out / video["file"]).exists()]

    @property
    def locks(self) -> Path:
        return self.out / ".locks"

    @property
    def batch_names(self) -> list[str]:
        """The names of the batches' locks."""
        return [f"batch-{number:05d}" for number in range(len(self.batches))]


def open_job(out: str | Path, settings: dict, prompts: list[str], samples: int, seed: int, plan: BatchPlan) -> Job:
    """Begins a job, or goes on with the one in `out`, whose own batch plan then counts.

    Raises ValueError when `out` is a job with other settings or prompts, or no job at all.
    """
    out = Path(out)
    videos = [
        {"file": f"{index:05d}-{sample}.mp4", "prompt": prompt, "seed": seed_of(seed, prompt, sample)}
        for index, prompt in enumerate(prompts)
        for sample in range(samples)
    ]
    # As JSON gives them back.
    wanted = json.loads(json.dumps({**settings, "seed": seed, "samples": samples, "prompts": prompts}))
    job = Job(out, wanted, plan, videos)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: not a folder; many videos go into one")
    if out.is_dir() and not (out / JOB).exists() and any(path.name != ".locks" for path in out.iterdir()):
        raise ValueError(f"{out}: not empty, and has no {JOB}; choose another folder")
    with held(job.locks / "job"):
        path = out / JOB
        if not path.exists():
            write_json(path, {"settings": wanted, "plan": vars(plan), "videos": videos})
            return job
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            plan = BatchPlan(**found["plan"])
            changed = differences(found["settings"], wanted)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{path}: not a job of this version; choose another folder") from None
    if changed:
        name, before, now = changed[0]
        raise ValueError(f"{out}: made with {name} {before!r}, now {now!r}; choose another folder")
    return Job(out, wanted, plan, videos)


def make_batches(job: Job, like: Videos, rank: int, world_size: int) -> int:
    """Makes batches until all are done, or held by others. Returns how many videos this process made.

    `like`: the generator, the length and the negative prompt. Where a file system has no locks, ranks begin at
    different batches, and at worst make the same bytes twice. Ranks that make each video together are one here, and its
    leader chooses the batch.
    """
    batches, made, leads = job.batches, 0, like.generator.leads
    with tqdm(total=len(job.videos), unit="video", desc=f"rank {rank}", disable=rank > 0 or not leads) as bar:
        for number in batches_to_make(job, like.generator, rank * len(batches) // world_size):
            made += len(make_batch(job, like, batches[number]))
            bar.update(len(job.videos) - len(job.missing(job.videos)) - bar.n)
    return made


def batches_to_make(job: Job, generator: Generator, first: int) -> Iterator[int]:
    """The numbers of the batches that this process takes part in; see `make_batches`."""
    mine = (
        number for number in claimed(job.locks, job.batch_names, first) if job.missing(job.batches[number])
    )  # looked at by the leader only
    while (number := generator.tell(lambda: next(mine, None))) is not None:
        yield number


def make_batch(job: Job, like: Videos, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Makes a batch, and writes those of its videos that are missing. Returns these; none on a rank that only helps.

    All of the batch is computed, also when some videos are there: their bytes depend on it.
    """
    videos = Videos(
        like.generator, [Prompts.of_line(video["prompt"]) for video in batch], [video["seed"] for video in batch],
        like.seconds, like.negative, guidance_in_one_batch=job.plan.guidance_in_one_batch,
    )  # fmt: skip
    if not like.generator.leads:
        for _ in videos.latents():
            pass
        return []
    missing = job.missing(batch)
    with contextlib.ExitStack() as stack:
        writers = {
            number: stack.enter_context(VideoWriter(job.out / video["file"], like.fps))
            for number, video in enumerate(batch)
            if video in missing
        }
        for chunk in videos.chunks():
            for number, writer in writers.items():
                writer.write(chunk[number])
    return missing
