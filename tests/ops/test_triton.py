"""The Triton kernels, under Triton's interpreter where there is no CUDA device."""
import os
import subprocess
import sys
import textwrap

import pytest
import reference
import torch
from hypothesis import given, settings
from test_dynamic_conv import call_with_everything, calls

from mmdet_odconv import ops
from mmdet_odconv.ops import dynamic_conv2d, force_plan, fused, kernels

pytest.importorskip('triton', reason='Triton is not installed')

from mmdet_odconv.ops import triton_kernels  # noqa: E402

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


def on_device(tensor, dtype=torch.float64):
    return None if tensor is None else tensor.detach().to(DEVICE, dtype).requires_grad_()


@settings(max_examples=40, deadline=None)
@given(calls())
def test_equals_the_formula_and_every_gradient(call):
    x, weight, bias, geometry, attentions = call
    x, weight, bias = (on_device(t) for t in (x, weight, bias))
    attentions = {name: on_device(t) for name, t in attentions.items()}
    with force_plan('fused'):
        ours = dynamic_conv2d(x, weight, bias, *geometry, **attentions)
    reference.assert_same_with_gradients(
        ours, reference.dynamic_conv2d(x, weight, bias, *geometry, **attentions),
        dict(input=x, weight=weight, bias=bias, **attentions))


def operands(n, batch, groups, rows, channels, kernel, absent='', dtype=torch.float64):
    """Bank, and attentions a, s, c and f but those absent; channels and rows are of a group."""
    def rand(*shape):
        return torch.randn(*shape, dtype=dtype, device=DEVICE)

    attentions = dict(a=rand(batch, n), s=rand(batch, *kernel), c=rand(batch, groups * channels),
                      f=rand(batch, groups * rows))
    weight = rand(n, groups * rows, channels, *kernel)
    return weight, [None if name in absent else value for name, value in attentions.items()]


def eager(weight, attentions, groups, batch):
    a, s, c, f = attentions
    bank, gate, rows = kernels.as_matrices(weight, s, c, f, groups)

    def backward(grad):
        gradients = kernels.KernelGradients(bank, a, gate, rows, batch, True)
        matrices = grad.clone().view(batch, *bank.shape[1:])
        gradients.add(slice(None), slice(0, batch), matrices, kernels.mix(bank, a, batch))
        return gradients.of(weight, s, c, f)

    folded = kernels.fold(kernels.mix(bank, a, batch), gate, rows)
    return folded.reshape(batch, *weight.shape[1:]), backward


# More than one tile down and across and odd ends; groups; depthwise; a multiplier of channels.
SHAPES = dict(dense=(3, 2, 1, 37, 23, (3, 3)), pointwise=(4, 3, 1, 34, 70, (1, 1)),
              one=(1, 2, 1, 70, 5, (3, 2)), grouped=(2, 2, 3, 5, 4, (3, 3)),
              depthwise=(4, 2, 75, 1, 1, (3, 3)), multiplied=(2, 3, 5, 3, 1, (3, 3)))


@pytest.mark.parametrize('absent', ['', 's', 'c', 'f', 'sc', 'scf'])
@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('programs', [1, 512])
def test_equals_plain_operations(monkeypatch, shape, absent, programs):
    monkeypatch.setattr(triton_kernels, 'PROGRAMS', programs)  # images shared out, or not
    n, batch, groups = SHAPES[shape][:3]
    weight, attentions = operands(*SHAPES[shape], absent + 'a' * (n == 1))
    expected, expected_backward = eager(weight, attentions, groups, batch)
    kernels = triton_kernels.fold_kernels(weight, *attentions, groups, batch, weight.dtype)
    torch.testing.assert_close(kernels, expected, rtol=1e-9, atol=1e-11)
    grad = torch.randn_like(kernels)
    grads = triton_kernels.fold_kernels_backward(grad, weight, *attentions, groups)
    for name, ours, theirs in zip('wascf', grads, expected_backward(grad)):
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_shares_of_the_images_add_up_and_the_bank_may_stay_frozen():
    batch, groups = 11, 1  # 2 n = 4 images for a program, and 3 for the last
    weight, attentions = operands(2, batch, groups, 3, 2, (3, 3))
    _, expected_backward = eager(weight, attentions, groups, batch)
    grad = torch.randn(batch, *weight.shape[1:], dtype=weight.dtype, device=DEVICE)
    expected = expected_backward(grad)
    for needs_bank in (True, False):
        grads = triton_kernels.fold_kernels_backward(grad, weight, *attentions, groups, needs_bank)
        assert needs_bank or grads[0] is None
        for ours, theirs in zip(grads[not needs_bank:], expected[not needs_bank:]):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_rounds_once(dtype):
    batch, groups = 3, 2
    weight, attentions = operands(4, batch, groups, 6, 5, (3, 3), dtype=torch.float32)
    attentions = [t.to(dtype) for t in attentions]
    expected, expected_backward = eager(
        weight, [t.float() for t in attentions], groups, batch)
    kernels = triton_kernels.fold_kernels(weight, *attentions, groups, batch, dtype)
    assert kernels.dtype == dtype
    # The product of c and s is rounded too, to the dtype that they come in.
    tolerance = dict(rtol=1.5 * torch.finfo(dtype).eps, atol=1e-5)
    torch.testing.assert_close(kernels.float(), expected, **tolerance)
    grad = torch.randn_like(kernels)
    grads = triton_kernels.fold_kernels_backward(grad, weight, *attentions, groups)
    for ours, theirs, like in zip(grads, expected_backward(grad.float()), [weight, *attentions]):
        assert ours.dtype == like.dtype
        scale = theirs.abs().max()
        torch.testing.assert_close(ours.float() / scale, theirs / scale,
                                   rtol=0, atol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize('batch', [0, 2])
def test_autocast_reads_the_float32_bank(batch):
    call = {name: on_device(value, torch.float32)
            for name, value in call_with_everything(batch=batch).items()}
    saved = []
    with torch.autocast(DEVICE, torch.bfloat16), force_plan('fused'), \
            torch.autograd.graph.saved_tensors_hooks(
                lambda tensor: saved.append(tensor.data_ptr()) or tensor, lambda tensor: tensor):
        output = dynamic_conv2d(**call)
    assert output.dtype == torch.bfloat16
    assert batch == 0 or call['weight'].data_ptr() in saved
    output.float().square().sum().backward()
    half = {name: value.grad for name, value in call.items()}
    expected = reference.dynamic_conv2d(call['input'], call['weight'], **{
        name: value for name, value in call.items() if name.endswith('attention')
    }).square().sum() if batch else sum(0 * value.sum() for value in call.values())
    grads = torch.autograd.grad(expected, list(call.values()))
    for (name, ours), theirs in zip(half.items(), grads):
        assert ours.dtype == torch.float32, name
        scale = theirs.abs().max() if batch else 1
        torch.testing.assert_close(ours / scale, theirs / scale, rtol=0, atol=0.03)


def test_second_derivatives():
    call = call_with_everything(batch=2, cin=1, cout=2, size=2, kernel=2)
    with force_plan('fused'):
        assert torch.autograd.gradgradcheck(
            lambda *values: dynamic_conv2d(**dict(zip(call, values)), padding=1),
            tuple(on_device(value) for value in call.values()))


@pytest.mark.skipif(DEVICE == 'cuda', reason='the checks are simulated on the CPU')
def test_plain_operations_where_triton_is_absent_old_or_broken(monkeypatch, recwarn):
    find, device = fused._works_on.__wrapped__, torch.device('cpu')
    capability = [9, 0]
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: tuple(capability))
    assert find(device)
    capability[0] = 7
    assert not find(device)
    capability[0] = 9
    with monkeypatch.context() as patch:
        patch.delattr(ops, 'triton_kernels')
        patch.setitem(sys.modules, triton_kernels.__name__, None)
        assert not find(device)
    assert not recwarn.list

    def no_compiler(*args):
        raise RuntimeError('Failed to find C compiler')

    monkeypatch.setattr(triton_kernels, 'fold_kernels', no_compiler)
    with pytest.warns(UserWarning, match=r'Triton fails on cpu.*Failed to find C compiler'):
        assert not find(device)


COMPILE = """
    import torch, triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from mmdet_odconv.ops import triton_kernels

    constants = dict(N=4, ROWS=32, COLUMNS=32, SUM=tl.float32)
    dtypes = dict(weight='*fp32', a='*fp16', rows='*fp16', columns='*fp16', kernels='*fp16',
                  grad='*fp16', grad_bank='*fp32', grad_a='*fp32', grad_rows='*fp32',
                  grad_columns='*fp32')
    for kernel in (triton_kernels._fold, triton_kernels._fold_backward):
        signature = {name: 'constexpr' if name in constants else dtypes.get(name, 'i32')
                     for name in kernel.arg_names}
        source = triton.compiler.ASTSource(kernel, signature, constants)
        triton.compile(source, target=GPUTarget('cuda', 90, 32), options=dict(num_warps=8))
"""


def test_kernels_compile_for_a_gpu(tmp_path):
    # The interpreter runs Python that the compiler refuses. Compiling needs no GPU.
    environment = {**os.environ, 'TRITON_INTERPRET': '0', 'TRITON_CACHE_DIR': str(tmp_path),
                   'MMDET_ODCONV_LAYERS_ONLY': '1'}
    result = subprocess.run([sys.executable, '-c', textwrap.dedent(COMPILE)], env=environment,
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
