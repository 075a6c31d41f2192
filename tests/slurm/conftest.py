"""The cluster that these tests share, and a folder to submit from."""

from pathlib import Path

import pytest
import yaml

from tests.conftest import write_dataset
from tests.distributed import PROJECT
from tests.engine.runs import recipe_dict
from tests.slurm.cluster import Cluster, missing_programs, running_cluster


@pytest.fixture(scope="session")
def cluster():
    """A real Slurm of two nodes."""
    missing = missing_programs()
    if missing:
        pytest.skip(f"Slurm is not installed ({', '.join(missing)}): `make test-slurm` installs it, on Debian")
    with running_cluster() as running:
        yield running


@pytest.fixture
def jobs(cluster: Cluster) -> Cluster:
    """The cluster, without jobs before and after a test."""
    yield cluster
    cluster.end_all_jobs()


@pytest.fixture
def project(tmp_path) -> Path:
    """A folder as users submit from."""
    for name in ("slurm", "ds_configs"):
        (tmp_path / name).symlink_to(PROJECT / name)
    return tmp_path


@pytest.fixture(scope="session")
def samples(tmp_path_factory) -> Path:
    """A folder with the dataset `short`."""
    folder = tmp_path_factory.mktemp("samples")
    write_dataset(folder / "short")
    return folder


def write_recipe(path: Path, samples: Path, steps: int, **run) -> None:
    """A recipe of one stage. Its run is `run` beside it."""
    recipe = recipe_dict(samples, path.parent / "run", **run)
    recipe["stages"] = [{"name": "forcing", "history": "clean", "steps": steps, "batch": 2, "lr": 1e-3}]
    path.write_text(yaml.safe_dump(recipe))
