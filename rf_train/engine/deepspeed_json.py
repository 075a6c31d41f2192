"""DeepSpeed's JSON: read, checked, and completed from the recipe."""

import json
from pathlib import Path

from rf_train.config import Recipe

PROJECT = Path(__file__).resolve().parent.parent.parent
SHIPPED = "ds_configs"
_OBJECTS = ("zero_optimization", "bf16", "fp16", "data_types", "amp", "torch_autocast")
_NESTED_OBJECTS = ("offload_optimizer", "offload_param")


def shipped_jsons() -> list[str]:
    """The project's own ZeRO settings for GPUs, as `run.deepspeed` names them."""
    return [f"{SHIPPED}/{path.name}" for path in sorted((PROJECT / SHIPPED).glob("zero*.json"))]


def find_file(path: str) -> Path:
    """`path` as given, or else below the project's folder, so that a run can start from any folder."""
    for candidate in (Path(path), PROJECT / path):
        if candidate.is_file():
            return candidate
    raise ValueError(f"{path}: no such file, neither here nor in {PROJECT}")


def read_deepspeed_json(file: str) -> tuple[Path, dict]:
    """Reads a DeepSpeed JSON: its path and settings. Raises a one-line ValueError if training can't run on it."""
    path = find_file(file)
    try:
        settings = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: expected an object of settings, got {json.dumps(settings)[:60]}")
    for key in _OBJECTS:
        _check_object(path, settings, key, key)
    for key in _NESTED_OBJECTS:
        _check_object(path, settings["zero_optimization"], key, f"zero_optimization.{key}")
    stage = settings["zero_optimization"].get("stage")
    if stage not in (2, 3) or isinstance(stage, bool):
        raise ValueError(f"{path}: zero_optimization.stage is {json.dumps(stage)}; training runs on ZeRO stage 2 or 3")
    return path, settings


def _check_object(path: Path, holder: dict, key: str, name: str) -> None:
    """Raises ValueError unless `holder[key]` is an object. Removes an empty one, except zero_optimization."""
    if not isinstance(holder.setdefault(key, {}), dict):
        raise ValueError(f"{path}: {name} is {json.dumps(holder[key])}, expected an object")
    if not holder[key] and key != "zero_optimization":
        del holder[key]


def complete_settings(recipe: Recipe, device_type: str, world_size: int) -> dict:
    """DeepSpeed's settings: the JSON, completed from the recipe.

    Raises ValueError, with both values, where the JSON contradicts the recipe.
    """
    path, settings = read_deepspeed_json(recipe.run.deepspeed)
    optimizer, stage, size = recipe.optimizer, recipe.stages[0], recipe.run.sequence_parallel_size
    replicas = world_size // size
    # DeepSpeed assumes that each rank has its own clips. With sequence parallelism, several ranks share one.
    per_rank = stage.batch // (optimizer.micro_batch * replicas)
    decided = {
        "train_micro_batch_size_per_gpu": ("optimizer.micro_batch", optimizer.micro_batch),
        "gradient_clipping": ("optimizer.max_grad_norm", optimizer.max_grad_norm),
        "train_batch_size": (f"stages.0.batch x run.sequence_parallel_size (stage {stage.name})", stage.batch * size),
        "gradient_accumulation_steps": (
            f"it follows from batch, micro_batch and ranks (stage {stage.name})",
            per_rank,
        ),
    }
    for key, (name, value) in decided.items():
        there = settings.get(key, value)
        if there not in (value, "auto") or isinstance(there, bool):
            _contradiction(path, key, settings[key], f"{value} in the recipe: {name}")
        settings[key] = value
    bf16 = recipe.run.precision == "bf16" or (recipe.run.precision == "auto" and device_type == "cuda")
    for key, enabled in (("bf16", bf16), ("fp16", False)):
        there = settings.get(key, {}).get("enabled", enabled)
        if there not in (enabled, "auto"):
            ours = f"run.precision={recipe.run.precision} on {device_type} makes it {json.dumps(enabled)}"
            _contradiction(path, f"{key}.enabled", there, ours)
        settings[key] = {**settings.get(key, {}), "enabled": enabled}
    betas = f"betas {optimizer.beta1:g} and {optimizer.beta2:g}"
    forbidden = {
        "optimizer": f"AdamW, lr {stage.lr:g}, {betas}",
        "scheduler": f"stage {stage.name}: lr {stage.lr:g}, warmup {stage.warmup}",
        "sequence_parallel_size": f"run.sequence_parallel_size={size}",
        "data_parallel_size": f"{replicas}, from ranks and run.sequence_parallel_size",
    }
    for key, ours in forbidden.items():
        if key in settings:
            _contradiction(path, key, settings[key], f"the recipe decides it ({ours})")
    precision, skips = "run.precision decides", "the norm tells which steps to skip"
    fixed: tuple[tuple[str, str, object, str], ...] = (
        ("data_types", "grad_accum_dtype", "fp32", precision),
        ("amp", "enabled", False, precision),
        ("torch_autocast", "enabled", False, precision),
        ("bf16", "check_grad_overflow", True, skips),
        ("zero_optimization", "compute_grad_norm", True, skips),
    )
    for section, key, required, why in fixed:
        there = settings.get(section, {}).get(key, required)
        if there != required:
            _contradiction(path, f"{section}.{key}", there, f"training makes it {json.dumps(required)}: {why}")
    settings["data_types"] = {"grad_accum_dtype": "fp32"}
    settings["zero_allow_untested_optimizer"] = True
    settings["zero_force_ds_cpu_optimizer"] = False
    settings.setdefault("wall_clock_breakdown", False)
    settings.setdefault("steps_per_print", 10**9)
    return settings


def _contradiction(path: Path, key: str, there: object, ours: str) -> None:
    raise ValueError(f"{path}: {key} is {json.dumps(there)} there, but {ours}; remove it from the JSON")
