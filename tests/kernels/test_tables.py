"""The tables that tell the Triton kernels where tensors lie."""

import torch

from distclip.kernels.device import tables
from tests.kernels.test_triton import DEVICE, drawn


def test_tables_are_remembered_while_nothing_moves() -> None:
    tensors = [drawn(5, dtype=torch.float32), drawn(4, dtype=torch.float32)]
    assert tables.flat(tensors) is tables.flat(list(tensors))
    assert tables.flat(tensors) is not tables.flat(tensors[::-1])
    assert tables.flat([tensors[0][:4]]) is not tables.flat([tensors[0]])
    assert tables.flat([tensors[0].view(torch.int32)]) is not tables.flat([tensors[0]])
    square = drawn(4, 4, dtype=torch.float32)
    assert tables.row_table([square]) is tables.row_table([square])
    assert tables.row_table([square]) is not tables.row_table([square.view(2, 8)])


def test_matrices_of_a_kind_share_a_launch() -> None:
    """Of one dtype, one width of tiles, and aligned alike; each keeps its place among the rows."""
    long = torch.zeros(1032, device=DEVICE)
    given = [
        torch.zeros(3, 200, device=DEVICE),
        torch.zeros(5, 16, dtype=torch.bfloat16, device=DEVICE),
        long[1 : 1 + 8 * 16].view(8, 16),
        torch.zeros(2, 16, device=DEVICE),
        torch.zeros(4, 129, device=DEVICE),
    ]
    table = tables.row_table(given)
    single = torch.float32
    assert [tuple(launch) for launch in table.launches] == [
        (torch.bfloat16, 0, 1, 16, 8), (single, 1, 1, 16, 1), (single, 2, 1, 16, 4),
        (single, 3, 2, 1024, 1), (single, 5, 2, 1024, 4),
    ]  # fmt: skip
    assert table.outputs.tolist() == [3, 8, 16, 18, 0]
    assert (table.heights.tolist(), table.rows) == ([5, 8, 2, 4, 3], 22)


def test_tables_forget() -> None:
    for length in range(1, 2 * tables.REMEMBERED):
        tables.flat([torch.empty(length, device=DEVICE)])
    assert len(tables._known) <= tables.REMEMBERED
