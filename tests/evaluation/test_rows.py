import pytest
import torch

from vgen.evaluation.rows import Rows


@pytest.mark.parametrize("capacity", [0, 4, 10, 30])
def test_rows_are_the_concatenation(capacity):
    batches = list(torch.arange(20, dtype=torch.int16).view(10, 2).split(3))
    rows = Rows(capacity)
    assert rows.tensor() is None
    for batch in batches:
        rows.add(batch)
    assert torch.equal(rows.tensor(), torch.cat(batches))
    assert rows.tensor().dtype == torch.int16


def test_an_empty_batch_keeps_its_shape():
    rows = Rows(5)
    rows.add(torch.zeros(0, 3))
    assert rows.tensor().shape == (0, 3)
