"""Sentences join and leave a cache while it is decoded, and none of them notices."""

from functools import cache
from pathlib import Path

import pytest
import torch

from moe_mt.checkpoints import load
from moe_mt.models import KVCache

GOLDENS = Path(__file__).parents[1] / "golden" / "models"
MODELS = ["dense_2_2", "moe_4_experts_bias"]
EOS = 2


@cache
def load_model(name):
    return load(GOLDENS / name, device="cpu", dtype=torch.float64)


def new_cache(model, sources, beams, capacity=32):
    width = max(map(len, sources))
    tokens = torch.tensor([row + [1] * (width - len(row)) for row in sources])
    mask = tokens != 1
    memory, _ = model.encode(tokens, mask)
    return model.new_cache(memory, mask, beams, capacity)


SOURCES = [[5, 9, 11, EOS], [8, EOS], [20, 21, 22, 23, 24, 25, EOS], [30, 7, EOS]]
TOKENS = torch.randint(4, 64, (20, 8, 1), generator=torch.Generator().manual_seed(0))
"""What each row reads, (steps, rows, 1): row ``2 * sentence + beam``."""

CROSSED = torch.tensor([1, 0])


def alone(model, sentence, steps):
    """Logits of a sentence's two beams, which cross at every second step."""
    cache = new_cache(model, [SOURCES[sentence]], 2)
    found = []
    for step in range(steps):
        found.append(model.decode_step(TOKENS[step, 2 * sentence : 2 * sentence + 2], cache))
        if step % 2:
            cache.reorder(CROSSED)
    return found


@pytest.mark.parametrize("capacity", [1, 32], ids=["growing", "wide enough"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_sentences_that_join_and_leave_decode_as_if_alone(name, capacity):
    model = load_model(name)
    expected = [alone(model, sentence, 12) for sentence in range(4)]
    running = new_cache(model, SOURCES[:2], 2, capacity)
    present = {0: 0, 1: 0}  # sentence → how far it has come
    for step in range(10):
        if step == 3:  # longer and shorter memories join at the start of their translation
            running.regroup(joining=new_cache(model, SOURCES[2:], 2, capacity))
            present |= {2: 0, 3: 0}
        if step == 6:  # one leaves and the others change places
            order = [3, 0, 2]
            running.regroup(torch.tensor([list(present).index(number) for number in order]))
            present = {number: present[number] for number in order}
        rows = [
            TOKENS[came, 2 * number + beam] for number, came in present.items() for beam in (0, 1)
        ]
        logits = model.decode_step(torch.stack(rows), running).unflatten(0, (-1, 2))
        for place, (number, came) in enumerate(present.items()):
            torch.testing.assert_close(logits[place], expected[number][came], rtol=0, atol=1e-12)
        parents = torch.cat(
            [2 * place + (CROSSED if came % 2 else CROSSED.flip(0))
             for place, came in enumerate(present.values())]
        )  # fmt: skip
        running.reorder(parents)
        present = {number: came + 1 for number, came in present.items()}
    assert running.memory_length == 7


@torch.no_grad()
def test_what_nobody_needs_any_more_is_given_back():
    model = load_model("dense_2_2")
    cache = new_cache(model, SOURCES, 1)
    for step in range(8):
        model.decode_step(TOKENS[step, :4], cache)
    cache.regroup(torch.tensor([1]), length=8, capacity=16, memory_length=2)
    layer = cache.layers[0]
    assert (cache.sentences, cache.capacity, cache.memory_length) == (1, 16, 2)
    assert layer.key.untyped_storage().nbytes() == layer.key.numel() * 8
    logits = model.decode_step(TOKENS[8, :1], cache)
    again = new_cache(model, [SOURCES[1]], 1)
    for step in range(8):
        model.decode_step(TOKENS[step, 1:2], again)
    torch.testing.assert_close(logits, model.decode_step(TOKENS[8, :1], again), rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_larger_cache_takes_the_content_of_a_smaller_one_and_the_rest_idles():
    model = load_model("moe_4_experts_bias")
    cache = new_cache(model, SOURCES[:3], 2)
    for step in range(2):
        model.decode_step(TOKENS[step, :6], cache)
        cache.reorder(torch.tensor([1, 0, 2, 3, 5, 5]))
    larger = cache.empty_of(5)
    addresses = [layer.key.data_ptr() for layer in larger.layers]
    larger.take(cache)
    assert larger.idle.tolist() == [False] * 3 + [True] * 2
    tokens = torch.cat([TOKENS[2, :6], torch.zeros(4, 1, dtype=torch.int64)])
    found = model.decode_step(tokens, larger)[:6]
    torch.testing.assert_close(found, model.decode_step(TOKENS[2, :6], cache), rtol=0, atol=1e-12)
    assert [layer.key.data_ptr() for layer in larger.layers] == addresses
    assert larger.positions.tolist() == [3, 3, 3, 1, 1]


def test_reordering_moves_a_table_and_no_key_or_value():
    cross = [(torch.randn(2, 4, 3, 8), torch.randn(2, 4, 3, 8))]
    cache = KVCache(cross, None, beams=3, capacity=4)
    layer = cache.layers[0]
    layer.key.normal_()
    before = layer.key.clone()
    cache.open(1)
    cache.advance(1)
    cache.reorder(torch.tensor([2, 2, 0, 3, 5, 4]))
    assert torch.equal(layer.key, before)
    assert cache.ancestry[:, :, 0].tolist() == [[2, 2, 0], [0, 2, 1]]
    # A row is what the table says: beams 0 and 1 of the first sentence continue beam 2.
    key, _ = cache.rows(layer)
    assert torch.equal(key[0], before[0, :, 2, :1])
    assert torch.equal(key[1], key[0])


@torch.no_grad()
def test_when_the_one_that_came_farthest_leaves_there_is_room_again():
    model = load_model("dense_2_2")
    cache = new_cache(model, SOURCES[:1], 1, capacity=8)
    for step in range(8):
        model.decode_step(TOKENS[step, :1], cache)
    cache.regroup(joining=new_cache(model, SOURCES[1:2], 1, capacity=8))
    cache.regroup(torch.tensor([1]), length=0, capacity=8)
    keys = cache.layers[0].key
    for step in range(8):
        model.decode_step(TOKENS[step, 1:2], cache)
    assert cache.layers[0].key is keys
