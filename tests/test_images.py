"""Pictures in and out: every mode becomes upright RGB on white, every bad file one clear line."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from lavit.config import InputError
from lavit.images import ASPECT_SIZES, MAX_PIXELS, aspect_size, open_image, pixels, to_image

HALF = (0.5, 0.5, 0.5)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def noise(height: int = 24, width: int = 40, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def png_header(width: int, height: int) -> bytes:
    """A well-formed PNG of a few bytes that claims to be width x height."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "RGB", "RGBA", "LA", "PA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F"]
)
def test_every_mode_becomes_rgb(mode):
    image = Image.fromarray(noise())
    image = (
        image.convert("L").convert(mode)
        if mode == "PA"
        else (
            Image.fromarray(noise(), "RGB").convert("L").convert(mode)
            if mode in ("LA", "F", "I")
            else _as(image, mode)
        )
    )
    opened = open_image(image)
    assert (opened.mode, opened.size) == ("RGB", (40, 24))
    assert opened is not image


def _as(image: Image.Image, mode: str) -> Image.Image:
    return Image.new("LAB", image.size, (50, 0, 0)) if mode == "LAB" else image.convert(mode)


def test_opaque_values_survive_all_entrances(tmp_path):
    values = noise()
    file = tmp_path / "a.png"
    file.write_bytes(encoded(Image.fromarray(values)))
    for source in (file, str(file), file.read_bytes(), Image.open(file)):
        assert np.array_equal(np.asarray(open_image(source)), values)


def test_arrays_and_tensors_are_pictures():
    values = noise()
    tensor = torch.from_numpy(values).permute(2, 0, 1)
    rounded = (values / 255).astype(np.float32) + np.float32(1e-4)
    for source in (values, values / 255, rounded, values[:, ::-1][:, ::-1], tensor, tensor / 255):
        assert np.array_equal(np.asarray(open_image(source)), values)
    assert np.array_equal(np.asarray(open_image((tensor / 255).double().requires_grad_())), values)
    opened = open_image(values)
    values[:] = 0
    assert np.asarray(opened).any()  # a copy


@pytest.mark.parametrize(
    ("source", "line"),
    [
        (np.zeros((3, 8, 8), np.uint8), r"array has shape \(3, 8, 8\), expected \(height, width"),
        (torch.zeros(8, 8, 3), r"tensor has shape \(8, 8, 3\), expected \(3, height, width\)"),
        (torch.zeros(2, 3, 8, 8), "give one picture, or a list of them"),
        (np.zeros((8, 8), np.uint8), "has shape"),
        (np.zeros((0, 8, 3), np.uint8), "is empty"),
        (np.full((8, 8, 3), 2.0), "values outside 0..1"),
        (np.full((8, 8, 3), np.nan), "values outside 0..1"),
        (-torch.ones(3, 8, 8), "values outside 0..1"),
        (np.zeros((8, 8, 3), np.int64), "holds int64: give uint8"),
        (np.broadcast_to(np.zeros(3, np.uint8), (9000, 9000, 3)), "too large"),
    ],
)
def test_other_arrays_are_refused_in_one_line(source, line):
    with pytest.raises(InputError, match=line) as raised:
        open_image(source)
    assert "\n" not in str(raised.value)


def test_other_values_are_no_pictures():
    with pytest.raises(InputError, match="of type int is not a picture"):
        open_image.__wrapped__(3)  # past the tests' type checker


def test_transparency_lies_on_white():
    rgba = np.zeros((2, 3, 4), np.uint8)
    rgba[0, :, :] = (255, 0, 0, 255)
    opened = np.asarray(open_image(encoded(Image.fromarray(rgba))))
    assert (opened[0] == (255, 0, 0)).all() and (opened[1] == 255).all()
    half = open_image(encoded(Image.new("LA", (1, 1), (0, 128))))
    assert half.getpixel((0, 0)) == (127, 127, 127)


def test_palette_and_colour_key_transparency_lie_on_white():
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.putpixel((1, 0), 1)
    opened = open_image(encoded(palette, transparency=0))
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (10, 20, 30)]
    keyed = open_image(encoded(Image.new("RGB", (1, 1), (1, 2, 3)), transparency=(1, 2, 3)))
    assert keyed.getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bit_greys_keep_their_upper_byte():
    values = np.array([[0, 256, 32768, 65535]], np.uint16)
    opened = open_image(encoded(Image.fromarray(values)))
    assert np.asarray(opened)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_floats_are_read_by_range():
    unit = open_image(encoded(Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32)), "TIFF"))
    bytes_ = open_image(
        encoded(Image.fromarray(np.array([[0.0, 127.0, 300.0]], np.float32)), "TIFF")
    )
    assert np.asarray(unit)[0, :, 0].tolist() == [0, 128, 255]
    assert np.asarray(bytes_)[0, :, 0].tolist() == [0, 127, 255]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = noise(4, 6)
    upright = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: np.rot90(stored, -1),
        7: np.rot90(stored, 2).transpose(1, 0, 2),
        8: np.rot90(stored, 1),
    }[orientation]
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    opened = open_image(encoded(Image.fromarray(stored), kind, exif=exif, **options))
    assert np.array_equal(np.asarray(opened), upright)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert open_image(data).getpixel((4, 4)) == (255, 0, 0)
    later = Image.open(io.BytesIO(data))
    later.seek(2)
    assert open_image(later).getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize(
    "size", [(9000, 9000), (12000, 12000), (60000, 60000), (1, MAX_PIXELS + 1)]
)
def test_absurd_dimensions_are_refused_from_the_header(tmp_path, size):
    file = tmp_path / "bomb.png"
    file.write_bytes(png_header(*size))
    with pytest.raises(
        InputError, match=r"bomb\.png' is too large.*at most 67 megapixels"
    ) as raised:
        open_image(file)
    assert "\n" not in str(raised.value)


def test_bad_files_are_named_in_one_line(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").write_bytes(b"")
    whole = encoded(Image.fromarray(noise(200, 200)))
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "new\nline.png").write_bytes(b"?")
    for name, words in {
        "missing.png": "does not exist",
        "folder": "is a folder",
        "text.png": "not a picture",
        "empty.png": "not a picture",
        "cut.png": "damaged or cut short",
        "new\nline.png": "not a picture",
        "x" * 300: "cannot be read",
    }.items():
        with pytest.raises(InputError, match=words) as raised:
            open_image(tmp_path / name)
        assert name.replace("\n", "\\n") in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", ["EPS", "PCX", "TGA", "SGI", "ICO", "IM", "MSP", "SPIDER", "PPM"])
def test_other_formats_of_pillow_are_not_decoded(kind):
    mode = {"MSP": "1", "SPIDER": "F"}.get(kind, "RGB")
    data = encoded(Image.new(mode, (32, 32)), kind)
    assert Image.open(io.BytesIO(data)).format == kind
    with pytest.raises(InputError, match="give PNG, JPEG, WEBP, GIF, BMP or TIFF"):
        open_image(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_a_file_cut_anywhere_is_an_input_error_or_a_picture(kind):
    """No other exception escapes, whatever byte a file ends at; cut to half it is never taken for
    whole.
    """
    whole = encoded(Image.fromarray(noise(32, 32)), kind)
    for end in range(0, len(whole), max(1, len(whole) // 60)):
        try:
            opened = open_image(whole[:end])
        except InputError as error:
            assert "\n" not in str(error)
        else:
            assert opened.size == (32, 32) and end > len(whole) // 2


def test_scrambled_bytes_never_escape_as_another_error():
    generator = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"):
        whole = np.frombuffer(encoded(Image.fromarray(noise(16, 16)), kind), np.uint8)
        for _ in range(60):
            broken = whole.copy()
            broken[generator.integers(0, len(broken), 4)] = generator.integers(0, 256, 4)
            try:
                assert open_image(broken.tobytes()).mode == "RGB"
            except InputError as error:
                assert "\n" not in str(error)


def test_pixels_squashes_and_normalises():
    images = [Image.fromarray(noise(24, 40)), Image.new("RGB", (5, 90), (255, 128, 0))]
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    batch = pixels(images, 16, mean, std)
    assert batch.shape == (2, 3, 16, 16) and batch.dtype == torch.float32
    expected = (torch.tensor([1.0, 128 / 255, 0.0]) - torch.tensor(mean)) / torch.tensor(std)
    torch.testing.assert_close(batch[1], expected.view(3, 1, 1).expand(3, 16, 16))
    reference = np.asarray(images[0].resize((16, 16), Image.Resampling.BICUBIC), np.float32) / 255
    torch.testing.assert_close(
        batch[0].permute(1, 2, 0), torch.from_numpy((reference - mean) / std).float()
    )
    assert pixels([], 16, mean, std).shape == (0, 3, 16, 16)
    assert torch.equal(pixels([images[0].convert("RGBA")], 16, mean, std), batch[:1])


def test_to_image_inverts_pixels():
    image = Image.fromarray(noise(32, 32))
    (picture,) = pixels([image], 32, HALF, HALF)
    assert np.array_equal(np.asarray(to_image(picture)), np.asarray(image))
    assert to_image(torch.full((3, 2, 4), 7.0)).getpixel((3, 1)) == (255, 255, 255)
    with pytest.raises(ValueError, match="not finite"):
        to_image(torch.full((3, 2, 2), float("nan")))


def test_aspect_sizes_hold_their_ratio():
    for ratio, (height, width) in ASPECT_SIZES.items():
        across, down = map(int, ratio.split(":"))
        assert width / height == pytest.approx(across / down, rel=0.04)
        assert aspect_size(ratio) == (height, width)
    with pytest.raises(InputError, match="5:4"):
        aspect_size("5:4")
