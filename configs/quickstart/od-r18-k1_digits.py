_base_ = '../imagenet/od-r18-k1_8xb32-100e_in1k.py'

# The recipe of configs/imagenet on one handwritten digit an image, written by
# tools/dataset_converters/digits.py --classification, and a schedule for two CPU cores.
model = dict(
    # Of a few images a detector's step has no statistics; the attention must not need any.
    backbone=dict(conv_cfg=dict(type='ODConv2d', norm_cfg=dict(type='LN'))),
    head=dict(num_classes=10))
data_preprocessor = dict(num_classes=10)

pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
train_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    pin_memory=False,
    dataset=dict(
        _delete_=True,
        type='CustomDataset',
        data_root='data/digits-classification',
        data_prefix='train',
        pipeline=pipeline))
val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    pin_memory=False,
    dataset=dict(
        _delete_=True,
        type='CustomDataset',
        data_root='data/digits-classification',
        data_prefix='val',
        pipeline=pipeline))
test_dataloader = val_dataloader

optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-3, weight_decay=0.01, fused=True))
param_scheduler = [
    dict(type='OneCycleLR', eta_max=1e-3, total_steps=180, by_epoch=False)
]
train_cfg = dict(max_epochs=4)
custom_hooks = [dict(type='InputCheckHook')]  # four epochs are too few to anneal in
default_hooks = dict(logger=dict(interval=15), checkpoint=dict(max_keep_ckpts=1))
randomness = dict(seed=0)
