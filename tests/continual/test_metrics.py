"""Metrics on matrices worked out by hand."""

import math

import numpy as np
import pytest
import torch

from exssnet.continual import metrics

NAN = math.nan
# Task 0: 0.8, then 0.9, ends at 0.6. Task 1: 0.5, ends at 0.7. Task 2: 1.0.
ROWS = [[0.8, NAN, NAN], [0.9, 0.5, NAN], [0.6, 0.7, 1.0]]
ONE = [[0.25]]


@pytest.fixture(params=[list, np.array, torch.tensor], ids=["lists", "numpy", "torch"])
def accuracy(request):
    return request.param(ROWS)


def test_average_accuracy_is_the_mean_of_the_last_row(accuracy):
    assert metrics.average_accuracy(accuracy) == pytest.approx((0.6 + 0.7 + 1.0) / 3)


def test_backward_transfer_compares_the_last_row_with_the_diagonal(accuracy):
    assert metrics.backward_transfer(accuracy) == pytest.approx(((0.6 - 0.8) + (0.7 - 0.5)) / 2)


def test_forgetting_is_measured_from_the_best_earlier_row(accuracy):
    assert metrics.forgetting(accuracy) == pytest.approx(((0.9 - 0.6) + (0.5 - 0.7)) / 2)


def test_learning_accuracy_is_the_mean_of_the_diagonal(accuracy):
    assert metrics.learning_accuracy(accuracy) == pytest.approx((0.8 + 0.5 + 1.0) / 3)


def test_learning_gain_compares_the_diagonal_with_individual_networks(accuracy):
    assert metrics.learning_gain(accuracy, [0.9, 0.5, 0.7]) == pytest.approx((-0.1 + 0.0 + 0.3) / 3)


def test_forward_transfer_leaves_the_first_task_out():
    assert metrics.forward_transfer([NAN, 0.6, 0.5], [0.1, 0.2, 0.3]) == pytest.approx((0.4 + 0.2) / 2)


def test_one_task_transfers_and_forgets_nothing():
    assert metrics.backward_transfer(ONE) == metrics.forgetting(ONE) == metrics.forward_transfer([0.5], [0.1]) == 0.0
    assert metrics.average_accuracy(ONE) == metrics.learning_accuracy(ONE) == 0.25


def test_two_tasks_forget_from_the_first_row():
    assert metrics.forgetting([[0.75, 0.9], [0.5, 1.0]]) == 0.25


def test_accuracies_after_the_last_task_do_not_count_as_earlier_ones():
    assert metrics.forgetting([[0.5, 0.0], [0.75, 1.0]]) == -0.25


def test_a_matrix_that_is_not_square_is_refused():
    with pytest.raises(ValueError, match=r"must be a \(T, T\) matrix, got shape \(1, 2\)"):
        metrics.average_accuracy([[0.1, 0.2]])


def test_a_hole_below_the_diagonal_is_named():
    with pytest.raises(ValueError, match=r"accuracy\[1, 0\] is NaN: task 0 was not evaluated after learning task 1"):
        metrics.average_accuracy([[0.1, NAN], [NAN, 0.2]])


def test_another_number_of_individual_networks_is_refused():
    with pytest.raises(ValueError, match=r"individual must hold one accuracy for each of 3 tasks, got shape \(2,\)"):
        metrics.learning_gain(ROWS, [0.1, 0.2])


@pytest.mark.parametrize(("target", "epochs"), [(0.1, 1), (0.5, 2), (0.7, 4), (0.8, None)])
def test_epochs_to_reach_counts_from_one_to_the_first_epoch_there(target: float, epochs: int | None) -> None:
    assert metrics.epochs_to_reach([0.2, 0.5, 0.4, 0.7], target) == epochs
