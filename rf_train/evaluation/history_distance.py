"""How far training's history, made with few solver steps, is from one that is made with as many as the sampler uses."""

import dataclasses

import torch
from torch import Tensor

from rf_train.data.latent_dataset import LatentDataset
from rf_train.diffusion.batch import Batch
from rf_train.diffusion.flow_matching import mean_by_chunk
from rf_train.diffusion.histories import Autoregressive, Resampled, make_history
from rf_train.diffusion.randomness import make_draws
from rf_train.generation.generator import Generator
from rf_train.model.chunks import Attention
from rf_train.model.transformer import VelocityModel, pad_text


@torch.no_grad()
def solver_distance(
    model: VelocityModel, history: Autoregressive, solver_steps: int, batch: Batch, attention: Attention
) -> dict[str, Tensor]:
    """How far training's history is from the one that a finer solver makes from the same noise.

    Root mean square distances per clip and chunk, each [B, N - 1]. "solver": between x~ with `history.solver_steps`
    Euler steps and x~ with `solver_steps`. "truth" and "truth_fine": between each of the two and the clean clip.
    """
    fine_history = dataclasses.replace(history, solver_steps=solver_steps)
    ours, fine = (make_history(kind, batch, attention, model)[0] for kind in (history, fine_history))
    assert ours is not None and fine is not None
    clean = batch.x[:, :, : ours.shape[2]]

    def distance(one: Tensor, other: Tensor) -> Tensor:
        return mean_by_chunk((one - other).square().mean(dim=(1, 3, 4)), batch.chunk_sizes[:-1]).sqrt()

    return {"solver": distance(ours, fine), "truth": distance(ours, clean), "truth_fine": distance(fine, clean)}


def evaluate_history(generator: Generator, dataset: LatentDataset, clips: int, batch: int, seed: int) -> dict | None:
    """The mean `solver_distance` over the dataset's clips, cut to the trained length, with the last stage's settings.

    None when that length is a single chunk.
    """
    if generator.trained_chunks < 2:
        return None
    recipe, stage = generator.recipe, generator.recipe.stages[-1]
    history = Autoregressive()
    if isinstance(stage.history, Resampled):
        history = Autoregressive(t_shift=stage.history.t_shift, solver_steps=stage.history.solver_steps)
    frames, steps = min(generator.trained_frames, dataset.card["latent"]["frames"]), recipe.flow.sampling_steps
    sizes = generator.model.chunking.sizes(frames)
    found = []
    for begin in range(0, min(clips, len(dataset)), batch):
        indices = range(begin, min(begin + batch, clips, len(dataset)))
        samples = [dataset.read(index, frames) for index in indices]
        x = torch.stack([latent for latent, _, _ in samples])
        text = pad_text([text for _, text, _ in samples], recipe.model)
        ids = [f"evaluation {dataset.key(index)}" for index in indices]
        draws = make_draws(history.draws, seed, 0, ids, tuple(x.shape[1:]), len(sizes))
        clip = Batch(ids, x, text, draws, sizes).to(generator.device)
        found.append(solver_distance(generator.model, history, steps, clip, stage.attention))
    by_chunk = {name: torch.cat([part[name] for part in found]).double().mean(0).tolist() for name in found[0]}
    settings = {"solver_steps": history.solver_steps, "fine_solver_steps": steps, "t_shift": history.t_shift}
    return {**settings, **by_chunk}
