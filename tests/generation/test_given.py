"""The first chunks of a video: from another video, or from an image."""

import numpy as np
import pytest
from PIL import Image

from data_prep.video import write_video
from rf_train.generation.given import first_frames, opaque, still_image
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


def test_transparent_parts_are_white_and_16_bits_are_rounded(tmp_path):
    for mode in ("RGBA", "LA"):
        picture = Image.new("L", (2, 1)).convert(mode)
        picture.putalpha(Image.fromarray(np.array([[0, 255]], np.uint8)))
        assert np.asarray(opaque(picture)).tolist() == [[[255] * 3, [0] * 3]]
    palette = Image.new("P", (2, 1))
    palette.putpixel((1, 0), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.info["transparency"] = 0
    assert np.asarray(opaque(palette))[0, :, 0].tolist() == [255, 9]
    Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16)).save(tmp_path / "deep.png")
    with Image.open(tmp_path / "deep.png") as picture:
        assert np.asarray(opaque(picture))[0, :, 0].tolist() == [0, 100, 255]


def test_files_that_are_no_images(tiny_generator, tmp_path):
    (tmp_path / "a.png").write_bytes(b"nothing of the kind")
    Image.new("RGB", (64, 64)).save(tmp_path / "b.png")
    (tmp_path / "c.png").write_bytes((tmp_path / "b.png").read_bytes()[:60])
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "d.tif")
    wrong = [("a.png", "not an image"), ("c.png", "not an image"), ("d.tif", "not an image .it has numbers of 32 bits")]
    for name, says in [*wrong, ("none.png", "missing")]:
        with pytest.raises(ValueError, match=f"{name}: {says}"):
            still_image(tiny_generator(), tmp_path / name)
