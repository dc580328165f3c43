_base_ = '../odconv/faster-rcnn_mobilenet-v2_fpn_1x_coco.py'

# ImageNet weights trained with MMPretrain, saved to checkpoints/ (see the README).
model = dict(
    backbone=dict(
        type='ODMobileNetV2',
        conv_cfg=dict(type='CondConv2d', kernel_num=8),
        init_cfg=dict(
            type='Pretrained',
            checkpoint='checkpoints/cond_mobilenetv2_100_8x.pth',
            prefix='backbone.')))
