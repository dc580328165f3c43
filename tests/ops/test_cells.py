import pytest
import torch

from mmdet_odconv.ops import mix_cells, mixture_count, split_into_cells

KERNELS = [((4, 6, 1, 1), (2, 3)), ((4, 6, 3, 2), (2, 3)), ((8, 1, 3, 3), (4, 1)),
           ((6, 4, 3, 3), (6, 4))]


def test_order_of_cells_is_space_then_output_then_input():
    kernel = torch.arange(2 * 4 * 1 * 2).view(2, 4, 1, 2)
    cells = split_into_cells(kernel, torch.Size((1, 2, 1, 1)))
    assert cells.shape == (8, 1, 2, 1, 1)
    assert cells.flatten(1).tolist() == [[0, 2], [4, 6], [8, 10], [12, 14],
                                         [1, 3], [5, 7], [9, 11], [13, 15]]


@pytest.mark.parametrize(('shape', 'cell'), KERNELS)
def test_mixing_each_cell_from_itself_gives_the_kernel_back(shape, cell):
    kernel = torch.randn(shape)
    cells = split_into_cells(kernel, torch.Size((*cell, 1, 1)))
    assert len(cells) == mixture_count(shape, (*cell, 1, 1))
    alone = torch.eye(len(cells)).expand(2, -1, -1)
    assert torch.equal(mix_cells(alone, cells, shape), kernel.expand(2, *shape))


@pytest.mark.parametrize(('shape', 'cell'), KERNELS)
def test_gradients(shape, cell):
    m = mixture_count(shape, (*cell, 1, 1))
    attention = torch.randn(2, m, 5, dtype=torch.float64, requires_grad=True)
    cells = torch.randn(5, *cell, 1, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, e: mix_cells(a, e, shape), (attention, cells))


def test_the_warehouse_is_read_once_for_all_images():
    attention, cells = torch.randn(5, 8, 7), torch.randn(7, 2, 3, 1, 1)
    with torch.profiler.profile() as profile:
        mix_cells(attention, cells, (4, 6, 2, 1))
    products = [event for event in profile.events() if event.name in ('aten::mm', 'aten::bmm')]
    assert [event.name for event in products] == ['aten::mm']
