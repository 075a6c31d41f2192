"""Prompts with times, prompt files, seeds."""

import pytest

from rf_train.generation.prompts import Prompts, read_prompts, seed_of


def test_prompts_with_times():
    prompts = Prompts.of(["0: a boat", "5: a storm: waves", "7.5: calm"])
    assert prompts == Prompts((0, 5, 7.5), ("a boat", "a storm: waves", "calm"))
    assert [prompts.at(seconds) for seconds in (0, 4.9, 5, 100)] == [0, 0, 1, 2]
    assert (
        Prompts.of("16:9 picture of a boat").texts
        == ("16:9 picture of a boat",)
        == Prompts.of(["16:9 picture of a boat"]).texts
    )
    assert Prompts.of([]) == Prompts((0,), ("",))


@pytest.mark.parametrize(
    "written, says",
    [
        (["0: a", "b"], '--prompt "b": one of several prompts, so give its time'),
        (["5: a"], "the times 5 must begin with 0"),
        (["0: a", "4: b", "4: c"], "the times 0, 4, 4 must begin with 0 and ascend"),
    ],
)
def test_prompts_that_cannot_be_meant(written, says):
    with pytest.raises(ValueError, match=says):
        Prompts.of(written)


def test_a_prompt_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# of boats\n\na boat\n  a storm \n", encoding="utf-8")
    assert read_prompts(path) == ["a boat", "a storm"]
    for text, says in (("a\nb\na\n", "line 3 repeats line 1"), ("# nothing\n", "no prompts")):
        path.write_text(text)
        with pytest.raises(ValueError, match=says):
            read_prompts(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_prompts(path)


def test_a_seed_belongs_to_a_prompt_and_a_number():
    seeds = {seed_of(seed, prompt, sample) for seed in (0, 1) for prompt in ("a", "b") for sample in (0, 1)}
    assert len(seeds) == 8 and seed_of(0, "a", 1) == seed_of(0, "a", 1) and all(0 <= seed < 2**32 for seed in seeds)
