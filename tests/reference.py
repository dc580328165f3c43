"""Dynamic convolution written from its formula, one image, one kernel, at a time."""
import torch
import torch.nn.functional as F


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


def odconv_attentions(layer, x):
    """ODConv's attentions, from Fig. 2 of the paper, with the parameters of an ODConv2d."""
    attention, t = layer.attention, layer.temperature

    def linear(fc, v):
        out = v @ fc.weight.flatten(1).T
        return out if fc.bias is None else out + fc.bias

    hidden = linear(attention.fc, x.mean((2, 3)))
    bn = attention.bn
    if bn.training and len(x) > 1:
        mean, var = hidden.mean(0), hidden.var(0, unbiased=False)
    else:
        mean, var = bn.running_mean, bn.running_var
    hidden = torch.relu((hidden - mean) / torch.sqrt(var + bn.eps) * bn.weight + bn.bias)
    out = dict(channel_attention=torch.sigmoid(linear(attention.channel_fc, hidden) / t))
    if attention.filter_fc is not None:
        out['filter_attention'] = torch.sigmoid(linear(attention.filter_fc, hidden) / t)
    if attention.spatial_fc is not None:
        spatial = torch.sigmoid(linear(attention.spatial_fc, hidden) / t)
        out['spatial_attention'] = spatial.reshape(-1, *layer.kernel_size)
    if attention.kernel_fc is not None:
        out['kernel_attention'] = torch.softmax(linear(attention.kernel_fc, hidden) / t, 1)
    return out


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
