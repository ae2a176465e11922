"""``combine``: rows back to token order, weighted and added to the residual."""

from benchmarks.ops.conftest import Problem
from moe_mt.ops.combine import combine, combine_eager


def test_combine(measure, shape, tokens) -> None:
    measure(
        lambda one: combine(one.expert_rows, one.rows, one.gates, one.x),
        lambda one: combine_eager(one.expert_rows, one.rows, one.gates, one.x),
        reads=lambda one: [one.expert_rows, one.rows, one.gates, one.x],
        flops=2 * shape.top_k * tokens * shape.d_model,
        peers={"index and product": index_product},
        operation="combine",
    )


def index_product(one: Problem) -> object:
    gates = one.gates[:, None].to(one.x.dtype)
    return one.x + (gates @ one.expert_rows[one.rows])[:, 0]
