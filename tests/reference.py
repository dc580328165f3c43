"""Dynamic convolution written from its formula, one image, one kernel, at a time."""
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import nn


def dynamic_conv2d(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, *,
                   kernel_attention=None, spatial_attention=None, channel_attention=None,
                   filter_attention=None):
    n, out_channels, group_channels, kh, kw = weight.shape
    outputs = []
    for b in range(len(x)):
        kernel = torch.zeros_like(weight[0])
        for i in range(n):
            a = 1 if kernel_attention is None else kernel_attention[b, i]
            kernel = kernel + a * weight[i]
        rows = []
        for o in range(out_channels):
            row = kernel[o]
            if spatial_attention is not None:
                row = row * spatial_attention[b]
            if channel_attention is not None:
                first = o // (out_channels // groups) * group_channels
                row = row * channel_attention[b, first:first + group_channels, None, None]
            if filter_attention is not None:
                row = row * filter_attention[b, o]
            rows.append(row)
        outputs.append(
            F.conv2d(x[b:b + 1], torch.stack(rows), bias, stride, padding, dilation, groups))
    return torch.cat(outputs)


def forward(layer, x):
    """What a layer of the family computes, from its paper's equations and its parameters."""
    padding, padded = layer.padding, x
    if layer.padding_mode != 'zeros':
        # nn.Conv2d pads, so that padding_mode is tested against torch's own.
        identity = nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size,
                             layer.stride, padding, layer.dilation, layer.groups,
                             padding_mode=layer.padding_mode)
        padded = F.pad(x, identity._reversed_padding_repeated_twice, mode=layer.padding_mode)
        padding = 0
    geometry = layer.stride, padding, layer.dilation, layer.groups
    kind = type(layer).__name__
    if kind == 'FDConv2d':
        if layer.FBM is not None:
            padded = fd_bands(layer, x)
            if layer.padding_mode != 'zeros':
                padded = F.pad(padded, identity._reversed_padding_repeated_twice,
                               mode=layer.padding_mode)
        return torch.cat([
            F.conv2d(padded[b:b + 1], kernel, layer.bias, *geometry)
            for b, kernel in enumerate(fd_kernels(layer, x))])
    if kind in ('DCDConv2d', 'KWConv2d'):
        kernels = dcd_kernels if kind == 'DCDConv2d' else warehouse_kernels
        return torch.cat([
            F.conv2d(padded[b:b + 1], kernel, layer.bias, *geometry)
            for b, kernel in enumerate(kernels(layer, x))])
    if kind == 'ODConv2d':
        return dynamic_conv2d(padded, layer.weight, layer.bias, *geometry,
                              **odconv_attentions(layer, x))
    a = kernel_attention(layer, x)
    output = dynamic_conv2d(padded, layer.weight, None, *geometry, kernel_attention=a)
    if layer.bias is not None:
        biases = [sum(a[b, i] * layer.bias[i] for i in range(a.shape[1])) for b in range(len(x))]
        output = output + torch.stack(biases)[:, :, None, None]
    return output


def linear(fc, v):
    out = v @ fc.weight.flatten(1).T
    return out if fc.bias is None else out + fc.bias


def kernel_attention(layer, x):
    """DyConv, Fig. 3: GAP, FC, ReLU, FC, softmax(/ t). CondConv, eq. 2: GAP, FC, sigmoid."""
    attention, pooled = layer.attention, x.mean((2, 3))
    if type(layer).__name__ == 'CondConv2d':
        return torch.sigmoid(linear(attention.kernel_fc, pooled) / layer.temperature)
    logits = linear(attention.kernel_fc, torch.relu(linear(attention.fc, pooled)))
    exp = torch.exp(logits / layer.temperature)
    return exp / exp.sum(1, keepdim=True)


def dcd_kernels(layer, x):
    """DCD, eq. 6: Lambda W0 + P Phi Q^T for each image, element by element of the kernel."""
    attention, w0, p, q = layer.attention, layer.weight[0], layer.p, layer.q
    hidden = torch.relu(linear(attention.fc, x.mean((2, 3))))
    scale = torch.clamp(linear(attention.filter_fc, hidden) / layer.temperature + 3, 0, 6) / 3
    phi = linear(attention.fusion_fc, hidden).reshape(len(x), p.shape[1], p.shape[1])
    out_channels, group_channels, kh, kw = w0.shape
    for b in range(len(x)):
        fused = torch.zeros_like(w0)
        if layer.groups == layer.in_channels:  # the kernel's elements are fused
            fused = fused + (p @ phi[b] @ q.T).reshape(w0.shape)
        else:  # each group's channels are fused, at the kernel's centre
            centre = torch.zeros(kh, kw, dtype=w0.dtype)
            centre[kh // 2, kw // 2] = 1
            rows = [p[o] @ phi[b] @ q[first:first + group_channels].T
                    for o in range(out_channels)
                    for first in [o // (out_channels // layer.groups) * group_channels]]
            fused = fused + torch.stack(rows)[:, :, None, None] * centre
        yield scale[b][:, None, None, None] * w0 + fused


def warehouse_kernels(layer, x):
    """KernelWarehouse: every cell of every image's kernel a mixture of all cells of a warehouse."""
    attention, cells, tau = layer.attention, layer.warehouse.cells, layer.warehouse.manager.tau
    n, co, ci = cells.shape[:3]
    out_channels, group_channels, kh, kw = layer.kernel_shape
    m = kh * kw * (out_channels // co) * (group_channels // ci)
    hidden = torch.relu(batch_normed(attention.norm1, linear(attention.fc1, x.mean((2, 3)))))
    z = linear(attention.fc2, hidden).reshape(len(x), m, -1)
    if attention.fc3 is not None:
        first, last = layer.own.start, layer.own.stop
        own = last - first
        others = z[:, :, own:-1] @ attention.fc3.weight.T
        z = torch.cat([others[:, :, :first], z[:, :, :own], others[:, :, first:], z[:, :, -1:]], 2)
        z = z + attention.basis_bias.reshape(m, n + 1)
    for b in range(len(x)):
        kernel = torch.zeros(layer.kernel_shape, dtype=x.dtype)
        i = 0
        for y in range(kh):
            for w in range(kw):
                for o in range(0, out_channels, co):
                    for c in range(0, group_channels, ci):
                        total = sum(z[b, i, p].abs() for p in range(n + 1)) + 1e-3
                        cell = sum(((1 - tau) * z[b, i, j] / total + tau * attention.beta[i, j])
                                   * cells[j, :, :, 0, 0] for j in range(n))
                        patch = torch.zeros_like(kernel)
                        patch[o:o + co, c:c + ci, y, w] = 1
                        kernel = kernel + patch * F.pad(
                            cell, (c, group_channels - c - ci, o, out_channels - o - co)
                        )[:, :, None, None]
                        i += 1
        yield kernel


def waves(size, frequencies):
    """exp(2 pi i f n / size) for each f of ``frequencies``, a row, and each n."""
    turns = torch.outer(frequencies, torch.arange(size)).double() / size
    return torch.polar(torch.ones_like(turns), 2 * torch.pi * turns)


def spectrum_kernel(layer, factors=1):
    """Kernel of an FDConv2d, (Cout, I, kh, kw), each frequency times its factor: a sum of waves."""
    out_channels, inner, kh, kw = layer.kernel_shape
    height, width = out_channels * kh, inner * kw
    parts = layer.dft_weight[0].double()
    spectrum = torch.complex(parts[..., 0], parts[..., 1]) * factors
    column = torch.arange(width // 2 + 1)
    # A wave and its conjugate, which is not kept, are real together; some are their own conjugate.
    times = torch.where((column * 2) % width == 0, 1, 2)
    plane = (waves(height, torch.arange(height)).T @ (spectrum * times) @ waves(width, column)).real
    plane = plane / (height * width) * max(1, min(layer.in_channels, layer.out_channels) // 2)
    return plane.reshape(out_channels, kh, inner, kw).permute(0, 2, 1, 3)


def frequency_groups(height, width, group_num):
    """Frequencies by their distance from zero, cut into groups: the group of each."""
    distance = {(u, v): Fraction(min(u, height - u), height)**2 + Fraction(v, width)**2
                for u in range(height) for v in range(width // 2 + 1)}
    order = sorted(distance, key=lambda uv: (distance[uv], uv))
    groups = torch.zeros(height, width // 2 + 1, dtype=torch.long)
    for rank, uv in enumerate(order):
        groups[uv] = rank * group_num // len(order)
    return groups


def fd_kernels(layer, x):
    """FDConv: groups of the spectrum by attention, then global and local modulation."""
    out_channels, inner, kh, kw = layer.kernel_shape
    attention, local, t = layer.KSM_Global, layer.KSM_Local, layer.temperature
    hidden = pooled_norm(attention, x)
    hidden = attention.relu.scale * torch.relu(hidden)**2 + attention.relu.bias
    groups = frequency_groups(out_channels * kh, inner * kw, layer.kernel_num)

    def gate(fc):
        return None if fc is None else 2 * torch.sigmoid(linear(fc, hidden) / t)

    c, f, s, a = (gate(getattr(attention, f'{name}_fc'))
                  for name in ('channel', 'filter', 'spatial', 'kernel'))
    mean = x.mean((2, 3))
    elements = torch.ones(len(x), out_channels * kh * kw, mean.shape[1], dtype=x.dtype)
    if local is not None:
        normed = F.layer_norm(mean, mean.shape[1:], local.norm.weight, local.norm.bias)
        logits = F.conv1d(normed[:, None], local.conv.weight,
                          padding=local.conv.weight.shape[2] // 2)
        elements = 2 * torch.sigmoid(logits)
    for b in range(len(x)):
        kernel = spectrum_kernel(layer, 1 if a is None else a[b][groups])
        rows = []
        for o in range(out_channels):
            first = o // (out_channels // layer.groups) * inner
            row = kernel[o] * c[b, first:first + inner, None, None]
            row = row if f is None else row * f[b, o]
            row = row if s is None else row * s[b].reshape(kh, kw)
            mine = elements[b, o * kh * kw:(o + 1) * kh * kw, first:first + inner]
            rows.append(row * mine.T.reshape(inner, kh, kw))
        yield torch.stack(rows)


def fd_bands(layer, x):
    """FDConv's frequency band modulation, by whole Fourier transforms."""
    height, width = x.shape[2:]
    to_row, to_column = (waves(size, torch.arange(size)) for size in (height, width))
    spectrum = to_row.conj() @ x.to(to_row.dtype) @ to_column.conj()
    cycles = [torch.minimum(torch.arange(n), n - torch.arange(n)) for n in (height, width)]
    output, rest = 0, x
    for i, gate in enumerate(layer.FBM.freq_weight_conv_list):
        row, column = (4 * c < n if i == 0 else 2**(i + 2) * c <= n
                       for c, n in zip(cycles, (height, width)))
        low = (to_row @ (spectrum * (row[:, None] & column)) @ to_column).real / (height * width)
        gates = 2 * torch.sigmoid(F.conv2d(x, gate.weight, gate.bias, padding=1))
        output, rest = output + gates * (rest - low), low
    return output + rest


def pooled_norm(attention, x):
    """The hidden layer of ODConv's attention, and of FDConv's, before its activation."""
    return batch_normed(attention.bn, linear(attention.fc, x.mean((2, 3))))


def batch_normed(bn, hidden):
    """BatchNorm of an attention's hidden values, (B, C)."""
    if bn.training and len(hidden) > 1:
        mean, var = hidden.mean(0), hidden.var(0, unbiased=False)
    else:
        mean, var = bn.running_mean, bn.running_var
    return (hidden - mean) / torch.sqrt(var + bn.eps) * bn.weight + bn.bias


def odconv_attentions(layer, x):
    """ODConv's attentions, from Fig. 2 of the paper, with the parameters of an ODConv2d."""
    attention, t = layer.attention, layer.temperature
    hidden = torch.relu(pooled_norm(attention, x))

    def gates(fc):
        return attention.gate_scale * torch.sigmoid(linear(fc, hidden) / t)

    out = dict(channel_attention=gates(attention.channel_fc))
    if attention.filter_fc is not None:
        out['filter_attention'] = gates(attention.filter_fc)
    if attention.spatial_fc is not None:
        out['spatial_attention'] = gates(attention.spatial_fc).reshape(-1, *layer.kernel_size)
    if attention.kernel_fc is not None:
        out['kernel_attention'] = torch.softmax(linear(attention.kernel_fc, hidden) / t, 1)
    return out


def randomised(layer):
    """As after training: no statistic, scale or bias at its start."""
    for name, value in (*layer.named_parameters(), *layer.named_buffers()):
        if value.is_floating_point():
            value.data.normal_(std=0.5) if 'var' not in name else value.data.uniform_(0.5, 2)
    return layer


def assert_same_with_gradients(ours, theirs, inputs, rtol=1e-9):
    """Two scalar-free outputs agree, and so do their gradients with respect to every input."""
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-11)
    grad = torch.randn_like(theirs)
    named = [(name, value) for name, value in inputs.items() if value is not None]
    values = [value for _, value in named]
    got = torch.autograd.grad(ours, values, grad)
    expected = torch.autograd.grad(theirs, values, grad)
    for (name, _), g, e in zip(named, got, expected):
        torch.testing.assert_close(g, e, rtol=rtol, atol=1e-10, msg=lambda m, n=name: f'{n}: {m}')
