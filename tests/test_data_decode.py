"""Every odd kind of image becomes the right RGB pixels; every kind of bad one its reason."""

import io
import struct
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import TiffImageFile

from cifar.data.decode import BadImage, decode, pixels_to_decode
from tests.images import bad_images, bomb, encode, noise, png


def pixel(data: bytes) -> list[int]:
    return decode(data, 8, "crop")[4, 4].tolist()


def flat(mode: str, colour: object, size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.new(mode, size, colour)  # pyright: ignore[reportArgumentType]


def test_square_rgb_is_kept_exactly():
    pixels = noise(1)
    found = decode(encode(Image.fromarray(pixels)), 32, "crop")
    assert found.dtype == np.uint8
    assert found.flags.writeable
    np.testing.assert_array_equal(found, pixels)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (flat("L", 77), [77, 77, 77]),
        (flat("I;16", 77 * 257), [77, 77, 77]),
        (flat("1", 1), [255, 255, 255]),
        (flat("LA", (0, 0)), [255, 255, 255]),
        (flat("LA", (40, 255)), [40, 40, 40]),
        (flat("RGBA", (255, 0, 0, 255)), [255, 0, 0]),
        (flat("RGBA", (255, 0, 0, 0)), [255, 255, 255]),
        (flat("RGBA", (255, 0, 0, 51)), [255, 204, 204]),
    ],
)
def test_grey_and_transparency_on_white(image: Image.Image, expected: list[int]):
    assert pixel(encode(image)) == expected


def test_palette_with_and_without_transparency():
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    assert pixel(encode(image)) == [10, 20, 30]
    assert pixel(encode(image, transparency=1)) == [255, 255, 255]
    assert pixel(encode(image, "gif")) == [10, 20, 30]


def test_a_palette_of_greys():
    image = Image.new("P", (8, 8), 7)
    image.putpalette([value for grey in range(256) for value in (grey, grey, grey)])
    for kind in ("png", "gif", "bmp", "tiff"):
        assert pixel(encode(image, kind)) == [7, 7, 7]
    half = bytes([255] * 7 + [128])  # alpha by place in the palette
    assert pixel(encode(image, transparency=half)) == [131, 131, 131]


def test_colour_key_transparency_of_rgb():
    assert pixel(encode(flat("RGB", (1, 2, 3)), transparency=(1, 2, 3))) == [255, 255, 255]


def test_cmyk_jpeg():
    """Pure cyan ink: no red, full green and blue."""
    red, green, blue = pixel(encode(flat("CMYK", (255, 0, 0, 0), (16, 16)), "jpeg", quality=95))
    assert red < 10
    assert green > 245
    assert blue > 245


@pytest.mark.parametrize("kind", ["png", "tiff", "ppm"])
def test_16_bit_grey_is_scaled_not_clipped(kind: str):
    values = np.array([0, 128, 129, 257, 25_700, 32_768, 65_406, 65_407, 65_535], np.uint16)
    image = Image.fromarray(np.tile(values, (9, 1)))
    found = decode(encode(image, kind), 9, "crop")
    np.testing.assert_array_equal(found, np.repeat(np.tile(np.round(values / 257), (9, 1))[..., None], 3, axis=2))


def test_16_bit_grey_with_a_transparent_value():
    values = np.array([0, 25_700, 65_535], np.uint16)
    data = encode(Image.fromarray(np.tile(values, (3, 1))), transparency=25_700)
    assert decode(data, 3, "crop")[0, :, 0].tolist() == [0, 255, 255]


def tiff_of_bits(bits: int, photometric: int, pixels: bytes, orientation: int = 1) -> bytes:
    """8x8 grey pixels, packed, in a TIFF that Pillow would not write."""
    tags = {256: 8, 257: 8, 258: bits, 259: 1, 262: photometric, 273: 8, 274: orientation, 277: 1, 278: 8}
    tags[279] = len(pixels)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(("photometric", "expected"), [(1, 32), (0, 223)])
def test_16_bit_grey_that_counts_from_white(photometric: int, expected: int, orientation: int):
    data = tiff_of_bits(16, photometric, struct.pack("<64H", *[32 * 257] * 64), orientation)
    assert pixel(data) == [expected] * 3


def test_12_bit_grey_is_scaled_by_its_own_range():
    """Two pixels in three bytes: 2048 and 4095 of 4095."""
    data = tiff_of_bits(12, 1, bytes([0x80, 0x0F, 0xFF]) * 32)
    assert decode(data, 8, "crop")[0, :2, 0].tolist() == [128, 255]


@pytest.mark.parametrize("kind", ["jpeg", "png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(kind: str, orientation: int):
    """A red top left corner goes where each of the eight orientations says."""
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:16, :16] = 255, 0, 0
    exif = Image.Exif()
    exif[274] = orientation
    found = decode(encode(Image.fromarray(pixels), kind, exif=exif), 32, "crop")
    corners = {(row, column) for row in (4, 27) for column in (4, 27) if found[row, column, 0] > 128}
    expected = {1: (4, 4), 2: (4, 27), 3: (27, 27), 4: (27, 4), 5: (4, 4), 6: (4, 27), 7: (27, 27), 8: (27, 4)}
    assert corners == {expected[orientation]}


def test_animation_gives_its_first_frame():
    frames = [flat("RGB", (200, 0, 0)), flat("RGB", (0, 200, 0))]
    assert pixel(encode(frames[0], "gif", save_all=True, append_images=frames[1:])) == [200, 0, 0]


def test_crop_keeps_the_centre_pad_keeps_all_stretch_ignores_aspect():
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, :20], wide[:, 20:40], wide[:, 40:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    data = encode(Image.fromarray(wide))
    np.testing.assert_array_equal(decode(data, 20, "crop"), wide[:, 20:40])
    padded = decode(data, 60, "pad")
    np.testing.assert_array_equal(padded[20:40], wide)
    assert padded[:20].max() == padded[40:].max() == 0
    stretched = decode(data, 30, "stretch")
    assert [stretched[15, column].tolist() for column in (3, 15, 26)] == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]


def test_extreme_shapes_fit():
    for size in ((1, 1), (1, 5000), (5000, 1)):
        for resize in ("crop", "pad", "stretch"):
            assert decode(encode(Image.new("RGB", size)), 32, resize).shape == (32, 32, 3)


def test_reduced_jpeg_decoding_matches_full_decoding():
    """Against Pillow's full-size decoding and resize, within the error of the codec."""
    gradient = np.linspace(0, 255, 800).astype(np.uint8)
    image = Image.fromarray(
        np.stack(
            [np.tile(gradient, (800, 1)), np.tile(gradient[:, None], (1, 800)), np.full((800, 800), 9, np.uint8)], 2
        )
    )
    data = encode(image, "jpeg", quality=95)
    reference = np.asarray(Image.open(io.BytesIO(data)).resize((32, 32), Image.Resampling.BICUBIC), int)
    assert np.abs(decode(data, 32, "crop").astype(int) - reference).max() <= 3


@pytest.mark.parametrize("kind", bad_images())
def test_bad_images_have_their_reason(kind: str):
    data, reason = bad_images()[kind]
    with pytest.raises(BadImage, match=f"^{reason}$"):
        decode(data, 32, "crop")


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "webp", "tiff", "bmp"])
def test_no_part_of_a_truncated_file_is_substituted(kind: str, keep: float):
    data = encode(Image.fromarray(noise(3, 64)), kind)
    with pytest.raises(BadImage, match="truncated or damaged"):
        decode(data[: int(len(data) * keep)], 32, "crop")


def test_float_pixels_are_refused_by_name():
    with pytest.raises(BadImage, match="unsupported pixel format F"):
        decode(encode(Image.fromarray(np.zeros((8, 8), np.float32)), "tiff"), 8, "crop")


def test_formats_that_run_programs_stay_shut():
    """EPS would start Ghostscript."""
    with pytest.raises(BadImage, match="not an image"):
        decode(encode(flat("RGB", (1, 2, 3)), "eps"), 8, "crop")


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_odd_metadata_spoils_no_photo_and_its_orientation_counts(kind: str):
    """A tag of a type that Pillow reads and cannot write again: exif_transpose fails on it."""
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:16] = 255
    # Little-endian TIFF with two tags: orientation 3, and a resolution that is text.
    tags = struct.pack("<HHIHH", 0x0112, 3, 1, 3, 0) + struct.pack("<HHI4s", 0x011A, 2, 4, b"abc")
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + tags + b"\0\0\0\0"
    data = encode(Image.fromarray(pixels), kind, exif=exif)
    with pytest.raises(TypeError), Image.open(io.BytesIO(data)) as image:
        ImageOps.exif_transpose(image)
    assert decode(data, 32, "crop")[28, 16].min() > 200


def test_unreadable_exif_spoils_no_photo():
    data = encode(Image.fromarray(noise(1)), exif=b"Exif\0\0nonsense")
    np.testing.assert_array_equal(decode(data, 32, "crop"), noise(1))


@pytest.mark.parametrize("error", [MemoryError, OverflowError, SystemError, RecursionError])
@pytest.mark.parametrize("place", ["convert", "resize", "load"])
def test_whatever_a_codec_raises_is_a_bad_image(place: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch):
    data = encode(flat("CMYK", (255, 0, 0, 0), (16, 16)), "tiff")

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(TiffImageFile, place, fail)
    monkeypatch.setattr(Image.Image, place, fail)
    with pytest.raises(BadImage, match=r"damaged|bomb"):
        decode(data, 8, "crop")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "webp", "tiff", "bmp", "ppm"])
def test_random_damage_gives_pixels_or_a_reason(kind: str):
    data = encode(Image.fromarray(noise(3, 16)), kind)
    generator = np.random.default_rng(0)
    for _ in range(100):
        damaged = np.frombuffer(data, np.uint8).copy()
        damaged[generator.integers(0, min(len(data), 200), 4)] = generator.integers(0, 256, 4)
        with suppress(BadImage):
            decode(damaged.tobytes(), 8, "pad")


def test_huge_files_are_refused_by_their_size(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("cifar.data.decode.MAX_BYTES", 100)
    with pytest.raises(BadImage, match="file too large"):
        decode(encode(Image.fromarray(noise(1))), 32, "crop")


def test_pixels_to_decode_are_those_that_are_held():
    photo = Image.new("RGB", (4000, 3000))
    others = [encode(photo, "mpo", save_all=True, append_images=[photo]), encode(photo.convert("L"), "jpeg")]
    for data in (encode(photo, "jpeg"), encode(photo, "jpeg", quality=95, subsampling=0, optimize=True), *others):
        assert pixels_to_decode(data, 32) == 500 * 375
        assert pixels_to_decode(data, 2000) == 4000 * 3000
    for kind, options in (("png", {}), ("jpeg", {"progressive": True}), ("webp", {}), ("gif", {})):
        assert pixels_to_decode(encode(photo, kind, **options), 32) == 4000 * 3000
    assert pixels_to_decode(encode(Image.new("L", (50_000, 1))), 32) == 2 * 50_000
    for data, _ in bad_images().values():
        assert pixels_to_decode(data, 32) in (0, 32 * 32, 64 * 64)


def test_progressive_jpegs_of_endless_scans_are_refused():
    """Each scan of a few bytes is a pass over all pixels: 40 kB took a second."""
    data = encode(Image.new("RGB", (64, 64)), "jpeg", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    assert decode(data[:-2] + 80 * scan + data[-2:], 8, "crop").shape == (8, 8, 3)
    with pytest.raises(BadImage, match="bomb"):
        decode(data[:-2] + 100 * scan + data[-2:], 8, "crop")


def test_a_second_header_does_not_hide_the_size_of_a_png() -> None:
    """Pillow believes the last one."""
    small, huge = png(0, 8), bomb()
    header = huge[8:33]  # length, type, 13 bytes and check sum
    assert pixels_to_decode(small, 32) == 64
    for data in (small[:33] + header + small[33:], huge):
        assert pixels_to_decode(data, 32) in (0, 400_000_000)
        with pytest.raises(BadImage):
            decode(data, 32, "crop")
