"""Sizes: frames, pixels, latents, patches."""

import numpy as np
import pytest

from data_prep.geometry import WAN_2_1, LatentGeometry, parse_size


def test_the_shape_of_a_latent():
    assert WAN_2_1.latent_shape(81, 480, 832) == (16, 21, 60, 104)
    assert WAN_2_1.latent_shape_of(np.zeros((5, 16, 24, 3), np.uint8)) == (16, 2, 2, 3)
    assert LatentGeometry(48, (4, 16, 16)).latent_shape(121, 704, 1280) == (48, 31, 44, 80)


def test_frames_of_video_and_of_latents():
    assert [WAN_2_1.video_frames(count) for count in (0, 1, 2, 21)] == [0, 1, 5, 81]
    assert [WAN_2_1.latent_frames(count) for count in (1, 2, 5, 6, 81)] == [1, 2, 2, 3, 21]


@pytest.mark.parametrize(
    "frames, height, width, says",
    [
        (80, 480, 832, "80 frames: a clip must have 1 + 4k, such as 77 or 81"),
        (0, 480, 832, "such as 1 or 5"),
        (81, 484, 832, "484x832: height and width must be multiples of 8"),
        (81, 0, 832, "0x832"),
    ],
)
def test_sizes_that_make_no_latent(frames, height, width, says):
    with pytest.raises(ValueError, match=says.replace("+", r"\+")):
        WAN_2_1.latent_shape(frames, height, width)


def test_sizes_that_make_no_patches():
    WAN_2_1.check_patches(480, 832)
    with pytest.raises(ValueError, match="must be multiples of 16, such as 32x48"):
        WAN_2_1.check_patches(40, 48)
    with pytest.raises(ValueError, match="multiples of 16 and 32"):
        LatentGeometry(16, (4, 8, 16)).check_patches(16, 16)


def test_sizes_on_the_command_line():
    assert parse_size("480x832") == (480, 832)
    for text in ("480", "480x", "axb", "0x16", "-1x2"):
        with pytest.raises(ValueError, match="HEIGHTxWIDTH"):
            parse_size(text)
