_base_ = '../_base_/mask-rcnn_adamw-ms_1x.py'

# ImageNet weights of the KernelWarehouse release, downloaded to checkpoints/ (see the README). The
# pyramid reads strides 4, 8, 16 and 32, as the release does.
model = dict(
    backbone=dict(
        _delete_=True,
        type='KWMobileNetV2',
        budget='1x',
        out_indices=(1, 2, 4, 7),
        frozen_stages=2,  # the releases' 1: up to the first map that the pyramid reads
        frozen_except='warehouse_manager',  # the release's cells train, whoever reads them
        norm_eval=True,
        init_cfg=dict(type='Pretrained', checkpoint='checkpoints/kw1x_mobilenetv2_100.pth')),
    neck=dict(in_channels=[24, 32, 96, 1280]))
