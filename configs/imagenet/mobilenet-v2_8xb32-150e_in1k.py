_base_ = ['mmpretrain::_base_/models/mobilenet_v2_1x.py', '../_base_/imagenet.py']

model = dict(
    backbone=dict(out_indices=(7, )), head=dict(type='DropoutLinearClsHead', dropout=0.2))

# The ODConv release's schedule: lr 0.05 falls by a cosine, at every iteration, over 150 epochs.
optim_wrapper = dict(optimizer=dict(lr=0.05, weight_decay=4e-5))
param_scheduler = [
    dict(type='CosineAnnealingLR', end=150, T_max=150, convert_to_iter_based=True)
]
train_cfg = dict(max_epochs=150)
