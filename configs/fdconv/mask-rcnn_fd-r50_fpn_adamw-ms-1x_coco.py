_base_ = '../_base_/mask-rcnn_adamw-ms_1x.py'

# The backbone as in faster-rcnn_fd-r50_fpn_1x_coco.py; the rate falls at the release's epochs.
model = dict(
    backbone=dict(
        type='ODResNet',
        conv_cfg=dict(type='FDConv2d'),
        frozen_except='KSM|FBM',
        init_cfg=dict(type='StaticPretrained', checkpoint='torchvision://resnet50')))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', begin=0, end=12, by_epoch=True, milestones=[10, 11], gamma=0.1)
]
