"""Wan checkpoints in and out, slice by slice: no process ever holds a whole model.

Read: a diffusers `WanTransformer3DModel` folder, or the original Wan checkpoint's names; one safetensors file, or several with an index.
Written: the diffusers format, with  python -m rf_train.weights RUN OUT
"""

import argparse
import json
import math
import re
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rf_train import checkpoint, config

# Original Wan names -> diffusers' names, which are the model's own. The original calls the norm before cross-attention norm3.
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


class WeightFiles:
    """The tensors of a checkpoint folder (or of one .safetensors file), by diffusers name, read on demand.

    Raises ValueError, in one line, for anything that isn't a whole safetensors checkpoint.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.places: dict[str, tuple[Path, str, tuple[int, ...]]] = {}  # name -> file, key in it, shape
        self._open: dict[Path, object] = {}
        for path in self._files():
            try:
                file = self._open[path] = safe_open(path, "pt")
                shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path}: not a whole safetensors file: {error}") from None
            original = any(".self_attn." in key for key in shapes) or any(key.startswith(("time_embedding.", "head.")) for key in shapes)
            for key, shape in shapes.items():
                name = key.removeprefix("model.diffusion_model.")
                self.places[from_wan_name(name) if original else name] = (path, key, shape)

    def _files(self) -> list[Path]:
        if self.folder.is_file():
            return [self.folder]
        if not self.folder.is_dir():
            raise ValueError(f"{self.folder}: no such folder of weights")
        indices = sorted(self.folder.glob("*.safetensors.index.json"))
        if len(indices) > 1:
            raise ValueError(f"{self.folder}: holds {len(indices)} weight indices, expected one: {', '.join(path.name for path in indices)}")
        if indices:
            try:
                listed = sorted(set(json.loads(indices[0].read_text())["weight_map"].values()))
            except (ValueError, KeyError, AttributeError, TypeError):
                raise ValueError(f"{indices[0]}: not an index of weights") from None
            bad = [name for name in listed if Path(name).name != name or not (self.folder / name).is_file()]
            if bad:
                raise ValueError(f"{indices[0]}: lists files that are not in the folder: {', '.join(bad)}")
            return [self.folder / name for name in listed]
        files = sorted(self.folder.glob("*.safetensors"))
        if len(files) != 1:
            raise ValueError(f"{self.folder}: holds {len(files)} safetensors files and no index; expected one file, or several with an index")
        return files

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raises ValueError naming every tensor that is missing, extra or misshapen, all of them at once."""
        wrong = checkpoint.difference({name: shape for name, (_, _, shape) in self.places.items()}, shapes)
        if wrong:
            raise ValueError(f"{self.folder}: the weights do not fit the model: {wrong}")

    def flat(self, name: str, begin: int, end: int) -> Tensor:
        """Elements begin .. end - 1 of the flattened tensor, fp32; only the rows that hold them are read."""
        path, key, shape = self.places[name]
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
        shape = self.places[name][2]
        return self.flat(name, 0, math.prod(shape)).view(shape)


@torch.no_grad()
def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Fills a plain model from a checkpoint folder, one tensor at a time. For a ZeRO-3 engine see `checkpoint.Shards.load_weights`."""
    files = WeightFiles(folder)
    parameters = dict(model.named_parameters())
    files.check({name: tuple(parameter.shape) for name, parameter in parameters.items()})
    for name, parameter in parameters.items():
        parameter.copy_(files.whole(name))


def diffusers_config(settings: config.Model) -> dict:
    """What `WanTransformer3DModel.from_pretrained` reads as config.json."""
    return {
        "_class_name": "WanTransformer3DModel", "patch_size": [1, settings.patch, settings.patch], "num_attention_heads": settings.heads,
        "attention_head_dim": settings.dim // settings.heads, "in_channels": settings.channels, "out_channels": settings.channels,
        "text_dim": settings.text_dim, "freq_dim": settings.freq_dim, "ffn_dim": settings.ffn_dim, "num_layers": settings.layers,
        "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": settings.eps, "image_dim": None, "added_kv_proj_dim": None, "rope_max_seq_len": 1024,
    }  # fmt: skip


def export(run: str | Path, out: str | Path, step: int = 0, kind: str = "ema", dtype: torch.dtype = torch.float32, shard_bytes: int = 5 * 2**30) -> Path:
    """Writes a run's checkpoint as a diffusers folder, in files of at most `shard_bytes`; `out` appears when it is whole."""
    run, out = Path(run), Path(out)
    if out.exists():
        raise ValueError(f"{out}: exists already; choose another folder")
    if not (run / "recipe.yaml").is_file():
        raise ValueError(f"{run}: not a run, it has no recipe.yaml")
    recipe = config.load(run / "recipe.yaml")
    folder = checkpoint.at_step(run, step)
    manifest = checkpoint.verified(folder)
    groups: list[list[str]] = [[]]
    filled = 0
    for name, shape in manifest["shapes"].items():
        size = math.prod(shape) * dtype.itemsize
        if filled and filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    making = out.with_name(out.name + ".making")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    stem, weight_map = "diffusion_pytorch_model", {}
    with checkpoint.Reader(folder, manifest) as reader:
        for position, names in enumerate(groups, start=1):
            file = f"{stem}.safetensors" if len(groups) == 1 else f"{stem}-{position:05d}-of-{len(groups):05d}.safetensors"
            save_file({name: reader.whole(kind, name).to(dtype).contiguous() for name in names}, making / file, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(names, file))
    if len(groups) > 1:
        total = sum(math.prod(shape) for shape in manifest["shapes"].values()) * dtype.itemsize
        checkpoint.write_json(making / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    checkpoint.write_json(making / "config.json", diffusers_config(recipe.model))
    making.rename(out)
    return out


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="rf_train.weights", description="Writes a run's weights as a diffusers WanTransformer3DModel folder.")
    parser.add_argument("run")
    parser.add_argument("out", help="the folder to write")
    parser.add_argument("--step", type=int, default=0, help="the checkpoint's step (default: the newest)")
    parser.add_argument("--weights", choices=("ema", "master"), default="ema", help="the average (default) or the last ones")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args(arguments)
    try:
        out = export(options.run, options.out, options.step, options.weights, getattr(torch, options.dtype))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{out}: {sum(path.stat().st_size for path in out.iterdir()) / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
