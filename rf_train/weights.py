"""Reads and writes checkpoints of Wan's transformer, slice by slice.

It reads a diffusers `WanTransformer3DModel` folder, or the original Wan checkpoint: one safetensors file, or several
with an index. It also reads a .pt file of Self-Forcing and its children: its generator, that is, the average if it is
there. It writes the diffusers format, or a .pt file that is their `generator_ckpt`:

    python -m rf_train.weights RUN OUT
    python -m rf_train.weights RUN OUT.pt
"""

import argparse
import json
import math
import os
import pickle
import re
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from data_prep.command import Help, run_command
from data_prep.files import sync, temporary_beside, write_json
from rf_train import config
from rf_train.engine import checkpoint
from rf_train.engine.checkpoint import CheckpointReader
from rf_train.generation.model_card import describe
from rf_train.model.settings import ModelSettings

# Original Wan names -> diffusers' names, which are the model's own. The original calls the norm before cross-attention
# norm3.
_RENAMED = [
    (r"^time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
    (r"^time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
    (r"^text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
    (r"^text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
    (r"^time_projection\.1\.", "condition_embedder.time_proj."),
    (r"^head\.head\.", "proj_out."),
    (r"^head\.modulation$", "scale_shift_table"),
    (r"\.modulation$", ".scale_shift_table"),
    (r"\.self_attn\.", ".attn1."),
    (r"\.cross_attn\.", ".attn2."),
    (r"(\.attn[12])\.([qkv])\.", r"\1.to_\2."),
    (r"(\.attn[12])\.o\.", r"\1.to_out.0."),
    (r"\.norm3\.", ".norm2."),
    (r"\.ffn\.0\.", ".ffn.net.0.proj."),
    (r"\.ffn\.2\.", ".ffn.net.2."),
]


def from_wan_name(name: str) -> str:
    """The diffusers name of a tensor of the original Wan checkpoint."""
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


# The same the other way.
_ORIGINAL = [
    (r"^scale_shift_table$", "head.modulation"),
    (r"^proj_out\.", "head.head."),
    (r"^condition_embedder\.(time|text)_embedder\.linear_1\.", r"\1_embedding.0."),
    (r"^condition_embedder\.(time|text)_embedder\.linear_2\.", r"\1_embedding.2."),
    (r"^condition_embedder\.time_proj\.", "time_projection.1."),
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"\.to_out\.0\.", ".o."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.norm2\.", ".norm3."),
    (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
    (r"\.ffn\.net\.2\.", ".ffn.2."),
    (r"\.scale_shift_table$", ".modulation"),
]


def to_wan_name(name: str) -> str:
    """The name in the original Wan checkpoint of a tensor, whose diffusers name this is."""
    for pattern, replacement in _ORIGINAL:
        name = re.sub(pattern, replacement, name)
    return name


class StoredTensor(NamedTuple):
    """Where a tensor is: its file, its name there, and its shape."""

    path: Path
    key: str
    shape: tuple[int, ...]


class TensorSlice:
    """A whole tensor with the methods that safetensors' slices have."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def __getitem__(self, rows: slice) -> Tensor:
        return self.tensor[rows]


class GeneratorFile:
    """The generator of a .pt file of Self-Forcing, with the methods that an open safetensors file has.

    The file is mapped into memory, and read where it is asked for. Nothing in it is executed. Raises a one-line
    ValueError for anything else.
    """

    def __init__(self, path: Path):
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
            reason = str(error).strip().split("\n")[0]
            raise ValueError(f"{path}: not a .pt file of tensors alone, as torch.save writes it ({reason})") from None
        kinds = [kind for kind in ("generator_ema", "generator") if isinstance(found, dict) and kind in found]
        tensors = found[kinds[0]] if kinds else None
        if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
            raise ValueError(f"{path}: holds no tensors under `generator` or `generator_ema`")
        # `model.` is their wrapper; the other one is left over by FSDP.
        names = {name: name.replace("_fsdp_wrapped_module.", "").removeprefix("model.") for name in tensors}
        self.tensors = {names[name]: tensor for name, tensor in tensors.items()}

    def keys(self) -> list[str]:
        return list(self.tensors)

    def get_tensor(self, name: str) -> Tensor:
        return self.tensors[name]

    def get_slice(self, name: str) -> TensorSlice:
        return TensorSlice(self.tensors[name])


class WeightFiles:
    """The tensors of a checkpoint folder (or of one .safetensors or .pt file), by diffusers name, read on demand.

    Raises a one-line ValueError for anything that isn't a complete checkpoint.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.tensors: dict[str, StoredTensor] = {}
        self._open: dict[Path, Any] = {}
        for path in self._files():
            try:
                file = self._open[path] = GeneratorFile(path) if path.suffix == ".pt" else safe_open(path, "pt")
                shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path}: not a whole safetensors file: {error}") from None
            original = any(".self_attn." in key or key.startswith(("time_embedding.", "head.")) for key in shapes)
            for key, shape in shapes.items():
                name = key.removeprefix("model.diffusion_model.")
                self.tensors[from_wan_name(name) if original else name] = StoredTensor(path, key, shape)

    def _files(self) -> list[Path]:
        if self.folder.is_file():
            return [self.folder]
        if not self.folder.is_dir():
            raise ValueError(f"{self.folder}: no such folder of weights")
        indices = sorted(self.folder.glob("*.safetensors.index.json"))
        if len(indices) > 1:
            names = ", ".join(path.name for path in indices)
            raise ValueError(f"{self.folder}: holds {len(indices)} weight indices, expected one: {names}")
        if indices:
            return self._files_of_index(indices[0])
        files = sorted(self.folder.glob("*.safetensors"))
        if len(files) != 1:
            expected = "expected one file, or several with an index"
            raise ValueError(f"{self.folder}: holds {len(files)} safetensors files and no index; {expected}")
        return files

    def _files_of_index(self, index: Path) -> list[Path]:
        try:
            listed = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ValueError(f"{index}: not an index of weights") from None
        bad = [name for name in listed if Path(name).name != name or not (self.folder / name).is_file()]
        if bad:
            raise ValueError(f"{index}: lists files that are not in the folder: {', '.join(bad)}")
        return [self.folder / name for name in listed]

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raises one ValueError that names all tensors that are missing, extra or of another shape."""
        stored = {name: tensor.shape for name, tensor in self.tensors.items()}
        wrong = checkpoint.shape_differences(stored, shapes)
        if wrong:
            raise ValueError(f"{self.folder}: the weights do not fit the model: {wrong}")

    def flat(self, name: str, begin: int, end: int) -> Tensor:
        """Elements begin .. end - 1 of the flattened tensor, fp32. Only the rows that hold them are read."""
        path, key, shape = self.tensors[name]
        if begin >= end:
            return torch.zeros(0)
        if not shape:
            return self._open[path].get_tensor(key).float().reshape(1)
        row = math.prod(shape[1:])
        first, last = begin // row, -(-end // row)
        rows = self._open[path].get_slice(key)[first:last].float().reshape(-1)
        return rows[begin - first * row : end - first * row]

    def whole(self, name: str) -> Tensor:
        """The tensor in its shape, fp32."""
        shape = self.tensors[name].shape
        return self.flat(name, 0, math.prod(shape)).view(shape)


@torch.no_grad()
def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Fills a plain model from a checkpoint folder, one tensor at a time.

    For an engine, use `TrainingState.load_weights`.
    """
    files = WeightFiles(folder)
    parameters = dict(model.named_parameters())
    files.check({name: tuple(parameter.shape) for name, parameter in parameters.items()})
    for name, parameter in parameters.items():
        parameter.copy_(files.whole(name))


def diffusers_config(settings: ModelSettings) -> dict:
    """What `WanTransformer3DModel.from_pretrained` reads as config.json."""
    return {
        "_class_name": "WanTransformer3DModel",
        "patch_size": [1, settings.patch, settings.patch],
        "num_attention_heads": settings.heads,
        "attention_head_dim": settings.head_dim,
        "in_channels": settings.channels,
        "out_channels": settings.channels,
        "text_dim": settings.text_dim,
        "freq_dim": settings.freq_dim,
        "ffn_dim": settings.ffn_dim,
        "num_layers": settings.layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": settings.eps,
        "image_dim": None,
        "added_kv_proj_dim": None,
        "rope_max_seq_len": 1024,
    }


def export(
    run: str | Path,
    out: str | Path,
    step: int = 0,
    kind: str = "ema",
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = 5 * 2**30,
    licence: str = "",
) -> Path:
    """Writes a run's checkpoint as a diffusers folder, in files of at most `shard_bytes`, with a card and an example.

    What is beside the weights: see `generation/model_card.py`. `licence` is that of the weights, for the card.
    `kind` is "ema", the average, or "master", the last weights. `out` appears only when it is complete. Raises
    ValueError if it exists already, or if `run` has no such checkpoint.
    """
    run, out = Path(run), Path(out)
    folder, manifest = _to_export(run, out, step)
    recipe = config.load(run / "recipe.yaml")
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in manifest["shapes"].items()}
    files = _split_by_size(sizes, shard_bytes)
    making = out.with_name(out.name + ".making")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    with CheckpointReader(folder, manifest) as reader:
        for file, names in files.items():
            tensors = {name: reader.whole(kind, name).to(dtype).contiguous() for name in names}
            save_file(tensors, making / file, metadata={"format": "pt"})
    if len(files) > 1:
        weight_map = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json(making / "diffusion_pytorch_model.safetensors.index.json", index)
    write_json(making / "config.json", diffusers_config(recipe.model))
    describe(making, recipe, checkpoint.step_of(folder), kind, licence)
    making.rename(out)
    return out


def export_generator(
    run: str | Path, out: str | Path, step: int = 0, kind: str = "ema", dtype: torch.dtype = torch.float32
) -> Path:
    """Writes a run's checkpoint as a .pt file that Self-Forcing loads as `generator_ckpt`, for training and inference.

    `kind` is "ema", the average, or "master", the last weights; the file has it as `generator` and `generator_ema`,
    stored once. Holds the whole model in memory. `out` appears only when it is complete. Raises ValueError if it exists
    already, or if `run` has no such checkpoint.
    """
    out = Path(out)
    folder, manifest = _to_export(Path(run), out, step)
    with CheckpointReader(folder, manifest) as reader:
        tensors = {f"model.{to_wan_name(name)}": reader.whole(kind, name).to(dtype) for name in manifest["shapes"]}
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(out)
    try:
        torch.save({"generator": tensors, "generator_ema": tensors}, temporary)
        sync(temporary)
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    return out


def _to_export(run: Path, out: Path, step: int) -> tuple[Path, dict]:
    """The checkpoint of a run, and its manifest. Raises ValueError if `out` exists, or without such a checkpoint."""
    if out.exists():
        raise ValueError(f"{out}: exists already; choose another name")
    if not (run / "recipe.yaml").is_file():
        raise ValueError(f"{run}: not a run, it has no recipe.yaml")
    folder = checkpoint.at_step(run, step)
    return folder, checkpoint.verified(folder)


def _split_by_size(sizes: dict[str, int], limit: int) -> dict[str, list[str]]:
    """{file name: tensor names}, in order, each file of at most `limit` bytes or a single tensor."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if filled and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    stem, count = "diffusion_pytorch_model", len(groups)
    if count == 1:
        return {f"{stem}.safetensors": groups[0]}
    return {f"{stem}-{i:05d}-of-{count:05d}.safetensors": names for i, names in enumerate(groups, start=1)}


def main(arguments: list[str] | None = None) -> int:
    description = "Writes a run's weights as a diffusers WanTransformer3DModel folder, or as Self-Forcing's .pt file."
    parser = argparse.ArgumentParser(prog="rf_train.weights", formatter_class=Help, description=description)
    parser.add_argument("run")
    parser.add_argument("out", help="the folder to write, or a file that ends with .pt")
    parser.add_argument("--step", type=int, default=0, help="the checkpoint's step (default: the newest)")
    parser.add_argument(
        "--weights", choices=("ema", "master"), default="ema", help="the average (default) or the last weights"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the exported weights")
    parser.add_argument("--licence", default="", help="of the weights, for the folder's card, such as apache-2.0")
    options = parser.parse_args(arguments)

    def export_as_asked() -> None:
        if options.out.endswith(".pt"):
            if options.licence:
                raise ValueError(f"{options.out}: a .pt file has no card for --licence; leave it out")
            out = export_generator(*asked)
        else:
            out = export(*asked, licence=options.licence)
        files = [out] if out.is_file() else [path for path in out.rglob("*") if path.is_file()]
        print(f"{out}: {sum(path.stat().st_size for path in files) / 2**20:.1f} MiB")

    asked = (options.run, options.out, options.step, options.weights, getattr(torch, options.dtype))

    return run_command(export_as_asked)


if __name__ == "__main__":
    sys.exit(main())
