"""What counts as the same result."""

import pytest
import torch

from benchmarks import agreement
from benchmarks.agreement import check_close, check_same

RIGHT = torch.arange(1.0, 25.0).view(6, 4)


@pytest.mark.parametrize("chunk", [1, 8, 2**26])  # row by row, two rows at once, all at once
def test_the_norm_of_the_difference_is_held_to_the_tolerance(monkeypatch, chunk):
    monkeypatch.setattr(agreement, "CHUNK", chunk)
    wrong = RIGHT.clone()
    wrong[-1, -1] += 0.01 * RIGHT.norm()
    check_close(wrong, RIGHT, 0.011, "they")
    with pytest.raises(AssertionError, match=r"they differ by 1.0e-02"):
        check_close(wrong, RIGHT, 0.009, "they")


@pytest.mark.parametrize(
    "wrong",
    [
        RIGHT.clone().fill_(torch.nan),
        RIGHT[:5],  # another shape
        RIGHT.view(4, 6),  # the same numbers in another shape
    ],
)
def test_what_is_not_comparable_does_not_pass(wrong):
    with pytest.raises(AssertionError):
        check_close(wrong, RIGHT, 1.0, "they")


def test_zeros_are_compared_by_what_they_are_apart():
    zeros = torch.zeros(3)
    check_close(zeros, zeros, 0.0, "they")
    with pytest.raises(AssertionError):
        check_close(zeros + 1, zeros, 0.5, "they")


def test_a_single_number_is_compared_too():
    check_close(torch.tensor(1.0), torch.tensor(1.0), 0.0, "they")
    with pytest.raises(AssertionError):
        check_close(torch.tensor(2.0), torch.tensor(1.0), 0.5, "they")


def test_integers_must_be_equal_whatever_their_width():
    ids = torch.tensor([1, 2])
    check_same((ids.int(), RIGHT), (ids, RIGHT), None, "they")
    with pytest.raises(AssertionError, match="integers"):
        check_same((ids + 1, RIGHT), (ids, RIGHT), None, "they")


def test_float32_is_held_to_float32_unless_said_otherwise():
    near = RIGHT * (1 + 1e-3)
    check_same(near, RIGHT, 1e-2, "they")
    with pytest.raises(AssertionError):
        check_same(near, RIGHT, None, "they")


def test_a_missing_output_is_noticed():
    with pytest.raises(ValueError, match="zip"):
        check_same((RIGHT,), (RIGHT, RIGHT), None, "they")
