"""The detector against drawn truth, and the metrics of the drawn world on videos whose answer is known."""

import numpy as np
import pytest

from data_prep import draw
from data_prep.default_codec import DefaultCodec
from rf_train.evaluation import drawn_world
from rf_train.evaluation.drawn_world import (
    NamedObject,
    WatchedVideo,
    expected_areas,
    find_objects,
    named_objects,
    watch,
)

DEMO = draw.World(shapes=(1, 1), kinds=("square", "cross"), colours=("red", "green", "blue"))
FPS = 16.0


def drawn(shapes: list[draw.Shape], frames: int, size: int = 32) -> np.ndarray:
    return np.stack(list(draw.render(shapes, frames, (size, size), FPS)))


def clip(index: int, frames: int, world: draw.World = DEMO) -> tuple[list[draw.Shape], np.ndarray]:
    shapes = draw.scene(1, index, world=world)
    return shapes, drawn(shapes, frames)


def watched(made: np.ndarray, true: np.ndarray, shapes: list[draw.Shape], kinds=DEMO.kinds) -> WatchedVideo:
    named = named_objects(draw.caption(shapes))
    return watch(made, named, expected_areas(true, named), FPS, kinds)


def correct(frames: np.ndarray, shape: draw.Shape, kinds: tuple[str, ...]) -> list[bool]:
    """For each frame: exactly one object is found, with the colour and the kind of the shape."""
    found = find_objects(frames, 10, kinds)
    return [[(one.colour, one.kind) for one in objects] == [(shape.colour, shape.kind)] for objects in found]


@pytest.mark.parametrize("size", [32, 48, 64])
def test_the_detector_is_right_in_99_of_100_drawn_frames(size):
    world = draw.World(shapes=(1, 1))
    hits = []
    for index in range(40):
        (shape,) = draw.scene(7, index, world=world)
        hits += correct(drawn([shape], 12, size), shape, draw.KINDS)
    assert np.mean(hits) >= 0.99


def test_the_detector_is_right_in_99_of_100_frames_that_went_through_the_codec():
    codec = DefaultCodec.fit(clip(100 + index, 57)[1] for index in range(24))
    hits = []
    for index in range(24):
        (shape,), frames = clip(index, 57)
        hits += correct(codec.decode(codec.encode(frames)), shape, DEMO.kinds)
    assert np.mean(hits) >= 0.99


def test_it_counts_objects_and_says_when_a_kind_cannot_be_told():
    red = draw.Shape("square", "red", 0.15, (0.25, 0.5), (0.0, 0.0))
    blue = draw.Shape("circle", "blue", 0.15, (0.75, 0.5), (0.0, 0.0))
    apart = find_objects(drawn([red, blue], 1, 64), 10)[0]
    assert {(one.colour, one.kind) for one in apart} == {("red", "square"), ("blue", "circle")}
    touching = draw.Shape("circle", "blue", 0.15, (0.5, 0.5), (0.0, 0.0))
    true = drawn([red, touching], 4, 64)
    video = watched(true, true, [red, touching], draw.KINDS)
    assert all(track.there.all() and np.isnan(track.right_kind).all() for track in video.tracks)
    assert not video.extra.any()  # their edges mix to another colour
    assert find_objects(np.full((1, 32, 32, 3), draw.BACKGROUND, np.uint8), 1) == [[]]


def test_in_a_world_of_rings_a_full_shape_has_no_kind():
    disc = draw.Shape("circle", "red", 0.2, (0.5, 0.5), (0.0, 0.0))
    assert [one.kind for one in find_objects(drawn([disc], 1), 10, ("ring",))[0]] == [""]


def test_a_cross_whose_corners_fill_up_becomes_a_blob_before_it_counts_as_a_square():
    cross = draw.Shape("cross", "red", 0.22, (0.5, 0.5), (0.0, 0.0))
    frame = drawn([cross], 1)
    (found,) = find_objects(frame, 10, DEMO.kinds)[0]
    left, top, right, bottom = found.box
    colour, kinds = frame[0, 16, 16].copy(), []
    for filled in range((right - left) // 3 + 1):
        part = frame.copy()
        part[0, top : top + filled, left:right] = colour
        part[0, bottom - filled : bottom, left:right] = colour
        kinds.append(find_objects(part, 10, DEMO.kinds)[0][0].kind)
    assert list(dict.fromkeys(kinds)) == ["cross", "", "square"]


def test_captions_of_the_drawn_world_and_others():
    text = "a red square moving up in front of a blue ring moving down and left"
    assert named_objects(text) == [NamedObject("red", "square"), NamedObject("blue", "ring")]
    for other in ("a dog on a beach", "a red dog moving up", ""):
        with pytest.raises(ValueError, match="does not name objects"):
            named_objects(other)


def measures(video: WatchedVideo, part: slice) -> dict[str, float | None]:
    names = ("kept", "shape_kept", "extra_objects", "comes_back", "speed", "goes_straight", "bounces")
    return {name: getattr(drawn_world, name)(video, part) for name in names}


def means(videos: list[WatchedVideo], part: slice) -> dict[str, float | None]:
    rows = [measures(video, part) for video in videos]
    found = {name: [row[name] for row in rows if row[name] is not None] for name in rows[0]}
    return {name: float(np.mean(values)) if values else None for name, values in found.items()}


def test_each_metric_says_what_was_done_to_the_truth():
    part, made = slice(20, 120), {}
    for index in range(8):
        shapes, true = clip(index, 120)
        shuffled = true[np.random.default_rng(0).permutation(120)]
        other = draw.Shape("cross" if shapes[0].kind == "square" else "square", *list(vars(shapes[0]).values())[1:])
        ways = {"truth": true, "frozen": np.repeat(true[:1], 120, axis=0), "shuffled": shuffled}
        ways |= {"emptied": np.full_like(true, draw.BACKGROUND), "other": drawn([other], 120)}
        for name, frames in ways.items():
            made.setdefault(name, []).append(watched(frames, true, shapes))
    found = {name: means(videos, part) for name, videos in made.items()}
    truth = found["truth"]
    assert truth["kept"] == truth["shape_kept"] == 1 and truth["extra_objects"] == 0 and truth["comes_back"] is None
    assert truth["goes_straight"] > 0.97 and truth["bounces"] > 0.97
    assert truth["speed"] == pytest.approx(draw.SPEED * 32 / FPS, rel=0.15)
    assert found["frozen"]["kept"] == 1 and found["frozen"]["speed"] == 0 and found["frozen"]["bounces"] is None
    assert found["shuffled"]["kept"] == 1 and found["shuffled"]["goes_straight"] < 0.4
    assert found["emptied"]["kept"] == found["emptied"]["shape_kept"] == 0 and found["emptied"]["speed"] is None
    assert found["other"]["kept"] == 1 and found["other"]["shape_kept"] == 0


def test_an_object_that_passes_through_the_wall_does_not_bounce():
    shape = draw.Shape("square", "red", 0.2, (0.4, 0.5), (0.25, 0.0))
    true = drawn([shape], 48)
    turned_early = np.concatenate([true[:20], true[:20][::-1], true[:8]])  # long before the wall
    part = slice(0, 48)
    assert drawn_world.bounces(watched(true, true, [shape]), part) == 1
    assert drawn_world.goes_straight(watched(true, true, [shape]), part) == 1
    assert drawn_world.goes_straight(watched(turned_early, true, [shape]), part) < 0.5


def test_what_passes_behind_another_comes_back_or_not():
    front = draw.Shape("square", "red", 0.24, (0.5, 0.5), (0.0, 0.0))
    back = draw.Shape("circle", "blue", 0.14, (0.15, 0.5), (0.35, 0.0))
    shapes, kinds = [front, back], ("square", "circle")
    true = drawn(shapes, 48, 64)
    part = slice(0, 48)
    video = watched(true, true, shapes, kinds)
    assert video.tracks[1].hidden.sum() > 3 and drawn_world.comes_back(video, part) == 1
    assert drawn_world.kept(video, part) == 1 and drawn_world.extra_objects(video, part) == 0
    hides = int(np.flatnonzero(video.tracks[1].hidden)[0])
    lost = true.copy()
    lost[hides:] = drawn([front], 1, 64)
    lost = np.concatenate([lost, np.repeat(lost[-1:], 32, axis=0)])
    lost_video, long = watched(lost, true, shapes, kinds), slice(0, 80)
    assert drawn_world.comes_back(lost_video, long) == 0 and drawn_world.kept(lost_video, long) < 0.95


def test_more_objects_than_named():
    shapes, true = clip(0, 8)
    colour = "red" if shapes[0].colour != "red" else "blue"
    second = draw.Shape("square", colour, 0.12, (0.5, 0.5), (0.0, 0.0))
    both = watched(drawn([second, *shapes], 8), true, shapes)
    assert drawn_world.extra_objects(both, slice(0, 8)) == 1
    assert drawn_world.shape_kept(watched(true, true, shapes), slice(0, 8)) == 1


def test_a_shape_that_falls_to_pieces_is_not_excused():
    """The largest piece of the right colour is the object; the others are too many, and do not make it doubtful."""
    (shape,), true = clip(3, 8)
    broken = true.copy()
    broken[:, ::5] = draw.BACKGROUND
    broken[:, :, ::5] = draw.BACKGROUND
    video = watched(broken, true, [shape])
    assert np.isfinite(video.tracks[0].right_kind[video.tracks[0].there]).all()
    assert drawn_world.kept(video, slice(0, 8)) == 0
