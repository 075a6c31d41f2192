"""The first chunks of a video: from another video, or from an image."""

import numpy as np
import pytest
from PIL import Image

from data_prep.video import write_video
from rf_train.generation.given import first_frames, still_image
from rf_train.generation.stream import stream


@pytest.mark.parametrize("first_chunk", [1, 3])
def test_an_image_fills_the_first_chunk(tiny_generator, tmp_path, first_chunk):
    """Turned upright as its camera says, and cut at its centre; repeated where the first chunk is longer than one."""
    generator = tiny_generator(first_chunk=first_chunk)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    wide = np.concatenate([pixels[:, :4] * 0, pixels, pixels[:, :4] * 0], axis=1)
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side: to be turned by 90 degrees
    Image.fromarray(np.rot90(wide)).save(tmp_path / "image.png", exif=exif)
    given = still_image(generator, tmp_path / "image.png")
    expected = generator.codec.encode(np.repeat(pixels[None], 4 * first_chunk - 3, axis=0))
    assert given.shape == (1, 16, first_chunk, 4, 6) and np.array_equal(given[0].numpy(), expected)
    made = np.concatenate(list(stream(generator, "a", seconds=2, given=given)))
    assert np.array_equal(made[: 4 * first_chunk - 3], generator.codec.decode(expected))
    assert len(made) == 32 and not np.array_equal(made[-1], made[0])


def test_a_video_gives_its_first_whole_chunks(tiny_generator, tmp_path):
    generator = tiny_generator()
    write_video(tmp_path / "v.mp4", np.random.default_rng(0).integers(0, 256, (22, 32, 48, 3), dtype=np.uint8), 16)
    assert first_frames(generator, tmp_path / "v.mp4", 1).shape == (1, 16, 3, 4, 6)
    assert first_frames(generator, tmp_path / "v.mp4", 5).shape == (1, 16, 6, 4, 6)
    write_video(tmp_path / "short.mp4", np.zeros((8, 32, 48, 3), np.uint8), 16)
    with pytest.raises(ValueError, match="8 frames at 16 fps, the first chunk needs 9"):
        first_frames(generator, tmp_path / "short.mp4", 1)


def test_files_that_are_no_images(tiny_generator, tmp_path):
    (tmp_path / "a.png").write_bytes(b"nothing of the kind")
    Image.new("RGB", (64, 64)).save(tmp_path / "b.png")
    (tmp_path / "c.png").write_bytes((tmp_path / "b.png").read_bytes()[:60])
    for name, says in (("a.png", "not an image"), ("c.png", "not an image"), ("none.png", "missing")):
        with pytest.raises(ValueError, match=f"{name}: {says}"):
            still_image(tiny_generator(), tmp_path / name)
