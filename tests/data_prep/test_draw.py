"""The demo's world: deterministic, bouncing, occluding, resumable."""

import numpy as np
import pytest

from data_prep import draw
from data_prep.video import read_frames


def test_longer_video_starts_with_the_same_frames():
    world = draw.scene(seed=3, index=5)
    short, long = (np.stack(list(draw.render(world, frames, (64, 64), 16))) for frames in (10, 30))
    assert np.array_equal(short, long[:10])
    assert draw.scene(3, 5) == world and draw.scene(3, 6) != world and draw.scene(4, 5) != world


def test_shapes_stay_inside_and_keep_their_speed():
    for index in range(20):
        for shape in draw.scene(0, index, aspect=2.0):
            path = np.array([draw.position(shape, n / 160, (2.0, 1.0)) for n in range(2000)])
            half = draw.EXTENTS[shape.kind] * shape.radius
            assert (path >= half - 1e-9).all() and (path <= np.array([2.0, 1.0]) - half + 1e-9).all()
            steps = np.abs(np.diff(path, axis=0)) * 160
            assert np.allclose(np.median(steps, axis=0), np.abs(shape.velocity), atol=1e-6)  # all but the bounces
            assert np.hypot(*shape.velocity) == pytest.approx(draw.SPEED)


@pytest.mark.parametrize("kind", draw.KINDS)
def test_a_shape_touches_the_wall_where_it_bounces(kind):
    """Its bounding box in the picture reaches both borders, and never more than half of the soft edge is cut."""
    shape = draw.Shape(kind, "red", 0.2, (0.5, 0.5), (1.0, 0.0))
    frames = np.stack(list(draw.render([shape], 64, (64, 64), 16)))
    columns = (frames[..., 0] > 130).any(axis=1)  # [T, W]: where more than half of a pixel is covered
    left, right = columns.argmax(axis=1), 64 - columns[:, ::-1].argmax(axis=1)
    assert left.min() <= 2 and right.max() >= 62
    assert len(set(right - left)) <= 2  # the width hardly changes: nothing is cut off


def test_a_world_has_the_kinds_and_colours_it_was_asked_for():
    world = draw.World(shapes=(1, 1), kinds=("cross",), colours=("red", "blue"))
    shapes = [shape for index in range(20) for shape in draw.scene(0, index, world=world)]
    assert len(shapes) == 20 and {shape.kind for shape in shapes} == {"cross"}
    assert {shape.colour for shape in shapes} == {"red", "blue"}


def test_what_was_hidden_comes_back_the_same():
    """A shape that passes behind another leaves no trace on it, and is itself again afterwards."""
    front = draw.Shape("square", "red", 0.17, (0.5, 0.5), (0.0, 0.0))
    back = draw.Shape("circle", "blue", 0.13, (0.15, 0.5), (0.2, 0.0))
    frames = np.stack(list(draw.render([front, back], 80, (64, 64), 16)))
    assert (frames[:, 32, 32] == draw.PALETTE["red"]).all()
    blue = (frames == draw.PALETTE["blue"]).all(-1).sum((1, 2))
    hidden = int(np.argmin(blue))
    assert blue[hidden] == 0 and 0 < hidden < 79
    assert blue[0] == pytest.approx(blue[hidden:].max(), abs=12)


def test_scene_colours_are_distinct_and_the_caption_names_all():
    for index in range(30):
        world = draw.scene(1, index)
        assert 2 <= len(world) <= 3
        assert len({shape.colour for shape in world}) == len(world)
        parts = draw.caption(world).split(" in front of ")
        assert len(parts) == len(world)
        for part, shape in zip(parts, world):
            assert part.startswith(f"a {shape.colour} {shape.kind} moving ")


def test_caption_directions():
    def moving(x, y):
        return draw.caption([draw.Shape("circle", "red", 0.1, (0.5, 0.5), (x, y))])

    assert moving(1, 0).endswith("moving right") and moving(0, -1).endswith("moving up")
    assert moving(-1, 1).endswith("moving down and left") and moving(-1, -0.01).endswith("moving left")


def test_shapes_often_cover_one_another():
    """History matters only if there is something to remember: in most videos shapes overlap at some time."""

    def overlap(world):
        for n in range(81):
            places = [draw.position(shape, n / 16, (1.0, 1.0)) for shape in world]
            for i, a in enumerate(places):
                if any(np.hypot(a[0] - b[0], a[1] - b[1]) < world[i].radius for b in places[i + 1 :]):
                    return True
        return False

    assert np.mean([overlap(draw.scene(0, index)) for index in range(64)]) > 0.5


def test_command_writes_completes_and_then_does_nothing(tmp_path, capsys):
    out = tmp_path / "videos"
    command = [str(out), "--videos", "3", "--seconds", "0.5625", "--size", "48x64"]
    assert draw.main(command) == 0
    names = sorted(path.name for path in out.iterdir())
    assert names == ["draw.json"] + [f"video-0000{n}.{ext}" for n in range(3) for ext in ("mp4", "txt")]
    frames = np.stack(list(read_frames(out / "video-00001.mp4", 16)))
    assert frames.shape == (9, 48, 64, 3)
    drawn = np.stack(list(draw.render(draw.scene(0, 1, 64 / 48), 9, (48, 64), 16)))
    assert np.abs(frames.astype(float) - drawn).mean() < 4

    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()}
    assert draw.main(command) == 0
    assert "nothing to do" in capsys.readouterr().out
    (out / "video-00002.mp4").unlink()  # as if interrupted
    assert draw.main(command) == 0
    after = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()}
    assert {name: data for name, (data, _) in before.items()} == {name: data for name, (data, _) in after.items()}
    assert sorted(name for name in before if before[name] != after[name]) == ["video-00002.mp4", "video-00002.txt"]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--size", "64"], "HEIGHTxWIDTH"),
        (["--size", "63x64"], "even"),
        (["--videos", "0"], "positive"),
        (["--shapes", "3-2"], "shapes"),
        (["--shapes", "many"], "range"),
        (["--seed", "-1"], "seed"),
    ],
)
def test_command_refuses_in_one_line(tmp_path, capsys, arguments, says):
    assert draw.main([str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and says in error and error.count("\n") == 1


def test_command_leaves_other_folders_alone(tmp_path, capsys):
    (tmp_path / "thesis.doc").write_text("mine")
    assert draw.main([str(tmp_path), "--videos", "1"]) == 2
    assert "not made by data_prep.draw" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.doc"]
    out = tmp_path / "videos"
    assert draw.main([str(out), "--videos", "1", "--frames", "2"]) == 0
    assert draw.main([str(out), "--videos", "2", "--frames", "2"]) == 2
    assert "other settings" in capsys.readouterr().err
