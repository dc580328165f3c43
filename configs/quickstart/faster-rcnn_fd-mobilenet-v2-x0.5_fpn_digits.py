_base_ = './faster-rcnn_mobilenet-v2-x0.5_fpn_digits.py'

# Of 4 images or fewer BatchNorm in the attention has hardly any statistics.
model = dict(
    backbone=dict(type='ODMobileNetV2', conv_cfg=dict(type='FDConv2d', norm_cfg=dict(type='LN'))))
