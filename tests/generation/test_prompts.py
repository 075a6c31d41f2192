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


def test_a_line_of_a_prompt_file_may_change_in_time():
    assert Prompts.of_line("0: a boat | 5: a storm") == Prompts((0, 5), ("a boat", "a storm"))
    for plain in ("a boat", "0: a boat", "a | b", "16:9 | a boat"):
        assert Prompts.of_line(plain) == Prompts((0,), (plain,))


@pytest.mark.parametrize(
    "times, given, says",
    [
        ((0, 1, 3), 0, None),
        ((0, 2.5), 0, None),
        ((0, 3.1), 0, "3.1: p1.* is never shown: the last chunk of the video begins at 3 s"),
        ((0, 1e300), 0, "is never shown: the last chunk"),
        ((0, 1.1, 1.9, 2.5), 0, "1.1: p1.* is never shown: no generated chunk begins between 1.1 and 1.9 s"),
        ((0, 1, 2), 0, None),
        ((0, 1, 2), 3, "1: p1.* is never shown: no generated chunk begins between 1 and 2 s"),
        ((0, 1, 3), 3, "1: p1.* is never shown"),
        ((0, 1), 3, None),
    ],
)
def test_a_prompt_that_is_never_shown_is_named(times, given, says):
    """Four chunks of one second each."""
    prompts = Prompts(times, tuple(f"p{n}" for n in range(len(times))))
    if says is None:
        prompts.check_shown(float, given, 4)
    else:
        with pytest.raises(ValueError, match=says):
            prompts.check_shown(float, given, 4)


@pytest.mark.parametrize(
    "written, says",
    [
        (["0: a", "b"], '--prompt "b": one of several prompts, so give its time'),
        (["5: a"], "the times 5 must begin with 0"),
        (["a \udcff"], r"--prompt 'a .udcff': not UTF-8 text"),
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
    path.write_text("\ufeff# of boats\r\na boat\u2028at sea\r\n0: a | 5: b", encoding="utf-8")
    assert read_prompts(path) == ["a boat\u2028at sea", "0: a | 5: b"]
    path.write_text("a\n0: a | b")
    with pytest.raises(ValueError, match='line 2: --prompt "b": one of several prompts, so give its time'):
        read_prompts(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_prompts(path)


def test_a_seed_belongs_to_a_prompt_and_a_number():
    seeds = {seed_of(seed, prompt, sample) for seed in (0, 1) for prompt in ("a", "b") for sample in (0, 1)}
    assert len(seeds) == 8 and seed_of(0, "a", 1) == seed_of(0, "a", 1) and all(0 <= seed < 2**32 for seed in seeds)


def test_one_prompt_on_the_command_line_may_be_written_as_in_a_file():
    assert Prompts.of("0: a boat | 5: a storm") == Prompts.of(["0: a boat", "5: a storm"])
    assert Prompts.of("a boat | a storm").texts == ("a boat | a storm",)
    with pytest.raises(ValueError, match="so give its time"):
        Prompts.of(["0: a boat | a storm"])
