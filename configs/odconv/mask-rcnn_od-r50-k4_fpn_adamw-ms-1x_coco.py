_base_ = '../_base_/mask-rcnn_adamw-ms_1x.py'

# ImageNet weights of the ODConv release, downloaded to checkpoints/ (see the README).
model = dict(
    backbone=dict(
        type='ODResNet',
        kernel_num=4,
        init_cfg=dict(type='Pretrained', checkpoint='checkpoints/od_resnet50_4x.pth.tar')))
