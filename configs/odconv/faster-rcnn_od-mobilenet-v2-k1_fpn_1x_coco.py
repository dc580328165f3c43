_base_ = './faster-rcnn_mobilenet-v2_fpn_1x_coco.py'

# ImageNet weights of the ODConv release, downloaded to checkpoints/ (see the README).
model = dict(
    backbone=dict(
        type='ODMobileNetV2',
        kernel_num=1,
        init_cfg=dict(
            type='Pretrained', checkpoint='checkpoints/od_mobilenetv2_100_1x.pth.tar')))
