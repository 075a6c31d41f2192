"""All samples of a dataset, one after another, by webdataset."""

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlparse

import webdataset

from data_prep.card import check_sample
from data_prep.shards import Sample, SampleError, npy_array, text_members


def stream_samples(folder: str | Path, card: dict) -> Iterator[tuple[str, Sample]]:
    """Yields (key in its shard, sample), in the order of the card's shards. Shapes and values fit the card.

    Shards are read once, from begin to end. Nothing is unpickled: webdataset's own `decode()` would do so with members
    of other names, and here only those of a sample are looked at. Hashes are not checked.

    Raises SampleError for a shard that is missing or broken, and for the first sample that does not fit the card.
    """
    for shard in card["shards"]:
        path, count = Path(folder).absolute() / shard["file"], 0
        if not path.is_file():
            raise SampleError(str(path), "missing", "the card names it")
        if urlparse(str(path)).path != str(path):
            raise SampleError(
                str(path), "unreadable", "webdataset takes paths for addresses: rename, or link, the folder"
            )
        # Neither a node nor a worker takes a share: whoever asks gets all samples. A list is not searched for braces.
        stream = webdataset.WebDataset([str(path)], shardshuffle=False, nodesplitter=None, workersplitter=None)
        try:
            for members in stream:
                where = f"{path}: {members['__key__']}"
                sample = _sample(members, where)
                check_sample(card, where, sample)
                yield members["__key__"], sample
                count += 1
        except SampleError:
            raise
        except (tarfile.TarError, EOFError, ValueError) as error:  # webdataset's own have more arguments than the text
            raise SampleError(str(path), "malformed", str(error.args[0] if error.args else error)) from None
        if count != shard["samples"]:
            raise SampleError(str(path), "malformed", f"{count} samples, the card says {shard['samples']}")


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
