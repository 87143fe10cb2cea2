"""Labelled data, its batches, and the streams of tasks cut from it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from exssnet import tasks
from exssnet.tasks import CropFlip, Labelled


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbered(per_class: int, classes: int = 6, shape: tuple[int, ...] = (1, 2, 2)) -> Labelled:
    """Images that say who they are: all pixels of image i are i (at most 255), classes take turns."""
    n = per_class * classes
    images = torch.arange(n, dtype=torch.uint8).view(-1, *[1] * len(shape)).expand(n, *shape).contiguous()
    return Labelled(images, torch.arange(n) % classes)


def identities(data) -> list[int]:
    return [round(float(x.flatten()[0]) * 255) for x, _ in data]


class Lazy(Dataset):
    """Counts the items that it loads."""

    def __init__(self, items: list[int], **attributes):
        self.items, self.loaded = items, 0
        self.__dict__.update(attributes)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        self.loaded += 1
        return torch.full((2,), float(i)), self.items[i]


@pytest.fixture
def data() -> tuple[Labelled, Labelled]:
    return numbered(10), numbered(3)


# Data in memory


def test_uint8_images_are_scaled_then_changed_then_normalised():
    images = torch.tensor([[[[0, 255]]], [[[51, 102]]]], dtype=torch.uint8)
    data = Labelled(images, torch.tensor([3, 4]), torch.tensor(0.5), torch.tensor(2.0), transform=lambda x: 1 - x)
    x, y = data[[1, 0]]
    assert x.dtype == torch.float32
    assert torch.equal(x, (1 - images[[1, 0]].float() / 255 - 0.5) / 2)
    assert y.tolist() == [4, 3]


def test_one_item_is_a_batch_without_its_batch_dimension(data):
    x, y = data[0][7]
    assert x.shape == (1, 2, 2)
    assert torch.equal(x, data[0][[7]][0][0])
    assert (y.shape, int(y)) == ((), 1)


def test_tokens_stay_what_they_are():
    x, _ = Labelled(torch.tensor([[5, 6], [7, 8]]), torch.tensor([0, 1]))[[1]]
    assert torch.equal(x, torch.tensor([[7, 8]]))


def test_iterating_ends_after_the_last_item(data):
    assert len(list(data[0])) == 60


def test_labels_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"labels must be int64 of shape \(2,\), got torch.int64 of \(3,\)"):
        Labelled(torch.zeros(2, 1), torch.zeros(3, dtype=torch.int64))


# Batches


@pytest.mark.parametrize("lazy", [False, True], ids=["in memory", "lazy"])
def test_loader_visits_every_item_once_in_an_order_that_the_generator_repeats(lazy):
    labels = [i % 6 for i in range(60)]
    train = Lazy(labels, targets=labels) if lazy else numbered(10)
    (task,) = tasks.split_by_class(train, train, 1, validation=0)

    def order(seed):
        return [float(v) for x, _ in tasks.loader(task.train, 8, True, generator(seed)) for v in x.flatten(1)[:, 0]]

    assert order(0) == order(0)
    assert order(0) != order(1)
    assert sorted(order(0)) == sorted(float(x.flatten()[0]) for x, _ in task.train)


def test_loader_keeps_the_last_smaller_batch_and_the_order(data):
    batches = list(tasks.loader(data[0], 25))
    assert [len(y) for _, y in batches] == [25, 25, 10]
    assert torch.equal(torch.cat([y for _, y in batches]), data[0].labels)


def test_loader_takes_any_dataset():
    (x, y), *_ = tasks.loader(Lazy([4, 5, 6]), 2)
    assert x.tolist() == [[0, 0], [1, 1]]
    assert y.tolist() == [4, 5]


def test_the_loader_of_torch_takes_a_task_too(data):
    (task,) = tasks.split_by_class(*data, tasks=1)
    for (x, y), (expected, labels) in zip(DataLoader(task.test, 7), tasks.loader(task.test, 7), strict=True):
        assert torch.equal(x, expected)
        assert torch.equal(y, labels)


def test_loader_leaves_the_global_random_state_alone(data):
    before = torch.get_rng_state()
    list(tasks.loader(data[0], 7))
    list(tasks.loader(data[0], 7, shuffle=True, generator=generator()))
    assert torch.equal(before, torch.get_rng_state())


def test_loader_refuses_an_order_that_nobody_could_repeat(data):
    with pytest.raises(ValueError, match=r"shuffle=True needs a torch\.Generator"):
        tasks.loader(data[0], 7, shuffle=True)


# Tasks of disjoint classes


def test_labels_restart_from_zero_in_the_order_given(data):
    first, second = tasks.split_by_class(*data, tasks=2, order=[5, 0, 3, 1, 2, 4], validation=0)
    assert (first.labels, second.labels) == ((5, 0, 3), (1, 2, 4))
    assert (first.name, first.classes, first.validation) == ("task 0", 3, None)
    for part in (first.train, first.test):
        assert [first.labels[int(y)] for _, y in part] == [i % 6 for i in identities(part)]


def test_every_item_is_in_one_task_once(data):
    stream = tasks.split_by_class(*data, tasks=3, validation=0.2)
    train_items = [i for task in stream for part in (task.train, task.validation) for i in identities(part)]
    assert sorted(train_items) == list(range(60))
    assert sorted(i for task in stream for i in identities(task.test)) == list(range(18))


def test_validation_takes_its_share_of_every_class(data):
    for task in tasks.split_by_class(*data, tasks=2, validation=0.3):
        assert task.validation.labels.bincount().tolist() == [3, 3, 3]
        assert task.train.labels.bincount().tolist() == [7, 7, 7]


def test_validation_does_not_depend_on_the_order_of_the_classes(data):
    def held_out(order):
        return sorted(i for t in tasks.split_by_class(*data, 3, order) for i in identities(t.validation))

    assert held_out(None) == held_out([5, 4, 3, 2, 1, 0])


def test_the_seed_alone_decides_the_validation_data(data):
    def held_out(seed):
        return identities(tasks.split_by_class(*data, tasks=1, validation=0.5, seed=seed)[0].validation)

    torch.manual_seed(1)
    first = held_out(0)
    torch.manual_seed(2)
    assert first == held_out(0) != held_out(1)


def test_an_order_seed_shuffles_the_classes(data):
    def order(seed):
        return [label for t in tasks.split_by_class(*data, 3, order=seed) for label in t.labels]

    assert order(1) == order(1) != order(2)
    assert sorted(order(1)) == list(range(6))


def test_tasks_of_unequal_size_leave_the_surplus_classes_out(data):
    stream = tasks.split_by_class(*data, tasks=[3, 1], validation=0)
    assert [t.labels for t in stream] == [(0, 1, 2), (3,)]
    assert [len(t.train) for t in stream] == [30, 10]


def test_an_order_of_some_classes_uses_only_them(data):
    assert [t.labels for t in tasks.split_by_class(*data, 2, order=[4, 1])] == [(4,), (1,)]


def test_tasks_share_the_images_in_memory(data):
    stream = tasks.split_by_class(*data, tasks=3)
    assert all(t.train.dataset.images is data[0].images for t in stream)
    assert all(t.validation.dataset.images is data[0].images for t in stream)


@pytest.mark.parametrize("attribute", ["targets", "labels"])
def test_a_lazy_dataset_with_labels_is_not_loaded(attribute):
    labels = [0, 1, 2, 3] * 5
    train, test = (Lazy(labels, **{attribute: labels}) for _ in range(2))
    second = tasks.split_by_class(train, test, tasks=2, validation=0)[1]
    assert train.loaded == test.loaded == 0
    x, y = next(iter(tasks.loader(second.train, 2)))
    assert train.loaded == 2
    assert x.tolist() == [[2, 2], [3, 3]]
    assert y.tolist() == [0, 1]


def test_a_dataset_without_labels_is_loaded_once():
    train = Lazy([0, 1] * 5)
    stream = tasks.split_by_class(train, train, tasks=2, validation=0)
    assert train.loaded == 2 * len(train)  # as training and as test data
    assert [int(x[0]) for x, _ in stream[1].test] == [1, 3, 5, 7, 9]


def test_tensors_are_read_in_batches():
    data = TensorDataset(torch.arange(8.0)[:, None], torch.arange(8, dtype=torch.int32) % 2)
    _, odd = tasks.split_by_class(data, data, tasks=2, validation=0)
    assert odd.train[[0, 3]][0].tolist() == [[1], [7]]


def test_a_subset_is_followed_to_its_source(data):
    part = Subset(data[0], [3, 9, 4])
    first, _ = tasks.split_by_class(part, data[0], tasks=2, validation=0)
    assert first.train.dataset is data[0]
    assert identities(first.train) == [3, 9]


def test_a_dataset_without_length_is_refused():
    class Endless(IterableDataset):
        def __iter__(self):
            return iter([(0, 0)])

    with pytest.raises(ValueError, match="Endless has no length: a map-style dataset is needed"):
        tasks.split_by_class(Endless(), Endless(), tasks=1)


def test_labels_that_are_no_integers_are_refused():
    data = Lazy([0, 1], targets=[0.5, 1.5])
    with pytest.raises(ValueError, match=r"labels must be int64 of shape \(2,\), got torch.float32"):
        tasks.split_by_class(data, data, tasks=1)


def test_labels_of_floating_point_are_not_cut_off():
    data = TensorDataset(torch.zeros(2, 1), torch.tensor([0.4, 1.6]))
    with pytest.raises(ValueError, match=r"labels must be int64 of shape \(2,\), got torch.float32"):
        tasks.split_by_class(data, data, tasks=1)


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (["cat", "dog"], "'cat' of str"),
        (np.array(["cat", "dog"]), ".*'cat'.* of str_"),
        ([None, 1], "None of NoneType"),
        ([{"id": 1}, {"id": 2}], "{'id': 1} of dict"),
    ],
)
def test_labels_that_are_no_numbers_are_refused_by_the_first_one(labels, told):
    for data in (Lazy(labels), Lazy([0, 1], targets=labels)):
        with pytest.raises(ValueError, match=rf"^labels must be one integer per item, got {told}$"):
            tasks.split_by_class(data, data, tasks=1)


@pytest.mark.parametrize(
    ("items", "least", "sizes"),
    [
        (0, 2, []), (1, 2, [1]), (4, 2, [4]), (5, 2, [5]), (5, 1, [4, 1]), (6, 2, [4, 2]), (9, 2, [4, 5]),
        (11, 4, [4, 7]), (12, 4, [4, 4, 4]),
    ],
)  # fmt: skip
def test_a_last_batch_of_too_few_items_joins_the_one_before(items, least, sizes):
    assert tasks.batch_sizes(items, 4, least) == sizes
    data = TensorDataset(torch.arange(float(items)), torch.zeros(items, dtype=torch.int64))
    for found in (tasks.Relabelled.of(data), data):
        batches = [x.tolist() for x, _ in tasks.loader(found, 4, least=least)]
        assert [len(batch) for batch in batches] == sizes
        assert [item for batch in batches for item in batch] == list(range(items))


def test_an_epoch_leaves_its_generator_where_torchs_own_batches_leave_it():
    data = TensorDataset(torch.arange(9.0), torch.zeros(9, dtype=torch.int64))
    ours, theirs = torch.Generator(), torch.Generator()
    found = [x for x, _ in tasks.loader(data, 4, shuffle=True, generator=ours)]
    wanted = [x for x, _ in DataLoader(data, 4, shuffle=True, generator=theirs)]
    assert all(map(torch.equal, found, wanted))
    assert torch.equal(ours.get_state(), theirs.get_state())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": 4}, "6 classes do not make 4 tasks of equal size"),
        ({"tasks": 0}, "6 classes do not make 0 tasks of equal size"),
        ({"tasks": [4, 3]}, r"at least 1 class each and at most 6 in all, got \[4, 3\]"),
        ({"tasks": [3, 0]}, r"at least 1 class each and at most 6 in all, got \[3, 0\]"),
        ({"tasks": 2, "order": [0, 1, 1, 2]}, r"different ids of the 6 known classes, got \[0, 1, 1, 2\]"),
        ({"tasks": 2, "order": [0, 6]}, r"different ids of the 6 known classes, got \[0, 6\]"),
        ({"tasks": 2, "validation": 1.0}, r"validation must be a share in \[0, 1\), got 1.0"),
        ({"tasks": 2, "validation": 0.04}, "a validation share of 0.04 of class 0 is 0 of 10 training items"),
        ({"tasks": 2, "validation": 0.96}, "a validation share of 0.96 of class 0 is 10 of 10 training items"),
        ({"tasks": 2, "augment": True}, r"augment=True is for colour images of shape \(3, H, W\), got \(1, 2, 2\)"),
        ({"tasks": 2, "augment": "crop"}, "augment must be True, False or one of crop-flip, flip, got 'crop'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_does_not_suffice_is_said_with_its_numbers(data, arguments, message):
    with pytest.raises(ValueError, match=message):
        tasks.split_by_class(*data, **arguments)


def test_a_class_without_test_items_is_refused(data):
    with pytest.raises(ValueError, match="class 5 has 10 training items, but no test items"):
        tasks.split_by_class(data[0], Subset(data[1], range(5)), tasks=2)


def test_stratified_split_rounds_the_share_of_each_class():
    labels = torch.tensor([7] * 4 + [2] * 10 + [5])
    rest, taken = tasks.stratified_split(labels, 0.4, generator())
    assert labels[taken].bincount(minlength=8)[[7, 2, 5]].tolist() == [2, 4, 0]
    assert torch.equal(torch.cat([rest, taken]).sort().values, torch.arange(15))


# Augmentation


def test_crop_and_flip_take_windows_of_the_padded_image():
    x = torch.arange(1.0, 2 * 3 * 5 * 6 + 1).view(2, 3, 5, 6)
    out = CropFlip(seed=3, padding=2)(x)
    padded = torch.nn.functional.pad(x, [2] * 4)
    for image, source in zip(out, padded, strict=True):
        windows = [source[:, i : i + 5, j : j + 6] for i in range(5) for j in range(5)]
        assert any(torch.equal(image, w) or torch.equal(image, w.flip(2)) for w in windows)


def test_every_crop_is_equally_likely():
    centre = torch.zeros(4000, 1, 3, 3)
    centre[:, :, 1, 1] = 1
    assert (CropFlip(seed=0, padding=1)(centre).mean((0, 1)) - 1 / 9).abs().max() < 0.02


def test_half_of_the_images_are_flipped():
    left = torch.tensor([1.0, 0.0]).expand(4000, 1, 1, 2)
    assert CropFlip(seed=0, padding=0)(left)[..., 1].mean() == pytest.approx(0.5, abs=0.03)


def test_augmentation_is_for_training_data_only():
    data = numbered(10, 4, (3, 32, 32))
    plain, changed = (tasks.split_by_class(data, data, 2, augment=augment)[0] for augment in (False, True))
    assert not torch.equal(changed.train[[5, 6]][0], plain.train[[5, 6]][0])
    for part in (changed.train.unaugmented(), changed.validation, changed.test):
        assert part.dataset.augment is None
    assert torch.equal(changed.train.unaugmented()[[5, 6]][0], plain.train[[5, 6]][0])


def test_validation_data_are_not_augmented_as_the_training_data_were_given():
    data = numbered(10, 4, (3, 4, 4))
    (task,) = tasks.split_by_class(replace(data, augment=lambda x: x + 1), data, 1)
    (plain,) = tasks.split_by_class(data, data, 1)
    assert torch.equal(task.validation[[0, 1]][0], plain.validation[[0, 1]][0])


@pytest.mark.parametrize(
    ("shape", "augment", "padding"),
    [((3, 32, 32), True, 4), ((3, 64, 64), True, 0), ((3, 64, 64), "crop-flip", 4), ((1, 8, 8), "flip", 0)],
)
def test_small_colour_images_are_cropped_and_flipped_larger_ones_flipped_and_others_as_told(shape, augment, padding):
    data = numbered(10, 4, shape)
    (task,) = tasks.split_by_class(data, data, 1, augment=augment)
    assert task.train.dataset.augment.padding == padding


def test_items_that_are_not_in_memory_are_augmented_too():
    class Ones:
        shape = torch.Size((8, 3, 64, 64))

        def __len__(self):
            return 8

        def __getitem__(self, index):
            return torch.arange(64).expand(len(index), *self.shape[1:]).to(torch.uint8)

    data = Labelled(Ones(), torch.arange(8) % 2)
    (task,) = tasks.split_by_class(data, data, 1, validation=0, augment=True)
    first = task.train[range(8)][0][:, 0, 0, 0] * 255
    assert set(first.round().tolist()) == {0.0, 63.0}
    assert task.test[[3]][0].shape == (1, 3, 64, 64)


def test_a_data_set_makes_one_task_under_its_name(data):
    task = tasks.in_one_task("six", *data, validation=0.2, seed=3)
    assert (task.name, task.classes, task.labels) == ("six", 6, tuple(range(6)))
    assert [len(part) for part in (task.train, task.validation, task.test)] == [48, 12, 18]


def test_augmentation_repeats_with_the_seed_and_differs_between_tasks():
    data = numbered(10, 4, (3, 32, 32))

    def batch(seed, task):
        stream = tasks.split_by_class(data, data, 2, seed=seed, augment=True)
        return stream[task].train.dataset.augment(torch.rand(8, 1, 32, 32, generator=generator()))

    assert torch.equal(batch(0, 0), batch(0, 0))
    assert not torch.equal(batch(0, 0), batch(0, 1))
    assert not torch.equal(batch(0, 0), batch(1, 0))


# Tasks of changed images


def images(n: int = 40, shape: tuple[int, ...] = (2, 5, 5)) -> Labelled:
    return Labelled(torch.randint(256, (n, *shape), dtype=torch.uint8, generator=generator()), torch.arange(n) % 4 + 3)


def test_each_task_has_a_permutation_of_its_own_for_all_its_data():
    data = images()
    first, second = tasks.permuted_pixels(data, data, tasks=2)
    assert (second.name, second.classes, second.labels) == ("task 1", 4, (3, 4, 5, 6))
    orders = []
    for task in (first, second):
        order = task.train.dataset.transform(torch.arange(25).expand(1, 2, 25).view(1, 2, 5, 5))[0, 0].flatten()
        orders.append(order)
        assert sorted(order.tolist()) == list(range(25))
        for part in (task.train, task.validation, task.test):
            x = data[part.index][0].flatten(2)[:, :, order].view(-1, 2, 5, 5)
            assert torch.equal(part[range(len(part))][0], x)
    assert not torch.equal(*orders)


def test_permutations_repeat_with_the_seed():
    data = images()
    a, b, c = (tasks.permuted_pixels(data, data, 2, seed=seed)[1].test[[0]][0] for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_changed_tasks_hold_out_the_same_validation_items():
    data = images()
    first, second = tasks.permuted_pixels(data, data, 2, validation=0.3)
    assert torch.equal(first.validation.index, second.validation.index)
    assert first.validation.labels.bincount().tolist() == [3] * 4


@pytest.mark.parametrize("quarter", range(4))
def test_rotation_is_counterclockwise(quarter):
    data = images()
    task = tasks.rotated(data, data, tasks=4)[quarter]
    x, _ = task.test[range(40)]
    torch.testing.assert_close(x, data[range(40)][0].rot90(quarter, (2, 3)), rtol=0, atol=1e-5)


def test_rotation_keeps_the_proportions_of_a_wide_image():
    wide = torch.zeros(1, 1, 9, 15)
    wide[0, 0, 4, 11] = 1  # 4 right of the centre; a quarter turn later 4 above it
    data = TensorDataset(wide, torch.tensor([0]))
    (task,) = tasks.rotated(data, data, tasks=[90.0], validation=0)
    assert task.test[[0]][0].flatten().argmax() == 0 * 15 + 7


def test_an_earlier_transform_comes_first():
    data = Labelled(images().images, images().labels, transform=lambda x: x.flip(3))
    (task,) = tasks.rotated(data, data, tasks=[180])
    torch.testing.assert_close(task.test[[0]][0], images()[[0]][0].flip(2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("stream", [tasks.permuted_pixels, tasks.rotated])
def test_lazy_images_are_not_changed(stream):
    data = Lazy([0, 1], targets=[0, 1])
    with pytest.raises(ValueError, match=r"images \(N, C, H, W\) in memory are needed"):
        stream(data, data, 2)


def test_augmentation_restarts_from_its_seed() -> None:
    images = torch.randint(256, (40, 3, 32, 32), dtype=torch.uint8)
    data = TensorDataset(images, torch.arange(40) % 2)
    (task,) = tasks.split_by_class(data, data, 1, validation=0, augment=True)
    first, second = task.train[range(40)][0], task.train[range(40)][0]
    assert not torch.equal(first, second)
    task.train.restart()
    assert torch.equal(task.train[range(40)][0], first)
