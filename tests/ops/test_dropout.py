"""The bits of dropout: Philox against published answers, the mask against its definition."""

import pytest
import torch

from moe_mt.ops.dropout import dropped_below, keep_mask, philox

SEED = torch.tensor([0x0123456789ABCDEF])

# Rounds, key, counter, words: the known answers of Random123 for philox4x32.
ONES = "ffffffff ffffffff"
ANSWERS = {
    "7 rounds of zeros": (7, "0 0", "0 0 0 0", "5f6fb709 0d893f64 4f121f81 4f730a48"),
    "7 rounds of ones": (
        7,
        ONES,
        f"{ONES} {ONES}",
        "5207ddc2 45165e59 4d8ee751 8c52f662",
    ),
    "10 rounds of zeros": (10, "0 0", "0 0 0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    "10 rounds of ones": (
        10,
        ONES,
        f"{ONES} {ONES}",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    "10 rounds of the digits of pi": (
        10,
        "a4093822 299f31d0",
        "243f6a88 85a308d3 13198a2e 03707344",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
}


def words(text):
    return [int(word, 16) for word in text.split()]


def seed_of(key):
    """Return the seed whose lower half is the key's first word, as a signed number."""
    low, high = words(key)
    return torch.tensor(low | high << 32, dtype=torch.uint64).view(torch.int64)


@pytest.mark.parametrize("name", ANSWERS)
def test_philox_gives_the_published_answers(name):
    rounds, key, counter, expected = ANSWERS[name]
    found = philox(seed_of(key), tuple(torch.tensor(word) for word in words(counter)), rounds)
    assert [int(word) for word in found] == words(expected)


def test_philox_mixes_seven_times_unless_told_otherwise():
    zeros = (torch.zeros(1, dtype=torch.int64),) * 4
    assert torch.equal(philox(SEED, zeros)[0], philox(SEED, zeros, 7)[0])


def test_philox_broadcasts_its_counters():
    rows, columns = torch.arange(3)[:, None], torch.arange(4)
    zero = torch.tensor(0)
    together = philox(SEED, (columns, rows, zero, zero))
    for row in range(3):
        for column in range(4):
            alone = philox(SEED, (torch.tensor(column), torch.tensor(row), zero, zero))
            for word, expected in zip(together, alone, strict=True):
                assert word[row, column] == expected


def test_four_neighbouring_keys_share_a_counter_and_the_upper_bits_decide():
    found = keep_mask(SEED, 0.4, sentences=2, heads=2, queries=3, keys=6, first_sentence=5)
    for sentence in range(2):
        for head in range(2):
            for query in range(3):
                for key in range(6):
                    counter = (key // 4, query, head, 5 + sentence)
                    bits = philox(SEED, tuple(torch.tensor(number) for number in counter))
                    kept = int(bits[key % 4]) / 2**32 >= 0.4
                    assert bool(found[sentence, head, query, key]) is kept


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_the_share_of_what_is_kept(probability):
    kept = keep_mask(SEED, probability, sentences=4, heads=4, queries=64, keys=63)
    deviation = (probability * (1 - probability) / kept.numel()) ** 0.5
    assert abs(kept.double().mean() - (1 - probability)) < 4 * deviation


def test_the_mask_of_a_larger_problem_holds_that_of_a_smaller_one():
    small = keep_mask(SEED, 0.5, sentences=2, heads=3, queries=5, keys=7)
    large = keep_mask(SEED, 0.5, sentences=4, heads=5, queries=9, keys=22)
    assert torch.equal(large[:2, :3, :5, :7], small)


def test_a_later_first_sentence_skips_the_earlier_ones():
    whole = keep_mask(SEED, 0.5, sentences=5, heads=2, queries=3, keys=7)
    rest = keep_mask(SEED, 0.5, sentences=3, heads=2, queries=3, keys=7, first_sentence=2)
    assert torch.equal(whole[2:], rest)


@pytest.mark.parametrize("axis", range(4), ids=["sentences", "heads", "queries", "keys"])
def test_places_along_every_axis_are_independent(axis):
    # Two fair coins agree half of the time.
    kept = keep_mask(SEED, 0.5, sentences=8, heads=8, queries=32, keys=32).transpose(0, axis)
    agreement = (kept[1:] == kept[:-1]).double()
    assert abs(agreement.mean() - 0.5) < 4 * 0.5 / agreement.numel() ** 0.5


@pytest.mark.parametrize("step", [1, 1 << 32], ids=["lower half", "upper half"])
def test_either_half_of_the_seed_gives_another_mask(step):
    size = {"sentences": 2, "heads": 2, "queries": 16, "keys": 16}
    one, other = (keep_mask(seed, 0.5, **size) for seed in (SEED, SEED + step))
    agreement = (one == other).double()
    assert abs(agreement.mean() - 0.5) < 4 * 0.5 / agreement.numel() ** 0.5


def test_a_seed_may_be_negative_and_may_have_no_axis():
    size = {"sentences": 1, "heads": 2, "queries": 3, "keys": 5}
    flat, scalar = (keep_mask(torch.tensor(s), 0.5, **size) for s in ([-7], -7))
    assert flat.shape == scalar.shape == (1, 2, 3, 5)
    assert torch.equal(flat, scalar)
    assert flat.any()
    assert not flat.all()


@pytest.mark.parametrize(
    ("probability", "expected"),
    [
        (0.0, 0),
        (2.0**-25, 0),
        (2.0**-24, 1),
        (0.5, 1 << 23),
        (1 - 2.0**-24, (1 << 24) - 1),
        (1 - 2.0**-30, (1 << 24) - 1),
    ],
)
def test_a_probability_has_24_bits(probability, expected):
    assert dropped_below(probability) == expected


def test_a_weight_is_dropped_from_the_probability_above_its_own_bits():
    zeros = (torch.tensor(0),) * 4
    bits = int(philox(SEED, zeros)[0]) >> 8
    size = {"sentences": 1, "heads": 1, "queries": 1, "keys": 1}
    assert keep_mask(SEED, bits / 2**24, **size).all()
    assert not keep_mask(SEED, (bits + 1) / 2**24, **size).any()


def test_nothing_is_dropped_with_probability_zero_and_nearly_all_just_below_one():
    size = {"sentences": 2, "heads": 4, "queries": 32, "keys": 32}
    assert keep_mask(SEED, 0.0, **size).all()
    assert not keep_mask(SEED, 1 - 2.0**-24, **size).any()


@pytest.mark.parametrize("axis", ["sentences", "heads", "queries", "keys"])
def test_a_mask_may_be_empty(axis):
    size = {"sentences": 2, "heads": 3, "queries": 4, "keys": 5} | {axis: 0}
    assert keep_mask(SEED, 0.5, **size).shape == tuple(size.values())
