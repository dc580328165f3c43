_base_ = '../_base_/mask-rcnn_adamw-ms_1x.py'

# ImageNet weights of the KernelWarehouse release, downloaded to checkpoints/ (see the README).
model = dict(
    backbone=dict(
        type='KWResNet',
        budget='1x',
        frozen_except='warehouse_manager',  # the release's cells train, whoever reads them
        init_cfg=dict(type='Pretrained', checkpoint='checkpoints/kw1x_resnet50.pth')))
