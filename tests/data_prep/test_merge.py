"""Several datasets become one: every sample once, under a name of its own, with the bytes that it had."""

import json
import os

import numpy as np
import pytest

from data_prep import merge, shards
from data_prep.card import read_card
from data_prep.index import SampleIndex
from data_prep.shards import read_sample
from data_prep.verify import problems, verify
from rf_train.data.latent_dataset import LatentDataset
from tests.conftest import change_card, tiny_settings, write_dataset
from tests.data_prep.made import write_samples


@pytest.fixture
def datasets(tmp_path):
    """Datasets of 12 and 7 clips, in 3 and 2 shards with the same names."""
    folders = [write_dataset(tmp_path / "a"), write_dataset(tmp_path / "b", count=7, seed=1)]
    for folder, failed in zip(folders, (1, 2)):
        skipped = {"truncated": failed, folder.name: 1}
        change_card(folder, lambda card, skipped=skipped: card["counts"].update(skipped=skipped))
        lines = [{"source": f"{folder.name}\u2028{n}", "reason": "truncated"} for n in range(failed)]
        (folder / "failures.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        (folder / "codec.safetensors").write_bytes(b"codec")
    return folders


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def latents(folder):
    """The bytes of all latents, by the sample's name, in the order of the dataset."""
    index = SampleIndex(folder, read_card(folder))
    found = (index[n] for n in range(len(index)))
    return {entry.key: read_sample(folder / file, entry).latent.tobytes() for file, entry in found}


def run(*arguments):
    return merge.main([str(argument) for argument in arguments])


def test_all_samples_are_there_under_names_of_their_own(datasets, tmp_path, capsys):
    out = tmp_path / "out"
    before = [content(folder) for folder in datasets]
    assert run(out, *datasets) == 0 and verify(out) == 19
    assert [content(folder) for folder in datasets] == before
    found, own = latents(out), [latents(folder) for folder in datasets]
    assert list(found) == [f"{video:06d}_0000" for video in range(19)]
    assert list(found.values()) == [*own[0].values(), *own[1].values()]
    card = read_card(out)
    assert card["counts"] == {
        "videos": 19, "samples": 19, "shards": 5, "skipped": {"truncated": 3, "a": 1, "b": 1},
    }  # fmt: skip
    assert [shard["first_video"] for shard in card["shards"]] == [0, 0, 0, 12, 12]
    assert card["source"]["settings"] == {
        "merged": [{"path": str(folder), "card": read_card(folder)["hash"]} for folder in datasets]
    }
    failures = [json.loads(line) for line in (out / "failures.jsonl").read_bytes().decode().split("\n") if line]
    assert [(line["dataset"], line["source"]) for line in failures] == [
        (str(datasets[0]), "a\u20280"), (str(datasets[1]), "b\u20280"), (str(datasets[1]), "b\u20281"),
    ]  # fmt: skip
    assert (out / "codec.safetensors").read_bytes() == b"codec"
    assert "19 samples in 5 shards, of 2 datasets" in capsys.readouterr().out
    for shard, source in zip(card["shards"], [*datasets[0].glob("*.tar"), *datasets[1].glob("*.tar")]):
        assert (out / shard["file"]).stat().st_nlink == 2, source


def test_training_reads_it(datasets, tmp_path):
    assert run(tmp_path / "out", *datasets) == 0
    data, second = (LatentDataset(folder, tiny_settings()) for folder in (tmp_path / "out", datasets[1]))
    assert len(data) == 19 and data.key(14) == "000014_0000" and second.key(2) == "000002_0000"
    merged, own = data.read(14), second.read(2)
    assert merged[0].equal(own[0]) and merged[1].equal(own[1]) and merged[2] == own[2]
    assert sorted(id for _, id in data.samples_at(0, 0, 19)) == [f"{n:06d}_0000@0" for n in range(19)]


def test_the_same_order_makes_the_same_bytes_and_another_does_not(datasets, tmp_path):
    one, two, other = (tmp_path / name for name in ("one", "two", "other"))
    assert run(one, *datasets) == run(two, *datasets, "--copy") == run(other, *reversed(datasets)) == 0
    assert content(one) == content(two) != content(other)
    assert verify(other) == 19 and (two / "shard-000000.tar").stat().st_nlink == 1


def test_a_merged_dataset_can_be_merged(datasets, tmp_path):
    third = write_dataset(tmp_path / "c", count=6, seed=2)
    (third / "failures.jsonl").write_text("")
    assert run(tmp_path / "ab", *datasets) == run(tmp_path / "cab", third, tmp_path / "ab") == 0
    assert verify(tmp_path / "cab") == 25
    found = list(latents(tmp_path / "cab").values())
    assert found == [*latents(third).values(), *latents(datasets[0]).values(), *latents(datasets[1]).values()]
    assert [shard["first_video"] for shard in read_card(tmp_path / "cab")["shards"]] == [0, 0, 6, 6, 6, 18, 18]
    failures = [json.loads(line) for line in (tmp_path / "cab" / "failures.jsonl").open(newline="\n")]
    assert [line["dataset"] for line in failures] == [str(datasets[0]), str(datasets[1]), str(datasets[1])]


def test_again_does_nothing_and_another_merge_is_refused(datasets, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(out, *datasets) == 0
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()}
    assert run(out, *datasets) == 0 and "exists already, nothing to do" in capsys.readouterr().out
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()} == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for target, says in (
        (out, "holds another dataset than this merge"),
        (datasets[0], "holds another dataset than this merge"),
        (tmp_path / "mine", "exists and is no dataset"),
        (tmp_path / "mine" / "notes.txt", "exists and is no dataset"),
    ):
        assert run(target, *reversed(datasets)) == 2
        assert says in capsys.readouterr().err
    assert content(tmp_path / "mine") == {"notes.txt": b"mine"}


@pytest.mark.parametrize("name, call", [("place", 2), ("merge_failures", 1), ("write_rows", 1), ("write_card", 1)])
@pytest.mark.parametrize("copy", [[], ["--copy"]])
def test_an_interrupted_merge_is_finished(datasets, tmp_path, monkeypatch, name, call, copy, capsys):
    out, calls, real = tmp_path / "out", [], getattr(merge, name)

    def stop(*arguments):
        calls.append(arguments)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(merge, name, stop)
        assert run(out, *datasets, *copy) == 130
    assert not (out / "dataset.json").exists()
    assert run(out, *reversed(datasets)) == 2 and "holds another dataset" in capsys.readouterr().err
    assert run(out, *datasets, *copy) == run(tmp_path / "whole", *datasets) == 0
    assert content(out) == content(tmp_path / "whole")


def test_where_links_are_impossible_shards_are_copied_and_checked(datasets, tmp_path, monkeypatch, capsys):
    def refuse(*arguments):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    assert run(tmp_path / "out", *datasets) == 0 and verify(tmp_path / "out") == 19
    shard = datasets[1] / "shard-000001-0000.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    assert run(tmp_path / "other", *datasets) == 2
    assert f"{shard}: its sha256 is not the card's" in capsys.readouterr().err
    assert not list((tmp_path / "other").glob("*.tmp")) and not (tmp_path / "other" / "dataset.json").exists()


def test_shards_that_are_symlinks_become_files(datasets, tmp_path):
    shard = datasets[0] / "shard-000000-0000.tar"
    shard.rename(datasets[0] / "elsewhere")
    shard.symlink_to("elsewhere")
    assert run(tmp_path / "out", *datasets) == 0 and verify(tmp_path / "out") == 19
    assert not (tmp_path / "out" / "shard-000000.tar").is_symlink()


@pytest.mark.parametrize(
    "section, key, value, says",
    [
        ("codec", "hash", "d", "codec.hash (c, d)"),
        ("codec", "settings", {"dtype": "bfloat16"}, "codec.settings"),
        ("latent", "std", [2.0] * 4, "latent.std"),
        ("video", "fps", 8, "video.fps (16, 8)"),
        ("text", "hash", "u", "text.hash (t, u)"),
        ("empty_caption", 0, [0.2] * 12, "empty_caption"),
    ],
)
def test_what_differs_is_named(datasets, tmp_path, section, key, value, says, capsys):
    change_card(datasets[1], lambda card: card[section].__setitem__(key, value))
    assert run(tmp_path / "out", *datasets) == 2
    error = f"error: {datasets[0]} and {datasets[1]} don't fit together, they differ in {says}"
    assert capsys.readouterr().err.splitlines() == [error] and not (tmp_path / "out").exists()


def test_weights_may_lie_elsewhere(datasets, tmp_path):
    change_card(datasets[1], lambda card: [card[name].update(folder="/elsewhere") for name in ("codec", "text")])
    assert run(tmp_path / "out", *datasets) == 0


def test_one_line_for_whatever_cannot_be_merged(datasets, tmp_path, capsys):
    out, shard = tmp_path / "out", datasets[1] / "shard-000001-0000.tar"
    assert run(tmp_path / "ab", *datasets) == 0
    capsys.readouterr()

    def says(text, *arguments):
        assert run(*arguments) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and text in lines[0] and not out.exists(), lines

    says("two datasets at least", out, datasets[0])
    says("none: no such folder", out, datasets[0], tmp_path / "none")
    says("shard-000000-0000.tar are the same shard", out, datasets[0], datasets[0])
    says("shard-000003.tar are the same shard", out, datasets[1], tmp_path / "ab")
    shard.rename(tmp_path / "kept")
    says(f"{shard}: missing or not of the ", out, *datasets)
    (tmp_path / "kept").rename(shard)
    change_card(datasets[0], lambda card: card["counts"].update(videos=2**32 - 1))
    says("more than 4294967296 videos together", out, *datasets)
    (datasets[0] / "samples.npy").write_bytes(b"")
    says("not the index that the card names", out, *datasets)


def test_failures_that_are_not_listed_are_said_to_be(datasets, tmp_path, capsys):
    (datasets[0] / "failures.jsonl").unlink()
    assert run(tmp_path / "out", *datasets) == 0
    assert f"{datasets[0] / 'failures.jsonl'}: not here; its failures are counted" in capsys.readouterr().err
    (datasets[0] / "failures.jsonl").write_text("{}\n[1]\n")
    assert run(tmp_path / "other", *datasets) == 2
    assert "failures.jsonl line 2: not a failure" in capsys.readouterr().err


def test_numbers_in_a_damaged_card_make_no_name_twice(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        clips = [(video, 0, rng.standard_normal((3, 2, 2, 2)), np.ones((1, 5)), {}) for video in (0, 9)]
        write_samples(tmp_path / name, clips)  # its card says two videos
    assert run(tmp_path / "out", tmp_path / "a", tmp_path / "b") == 0 and verify(tmp_path / "out") == 4
    assert list(latents(tmp_path / "out")) == ["000000_0000", "000009_0000", "000010_0000", "000019_0000"]


def test_a_shard_in_the_wrong_place_is_found(datasets, tmp_path):
    """The names in the shards are checked, too: `first_video` must be what makes them fit."""
    out = tmp_path / "out"
    assert run(out, *datasets) == 0
    change_card(out, lambda card: card["shards"][3].update(first_video=11))
    assert "it holds 000000_0000.json" in next(problems(out))
    assert shards.Entry(0, 0, 0, 14, 3, 12).stored_key == "000002_0003"
