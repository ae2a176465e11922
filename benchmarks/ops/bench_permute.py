"""``permute``: rows into expert order, beside PyTorch's indexing."""

from moe_mt.ops.permute import permute, permute_eager


def test_permute(measure, shape) -> None:
    measure(
        lambda one: permute(one.x, one.order, one.rows),
        lambda one: permute_eager(one.x, one.order, one.rows),
        reads=lambda one: [one.x, one.order],
        peers={"index": lambda one: one.x[one.order // shape.top_k]},
        operation="permute",
    )
