"""The micro-batches of every step.

The clips of a step are split over micro-steps. In each micro-step, every replica has one micro-batch. (A replica is the
ranks that share clips: one rank without sequence parallelism.) The clips of a step depend only on (seed, step) and the
recipe. So they are the same with any number of replicas, and after any resume.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch

from data_prep.card import NotADataset
from data_prep.places import Remote, no_such_folder, place_of
from rf_train.config import Recipe, Stage
from rf_train.data.latent_dataset import Clip, LatentDataset
from rf_train.data.mixture import MixedDataset
from rf_train.diffusion.batch import Batch
from rf_train.diffusion.randomness import LOSS_DRAWS, make_draws
from rf_train.model.transformer import pad_text

Datasets = dict[str, LatentDataset | MixedDataset]  # by folder, or by the name of a mixture


def open_datasets(recipe: Recipe) -> Datasets:
    """Every dataset that training reads. Raises ValueError when codecs or text encoders differ."""
    names = [recipe.dataset_of(stage) for stage in recipe.stages]
    if "" in names:
        raise ValueError("data.train: no dataset folder is set")
    if recipe.evaluation.every:
        if no_such_folder(place_of(recipe.data.evaluation)):
            raise ValueError(
                f"data.evaluation: {recipe.data.evaluation}: no such folder; evaluation.every needs long held-out clips"
            )
        names.append(recipe.data.evaluation)
    datasets: Datasets = {}
    opened: dict[str, LatentDataset] = {}
    for name in dict.fromkeys(names):
        for folder in recipe.folders_of(name):
            if folder not in opened:
                opened[folder] = open_dataset(folder, recipe)
        mixture, parts = recipe.mixture(name), [opened[folder] for folder in recipe.folders_of(name)]
        datasets[name] = MixedDataset(mixture, parts) if mixture else parts[0]
    first = next(iter(opened.values()))
    for folder, dataset in opened.items():
        for part in ("codec", "text"):
            if dataset.card[part]["hash"] != first.card[part]["hash"]:
                raise ValueError(f"{folder}: its {part} is not that of {first.folder}; a run can't mix them")
    if recipe.evaluation.every:
        sizes = [(d.card["latent"]["height"], d.card["latent"]["width"]) for d in (first, opened[names[-1]])]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"data.evaluation: {names[-1]} has latents of {sizes[1][0]}x{sizes[1][1]}, {first.folder} of "
                f"{sizes[0][0]}x{sizes[0][1]}; evaluation.every needs the same size"
            )
    for stage in recipe.stages:
        datasets[recipe.dataset_of(stage)].clip_frames(stage)
    return datasets


def open_dataset(name: str, recipe: Recipe) -> LatentDataset:
    """The dataset in a folder or at an address. Raises ValueError; where none is, it names the mixtures."""
    try:
        return LatentDataset(name, recipe.model, recipe.data.patience)
    except NotADataset as error:
        mixtures = ", ".join(mixture.name for mixture in recipe.data.mixtures)
        raise NotADataset(f"{error}{f'; data.mixtures has {mixtures}' if mixtures else ''}") from None


def longest_wait(recipe: Recipe) -> float:
    """Seconds that a rank may wait for its clips: data.patience if a dataset is remote, else 0."""
    names = [recipe.data.evaluation, *(recipe.dataset_of(stage) for stage in recipe.stages)]
    addresses = [folder for name in names for folder in recipe.folders_of(name)]
    return recipe.data.patience if any(isinstance(place_of(one), Remote) for one in addresses) else 0.0


def micro_steps(stage: Stage, micro_batch: int, replicas: int) -> int:
    """Micro-steps in a step of `stage`. Raises ValueError when its batch doesn't split evenly."""
    if stage.batch % (micro_batch * replicas):
        split = f"optimizer.micro_batch={micro_batch} x {replicas} replicas"
        raise ValueError(f"stage {stage.name}: batch={stage.batch} is not a multiple of {split}")
    return stage.batch // (micro_batch * replicas)


def step_batches(recipe: Recipe, datasets: Datasets, step: int, replica: int, replicas: int) -> list[Batch]:
    """The micro-batches of one replica in the 0-based `step`, one per micro-step, on the CPU."""
    stage, begin, _ = recipe.span_at(step)
    name, size = recipe.dataset_of(stage), recipe.optimizer.micro_batch
    earlier = [span for span in recipe.stage_spans if span.end <= begin and recipe.dataset_of(span.stage) == name]
    done = [(span.stage.steps, span.stage.batch) for span in earlier]
    dataset = datasets[name]
    places = dataset.places(recipe.run.seed, done, step - begin, stage.batch)
    begins = [(micro * replicas + replica) * size for micro in range(micro_steps(stage, size, replicas))]
    own: list = [place for begin in begins for place in places[begin : begin + size]]
    clips = dataset.clips_at(recipe.run.seed, own, dataset.clip_frames(stage))
    return [
        _make_batch(recipe, stage, dataset, step, clips[begin : begin + size]) for begin in range(0, len(clips), size)
    ]


def _make_batch(
    recipe: Recipe, stage: Stage, dataset: LatentDataset | MixedDataset, step: int, clips: list[Clip]
) -> Batch:
    """A micro-batch of these clips, with their random numbers of `step`."""
    frames = dataset.clip_frames(stage)
    ids = [clip.id for clip in clips]
    x = torch.stack([clip.latent for clip in clips])
    sizes = recipe.model.chunking.sizes(frames)
    wanted = {**LOSS_DRAWS, **stage.history.draws}
    draws = make_draws(wanted, recipe.run.seed, step, ids, tuple(x.shape[1:]), len(sizes))
    dropped = (draws["caption_dropout"] < recipe.flow.caption_dropout).tolist()
    captions = [dataset.empty_caption if drop else clip.text for drop, clip in zip(dropped, clips)]
    damaged = [damage.line() for clip in clips for damage in clip.damage]
    return Batch(ids, x, pad_text(captions, recipe.model), draws, sizes, damaged=damaged)


def steps(
    recipe: Recipe, datasets: Datasets, first: int, replica: int, replicas: int, pin: bool = False,
    interrupted: Callable[[], object] = lambda: False,
) -> Iterator[tuple[int, list[Batch]]]:  # fmt: skip
    """Yields (step, its micro-batches) from step `first` to the recipe's end; with `pin` in page-locked memory.

    `data.workers` threads read the next steps, one each, while this one is computed; with 0, one thread reads each step
    when it is asked for. The steps are the same for any number of them. Who stops early does not wait for the threads.
    When it is `interrupted` while it waits for them, it yields no micro-batches, and ends.
    """

    def read(step: int) -> list[Batch]:
        batches = step_batches(recipe, datasets, step, replica, replicas)
        return [batch.pinned() for batch in batches] if pin else batches

    readers = ThreadPoolExecutor(max(1, recipe.data.workers), "reader")
    try:
        ahead: deque[Future[list[Batch]]] = deque()
        for step in range(first, recipe.steps):
            while len(ahead) <= recipe.data.workers and step + len(ahead) < recipe.steps:
                ahead.append(readers.submit(read, step + len(ahead)))
            while not wait([ahead[0]], timeout=0.5).done:
                if interrupted():
                    yield step, []
                    return
            yield step, ahead.popleft().result()
    finally:
        readers.shutdown(wait=False, cancel_futures=True)
