import pytest
import torch

from vgen.layers.rope import grid_coordinates, rope_table, rotate


def test_table_follows_the_formula_of_llamagen_on_two_axes():
    grid, head_dim = (3, 5), 16
    table = rope_table(grid, head_dim)
    for position in range(15):
        row, col = divmod(position, 5)
        angles = [row * 10000 ** (-2 * k / 8) for k in range(4)] + [col * 10000 ** (-2 * k / 8) for k in range(4)]
        expected = torch.tensor([[torch.tensor(a).cos(), torch.tensor(a).sin()] for a in angles])
        torch.testing.assert_close(table[position], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("placeless", "cosine"), [("zero", 0.0), ("identity", 1.0)])
def test_last_row_is_for_slots_without_a_place(placeless, cosine):
    last = rope_table((2, 2), 8, placeless=placeless)[-1]
    assert (last[:, 0] == cosine).all()
    assert (last[:, 1] == 0).all()


@pytest.mark.parametrize("grid", [(7,), (3, 4), (2, 3, 4)])
def test_scores_depend_only_on_the_offset_between_positions(grid):
    torch.manual_seed(0)
    head_dim = 20
    table = rope_table(grid, head_dim)[:-1]
    query, key = torch.randn(2, 1, 1, 1, head_dim)
    rotated_q = rotate(query.expand(1, 1, len(table), head_dim), table)[0, 0]
    rotated_k = rotate(key.expand(1, 1, len(table), head_dim), table)[0, 0]
    scores = rotated_q @ rotated_k.T
    places = grid_coordinates(grid)
    seen: dict[tuple[int, ...], float] = {}
    for i in range(len(table)):
        for j in range(len(table)):
            offset = tuple((places[i] - places[j]).tolist())
            assert abs(seen.setdefault(offset, scores[i, j].item()) - scores[i, j].item()) < 1e-4
    assert len({round(score, 5) for score in seen.values()}) > len(seen) // 2


def test_rotation_is_float32_and_keeps_the_dtype():
    x = torch.randn(1, 2, 4, 8, dtype=torch.bfloat16)
    out = rotate(x, rope_table((2, 2), 8)[:4])
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), rotate(x.float(), rope_table((2, 2), 8)[:4]), atol=0.02, rtol=0.02)


def test_the_form_for_compilers_computes_the_same():
    x, table = torch.randn(2, 3, 9, 8), rope_table((3, 3), 8)[:9]
    compiled = torch.compile(rotate, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, table), rotate(x, table), atol=1e-6, rtol=1e-6)
    table = table.expand(2, -1, -1, -1)
    torch.testing.assert_close(compiled(x, table), rotate(x, table), atol=1e-6, rtol=1e-6)
