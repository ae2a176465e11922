import torch

from moe_mt.generation.sampling import draw, draw_several, uniform_table


def even_uniforms(count):
    """Uniform numbers without chance: the middles of ``count`` equal parts of [0, 1)."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def test_draws_follow_the_softmax():
    probabilities = torch.tensor([0.1, 0.0, 0.4, 0.5])
    chosen = draw(probabilities.log().expand(1000, 4), even_uniforms(1000))
    assert torch.bincount(chosen, minlength=4).tolist() == [100, 0, 400, 500]


def test_banned_tokens_are_never_drawn_even_at_the_edges():
    scores = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]).expand(3, 5)
    uniforms = torch.tensor([0.0, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    assert draw(scores, uniforms).tolist() == [1, 3, 3]


def test_several_draws_do_not_repeat():
    scores = torch.randn(200, 6)
    values, indices = draw_several(scores, torch.rand(200, 6, dtype=torch.float64))
    assert torch.equal(indices.sort(1).values, torch.arange(6).expand(200, 6))
    assert torch.equal(values, scores.gather(1, indices))


def test_second_draw_is_from_what_is_left():
    # Once the first token is gone, the other two have 1/4 and 3/4.
    scores = torch.tensor([0.6, 0.1, 0.3]).log().expand(400, 3)
    uniforms = torch.stack([torch.zeros(400, dtype=torch.float64), even_uniforms(400)], dim=1)
    _, indices = draw_several(scores, uniforms)
    assert (indices[:, 0] == 0).all()
    assert torch.bincount(indices[:, 1], minlength=3).tolist() == [0, 100, 300]


def test_when_nothing_is_left_further_draws_lose():
    scores = torch.tensor([[0.0, -torch.inf, -torch.inf]])
    values, indices = draw_several(scores, torch.full((1, 3), 0.5, dtype=torch.float64))
    assert indices[0, 0] == 0
    assert values[0].tolist() == [0.0, -torch.inf, -torch.inf]


def test_seeded_numbers_belong_to_the_sentence():
    together = uniform_table([(4, 5), (6,), (4, 5)], 10, 2, seed=3, generator=None)
    alone = uniform_table([(6,)], 10, 2, seed=3, generator=None)
    assert torch.equal(together[1:2], alone)
    assert torch.equal(together[0], together[2])
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(alone, uniform_table([(6,)], 10, 2, seed=4, generator=None))


def test_seeded_numbers_do_not_depend_on_how_many_steps_there_are():
    short = uniform_table([(4, 5)], 7, 3, seed=3, generator=None)
    assert torch.equal(short, uniform_table([(4, 5)], 50, 3, seed=3, generator=None)[:, :7])


def test_generator_wins_over_the_seed_and_the_global_one_is_the_default():
    generator = torch.Generator().manual_seed(1)
    found = uniform_table([(4,)], 3, 1, seed=3, generator=generator)
    torch.manual_seed(1)
    assert torch.equal(found, uniform_table([(4,)], 3, 1, seed=None, generator=None))
