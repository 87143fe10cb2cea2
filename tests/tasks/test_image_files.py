"""Image files of every kind that Pillow reads: the right pixels, or one sentence with the file's name."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exssnet import tasks
from exssnet.tasks.datasets import ImageFiles

image = pytest.importorskip("PIL.Image")

WIDE = np.array([[0, 255, 256, 257], [4095, 32768, 65280, 65535]], np.uint16)
NARROW = np.array([[0, 1, 127, 128], [200, 254, 255, 3]], np.uint8)
COLOURS = np.stack([NARROW, NARROW[::-1], 255 - NARROW], axis=2)  # (2, 4, 3)


def png(depth: int, colour: int, pixels: np.ndarray[Any, Any], size: tuple[int, int] | None = None) -> bytes:
    """A PNG of so many bits and this type of colour; its header may claim another size (W, H)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", *(size or pixels.shape[1::-1]), depth, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def tiff(bits: int, pixels: bytes, photometric: int = 1, sample: int = 1) -> bytes:
    """A little-endian TIFF of 4 x 2 pixels; sample: 1 unsigned, 2 signed, 3 floating point."""
    tags = {256: 4, 257: 2, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 2, 279: len(pixels)}
    tags |= {339: sample}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    padded = pixels + b"\0" * (len(pixels) % 2)
    return b"II*\0" + struct.pack("<I", 8 + len(padded)) + padded + struct.pack("<H", len(tags)) + entries + b"\0" * 4


def saved(mode: str, pixels: np.ndarray[Any, Any], kind: str, **how: Any) -> bytes:
    """What Pillow writes of an image of this mode."""
    file = io.BytesIO()
    image.frombytes(mode, pixels.shape[1::-1], pixels.tobytes()).save(file, kind, **how)
    return file.getvalue()


def twelve(pixels: np.ndarray[Any, Any]) -> bytes:
    """12 bits a pixel, the upper ones first."""
    bits = "".join(f"{value:012b}" for value in pixels.flatten())
    return int(bits, 2).to_bytes(len(bits) // 8, "big")


def of_palette(**how: Any) -> bytes:
    made = image.frombytes("P", (4, 2), bytes(range(8)))
    made.putpalette(COLOURS.flatten().tolist())
    file = io.BytesIO()
    made.save(file, "PNG", **how)
    return file.getvalue()


def grey(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.repeat(pixels[:, :, None], 3, axis=2)


HIGH = (WIDE >> 8).astype(np.uint8)
DEEP = np.stack([WIDE, WIDE[::-1], WIDE[:, ::-1]], axis=2)
LITTLE = np.array([[0, 15, 16, 17], [255, 2048, 4080, 4095]], np.uint16)
INKS = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 255, 0, 0], [0, 0, 255, 0]],
                 [[0, 0, 0, 255], [255, 255, 0, 0], [255, 255, 255, 0], [9, 9, 9, 255]]], np.uint8)  # fmt: skip
PRINTED = np.array([[[255, 255, 255], [0, 255, 255], [255, 0, 255], [255, 255, 0]],
                    [[0, 0, 0], [0, 0, 255], [0, 0, 0], [0, 0, 0]]], np.uint8)  # fmt: skip
ALPHA = NARROW[:, ::-1, None]

READ: dict[str, tuple[str, Callable[[], bytes], np.ndarray[Any, Any]]] = {
    "grey PNG, 16 bits": ("png", lambda: png(16, 0, WIDE.astype(">u2")), grey(HIGH)),
    "grey PNG, 16 bits, by Pillow": ("png", lambda: saved("I;16", WIDE, "PNG"), grey(HIGH)),
    "grey and alpha PNG, 16 bits": ("png", lambda: png(16, 4, np.dstack([WIDE, WIDE]).astype(">u2")), grey(HIGH)),
    "RGB PNG, 16 bits": ("png", lambda: png(16, 2, DEEP.astype(">u2")), (DEEP >> 8).astype(np.uint8)),
    "RGBA PNG, 16 bits": (
        "png", lambda: png(16, 6, np.dstack([DEEP, WIDE]).astype(">u2")), (DEEP >> 8).astype(np.uint8),
    ),
    "grey PNG, 4 bits": ("png", lambda: png(4, 0, np.array([[0x01, 0x78], [0xEF, 0x20]], np.uint8), (4, 2)),
                         grey(np.array([[0, 17, 119, 136], [238, 255, 34, 0]], np.uint8))),
    "PNG, 1 bit": ("png", lambda: png(1, 0, np.array([[0x50], [0xA0]], np.uint8), (4, 2)),
                   grey(np.array([[0, 255, 0, 255], [255, 0, 255, 0]], np.uint8))),
    "grey PNG": ("png", lambda: saved("L", NARROW, "PNG"), grey(NARROW)),
    "grey PNG, one level transparent": ("png", lambda: saved("L", NARROW, "PNG", transparency=127), grey(NARROW)),
    "grey and alpha PNG": ("png", lambda: saved("LA", np.dstack([NARROW, ALPHA]), "PNG"), grey(NARROW)),
    "RGB PNG, one colour transparent": (
        "png", lambda: saved("RGB", COLOURS, "PNG", transparency=(0, 200, 255)), COLOURS,
    ),
    "RGBA PNG": ("png", lambda: saved("RGBA", np.dstack([COLOURS, ALPHA]), "PNG"), COLOURS),
    "palette": ("png", of_palette, COLOURS),
    "palette, one colour transparent": ("png", lambda: of_palette(transparency=3), COLOURS),
    "palette with transparency": ("png", lambda: of_palette(transparency=bytes(range(0, 256, 32))), COLOURS),
    "GIF named JPG": ("jpg", lambda: saved("RGB", COLOURS, "GIF"), COLOURS),
    "grey TIFF, 16 bits": ("tiff", lambda: saved("I;16", WIDE, "TIFF"), grey(HIGH)),
    "grey TIFF, 16 bits, big-endian": ("tif", lambda: saved("I;16B", WIDE.astype(">u2"), "TIFF"), grey(HIGH)),
    "grey TIFF, 12 bits": ("tif", lambda: tiff(12, twelve(LITTLE)), grey((LITTLE >> 4).astype(np.uint8))),
    "grey TIFF, white is 0": ("tif", lambda: tiff(8, NARROW.tobytes(), photometric=0), grey(255 - NARROW)),
    "CMYK TIFF": ("tif", lambda: saved("CMYK", INKS, "TIFF"), PRINTED),
    "RGBA TIFF": ("tif", lambda: saved("RGBA", np.dstack([COLOURS, ALPHA]), "TIFF"), COLOURS),
    "grey PGM, 16 bits": ("pgm", lambda: b"P5 4 2 65535\n" + WIDE.astype(">u2").tobytes(), grey(HIGH)),
    "grey PGM, up to 1000": ("pgm", lambda: b"P2 4 2 1000\n0 4 250 500 600 750 999 1000\n",
                             grey(np.array([[0, 1, 64, 128], [153, 191, 255, 255]], np.uint8))),
    "PBM": ("ppm", lambda: b"P1 4 2\n1 0 1 0\n0 1 0 1\n",
            grey(np.array([[0, 255, 0, 255], [255, 0, 255, 0]], np.uint8))),
    "grey BMP": ("bmp", lambda: saved("L", NARROW, "BMP"), grey(NARROW)),
    "RGB BMP": ("bmp", lambda: saved("RGB", COLOURS, "BMP"), COLOURS),
    "grey JPEG": ("jpg", lambda: saved("L", np.full((2, 4), 77, np.uint8), "JPEG"), np.full((2, 4, 3), 77, np.uint8)),
    "CMYK JPEG": ("jpg", lambda: saved("CMYK", np.zeros((2, 4, 4), np.uint8), "JPEG"),
                  np.full((2, 4, 3), 255, np.uint8)),
}  # fmt: skip


def read(file: Path) -> np.ndarray[Any, Any]:
    """The one image of a file, (H, W, 3)."""
    batch = ImageFiles([file])[torch.tensor([0])]
    assert batch.dtype == torch.uint8
    return batch[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("kind", READ)
def test_pixels_are_those_of_the_file_with_8_bits_a_channel(tmp_path: Path, kind: str) -> None:
    suffix, content, expected = READ[kind]
    file = tmp_path / f"made.{suffix}"
    file.write_bytes(content())
    assert np.array_equal(read(file), expected)


FLOATS = np.linspace(0, 1, 8, dtype="<f4")
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 2\n%%EndComments\n(x) print\n%%EOF\n"
NOISE = np.random.default_rng(0).integers(256, size=(64, 64), dtype=np.uint8)
PIXEL = np.zeros((1, 1), np.uint8)
REFUSED: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "TIFF of floating point numbers": ("tif", lambda: tiff(32, FLOATS.tobytes(), sample=3), "range is not known"),
    "TIFF of 32-bit integers": ("tif", lambda: tiff(32, WIDE.astype("<u4").tobytes()), "range is not known"),
    "TIFF of signed 16-bit integers": ("tif", lambda: tiff(16, WIDE.tobytes(), sample=2), "range is not known"),
    "TIFF of 16 bits, white is 0": ("tif", lambda: tiff(16, WIDE.tobytes(), photometric=0), "0 for white: invert it"),
    "PFM": ("ppm", lambda: b"Pf\n4 2\n-1.0\n" + FLOATS.tobytes(), "range is not known"),
    "200 million pixels": ("png", lambda: png(8, 0, PIXEL, (20_000, 10_000)), "decompression bomb"),
    "100 million pixels": ("png", lambda: png(8, 0, PIXEL, (10_000, 10_000)), "decompression bomb"),
    "PostScript": ("png", lambda: POSTSCRIPT, "cannot identify"),
    "nothing": ("png", lambda: b"", "cannot identify"),
    "cut off": ("png", lambda: saved("RGB", COLOURS, "PNG")[:50], "truncated|broken"),
    "JPEG cut off": ("jpg", lambda: saved("L", NOISE, "JPEG")[:-100], "truncated"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_right_pixels_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    suffix, content, message = REFUSED[kind]
    file = tmp_path / f"made.{suffix}"
    file.write_bytes(content())
    with pytest.raises(ValueError, match=rf"made\.{suffix} is no image that can be read: .*({message})") as refusal:
        read(file)
    assert "\n" not in str(refusal.value)


def test_names_from_a_folder_reach_a_message_without_their_control_characters(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        (tmp_path / split / "a" / "x\x1b]0;title\x07.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"x\\x1b\]0;title\\x07\.png is no image") as refusal:
        tasks.load(tmp_path)
    assert str(refusal.value).isprintable()
    (tmp_path / "test" / "b\x1b[31m").mkdir()
    with pytest.raises(ValueError, match="only one has") as refusal:
        tasks.load(tmp_path)
    assert str(refusal.value).isprintable()
