"""Whether dynamic_conv2d chooses well: every plan, timed on every layer shape of a backbone.

    python measure_plans.py ODResNet --batch 1 2 --size 416 672
    python measure_plans.py ODMobileNetV2 --batch 16 --size 224 224 --mode training
    python measure_plans.py ODResNet --estimate docs/results/gpus.json --batch 2 --size 800 1344

A layer of the backbone that occurs several times is timed once. Milliseconds are lower quartiles
over interleaved rounds; a choice is good if it is within a tenth of the fastest plan.

--estimate runs nothing: for each machine of a file, as ``python -m mmdet_odconv.ops`` keeps them,
it adds up what the roofline expects of fp16 layers.
"""
import argparse
import collections
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from mmdet_odconv import backbones
from mmdet_odconv.layers import DynamicConv2d
from mmdet_odconv.names import nearest
from mmdet_odconv.ops import dynamic_conv2d, force_plan
from mmdet_odconv.ops.dynamic_conv import PLANS, choose_plan, layer_costs, plan_costs
from mmdet_odconv.ops.machine import NOMINAL, read

FP16 = 2  # bytes


def layer_calls(model, x, distinct=True):
    """Calls of dynamic_conv2d in one forward pass, as its arguments; those alike once."""
    calls = {}

    def record(layer, inputs):
        geometry = layer.stride, layer.padding, layer.dilation, layer.groups
        shapes = tuple(layer.weight.shape), tuple(inputs[0].shape), *geometry
        key = shapes if distinct else layer
        if key not in calls:
            attentions = layer.attention(inputs[0].mean((2, 3)), layer.temperature)
            leaves = {name: value.detach().requires_grad_() for name, value in attentions.items()}
            calls[key] = (inputs[0].detach().requires_grad_(), layer.weight, *geometry), leaves

    handles = [layer.register_forward_pre_hook(record) for layer in model.modules()
               if isinstance(layer, DynamicConv2d)]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return list(calls.values())


def seconds(plan, mode, call, attentions):
    """Of one call by a plan; of its backward pass too if training."""
    x, weight, *geometry = call
    leaves = [x, weight, *attentions.values()]
    start = time.perf_counter()
    with force_plan(plan), torch.set_grad_enabled(mode == 'training'):
        output = dynamic_conv2d(x, weight, None, *geometry, **attentions)
    if mode == 'training':
        torch.autograd.grad(output, leaves, torch.ones_like(output))
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def candidates(call, attentions):
    """Plans that can serve a call and may be chosen."""
    x, weight, *geometry = call
    is_shared = not {'kernel_attention', 'spatial_attention'} & set(attentions)
    served = plan_costs(not x.is_cuda, NOMINAL, 4, False, x.shape, weight.shape, *geometry,
                        is_shared)
    return [*served, *['fused'] * x.is_cuda]


def measure(mode, call, attentions, rounds):
    times = {plan: [] for plan in candidates(call, attentions)}
    for _ in range(rounds + 1):  # the first round warms up
        for plan in times:
            times[plan].append(seconds(plan, mode, call, attentions))
    return {plan: statistics.quantiles(values[1:], n=4)[0] * 1e3 for plan, values in times.items()}


def estimate(machine, training, calls):
    """Seconds that the roofline expects of a network's layers: static, and by each plan."""
    totals = collections.Counter()
    for (x, weight, *geometry), attentions in calls:
        totals.update(layer_costs(machine, FP16, training, x.shape, weight.shape, *geometry,
                                  not {'kernel_attention', 'spatial_attention'} & set(attentions)))
    return totals


def print_estimates(args):
    table = Table(title=f'{args.backbone}, fp16, {args.mode}: estimated ms of its dynamic layers')
    names = ['static', 'folded', 'chosen', 'attention']
    for column in ('machine', 'kernel_num', 'input', *names, 'chosen to static'):
        table.add_column(column)
    for kernel_num in args.kernel_num:
        model = build(args, kernel_num).to('meta')
        for batch in args.batch:
            x = torch.empty(batch, 3, *args.size, device='meta')
            calls = layer_calls(model, x, distinct=False)
            for name, machine in read(args.estimate).items():
                totals = estimate(machine, args.mode == 'training', calls)
                table.add_row(name, str(kernel_num), 'x'.join(map(str, (batch, *args.size))),
                              *(f'{totals[key] * 1e3:.2f}' for key in names),
                              f"{totals['chosen'] / totals['static']:.2f}")
    Console(width=150).print(table)


def build(args, kernel_num):
    depth = {'depth': args.depth} if 'ResN' in args.backbone else {}
    return getattr(backbones, args.backbone)(kernel_num=kernel_num, **depth)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('backbone', help='class name')
    parser.add_argument('--batch', type=int, nargs='+', default=[1, 2])
    parser.add_argument('--size', type=int, nargs=2, default=(416, 672), metavar=('H', 'W'))
    parser.add_argument('--kernel-num', type=int, nargs='+', default=[1, 4])
    parser.add_argument('--depth', type=int, default=50, help='of a ResNet')
    parser.add_argument('--mode', choices=['inference', 'training'], default='training')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--rounds', type=int, default=8, help='at least 2')
    parser.add_argument('--threads', type=int, help='of the CPU')
    parser.add_argument('--estimate', type=Path, metavar='JSON', help='machines, to time none')
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error(f'--rounds must be at least 2, got {args.rounds}')
    if not hasattr(backbones, args.backbone):
        known = [name for name in backbones.__all__ if name[:2] in ('OD', 'Dy')]
        parser.error(f'{args.backbone} is no dynamic backbone: '
                     f'{nearest(args.backbone, known, "give one of " + ", ".join(known))}')
    if args.estimate and not args.estimate.is_file():
        parser.error(f'--estimate {args.estimate} does not exist')
    if args.estimate:
        print_estimates(args)
        return
    if args.threads:
        torch.set_num_threads(args.threads)
    table = Table(title=f'{args.mode}, ms')
    served = sorted(set(PLANS) - {'published', 'plain'})
    columns = ['kernel_num', 'weight', 'input', 'stride', *served,
               'chosen', 'to the best']
    for column in columns:
        table.add_column(column)
    losses, chosen_total, best_total = [], 0, 0
    for kernel_num in args.kernel_num:
        model = build(args, kernel_num).to(args.device)
        for batch in args.batch:
            x = torch.randn(batch, 3, *args.size, device=args.device)
            for call, attentions in layer_calls(model, x):
                times = measure(args.mode, call, attentions, args.rounds)
                with torch.set_grad_enabled(args.mode == 'training'):
                    plan = choose_plan(*call, *(attentions.get(f'{name}_attention') for name in (
                        'kernel', 'spatial', 'channel', 'filter')))
                best = min(times.values())
                chosen_total, best_total = chosen_total + times[plan], best_total + best
                losses.append(times[plan] / best)
                shapes = ['x'.join(map(str, t.shape)) for t in (call[1], call[0])]
                table.add_row(str(kernel_num), *shapes, str(call[2][0]),
                              *(f'{times[name]:.2f}' if name in times else ''
                                for name in columns[4:-2]), plan, f'{losses[-1]:.2f}')
    Console(width=150).print(table)
    good = sum(loss <= 1.1 for loss in losses)
    print(f'{good} of {len(losses)} choices within a tenth of the fastest plan; all chosen plans '
          f'together take {chosen_total / best_total:.3f} of the fastest ones.')


if __name__ == '__main__':
    main()
