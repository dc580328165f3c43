_base_ = '../odconv/faster-rcnn_mobilenet-v2_fpn_1x_coco.py'

# ImageNet weights trained with MMPretrain, saved to checkpoints/ (see the README).
model = dict(
    backbone=dict(
        type='ODMobileNetV2',
        conv_cfg=dict(type='DCDConv2d'),
        init_cfg=dict(
            type='Pretrained',
            checkpoint='checkpoints/dcd_mobilenetv2_100.pth',
            prefix='backbone.')))
