"""All samples of a dataset, or of a shard, one after another, by webdataset."""

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from webdataset.tariterators import group_by_keys, tar_file_expander

from data_prep.card import check_sample
from data_prep.places import Place, RemoteError
from data_prep.shards import MEMBERS, Sample, SampleError, npy_array, text_members


def stream_samples(folder: str | Path, card: dict) -> Iterator[tuple[str, Sample]]:
    """Yields (key in its shard, sample), in the order of the card's shards. Shapes and values fit the card.

    Shards are read once, from begin to end. Hashes are not checked.

    Raises SampleError for a shard that is missing or broken, and for the first sample that does not fit the card.
    """
    for shard in card["shards"]:
        path, count = Path(folder).absolute() / shard["file"], 0
        if not path.is_file():
            raise SampleError(str(path), "missing", "the card names it")
        with open(path, "rb") as file:
            for found in stream_shard(file, path, card):
                yield found
                count += 1
        if count != shard["samples"]:
            raise SampleError(str(path), "malformed", f"{count} samples, the card says {shard['samples']}")


def stream_shard(file: Any, path: Place, card: dict, exact: bool = False) -> Iterator[tuple[str, Sample]]:
    """Yields (key, sample) of a shard from `file`, of which only `read` is called. Shapes and values fit the card.

    `exact`: a sample with further members is malformed. Nothing is unpickled: webdataset's own `decode()` would do so
    with members of other names, and here only those of a sample are looked at. The shard is opened by the caller, since
    webdataset takes paths for addresses and commands.

    Raises SampleError when the shard is broken, and for the first sample that does not fit the card; and what `read`
    raises.
    """
    try:
        for members in group_by_keys(tar_file_expander([{"url": str(path), "stream": file}])):
            where = f"{path}: {members['__key__']}"
            sample = _sample(members, where)
            check_sample(card, where, sample)
            if exact and len(members) != len(MEMBERS) + len(sample.texts) + 1:  # with its key and the shard's path
                raise SampleError(where, "malformed", f"it holds {', '.join(members)}")
            yield members["__key__"], sample
    except (SampleError, RemoteError):
        raise
    except (tarfile.TarError, EOFError, ValueError) as error:  # webdataset's own have more arguments than the text
        raise SampleError(str(path), "malformed", str(error.args[0] if error.args else error)) from None


def _sample(members: dict, where: str) -> Sample:
    """A sample from the bytes of its members, by name. Raises SampleError."""
    try:
        meta, latent = members["json"], members["latent.npy"]
        texts = [members[name] for name in text_members(len(members)) if name in members or name == "text.npy"]
        found = json.loads(meta)
        if not isinstance(found, dict):
            raise ValueError("its JSON is not an object")
        return Sample(npy_array(latent, "latent"), [npy_array(text, "text") for text in texts], found)
    except KeyError as error:
        raise SampleError(where, "malformed", f"no member {error}") from None
    except (ValueError, RecursionError) as error:
        raise SampleError(where, "malformed", str(error)) from None
