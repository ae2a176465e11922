import pytest
import torch

from moe_mt.models.embedding import SinusoidalPositions, sinusoid_table

# fairseq's layout at width 8: sines of all frequencies, then cosines; the padding row is zero.
PUBLISHED_ROWS = {
    0: [0, 0, 0, 0, 1, 1, 1, 1],
    1: [0, 0, 0, 0, 0, 0, 0, 0],
    2: [0.9093, 0.0927, 0.0043, 0.0002, -0.4161, 0.9957, 1.0000, 1.0000],
    3: [0.1411, 0.1388, 0.0065, 0.0003, -0.9900, 0.9903, 1.0000, 1.0000],
}


@pytest.mark.parametrize("row", PUBLISHED_ROWS)
def test_published_rows(row):
    table = sinusoid_table(5, 8, 1, torch.device("cpu"))
    expected = torch.tensor(PUBLISHED_ROWS[row], dtype=torch.float32)
    torch.testing.assert_close(table[row], expected, rtol=0, atol=5e-5)


def test_an_odd_width_gets_one_zero_column():
    table = sinusoid_table(5, 9, 1, torch.device("cpu"))
    assert torch.equal(table[:, :8], sinusoid_table(5, 8, 1, torch.device("cpu")))
    assert (table[:, 8] == 0).all()


def test_positions_count_the_tokens_that_are_not_padding():
    positions = SinusoidalPositions(10, 8, 1)
    found = positions(torch.tensor([[5, 6, 7, 1, 1], [1, 5, 1, 6, 7]]))
    expected = torch.tensor([[2, 3, 4, 1, 1], [1, 2, 1, 3, 4]])
    assert torch.equal(found, positions.table[expected])


def test_positions_go_on_behind_what_was_read_before():
    positions = SinusoidalPositions(10, 8, 1)
    assert torch.equal(
        positions(torch.tensor([[5, 6]]), 3), positions.table[torch.tensor([[5, 6]])]
    )


def test_table_grows_and_keeps_its_rows_and_dtype():
    positions = SinusoidalPositions(4, 8, 1).to(torch.float64)
    before = positions.table.clone()
    positions(torch.full((1, 20), 5))
    assert positions.table.shape[0] >= 22
    assert positions.table.dtype == torch.float64
    assert torch.equal(positions.table[: len(before)], before)
