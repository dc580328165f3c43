_base_ = './faster-rcnn_r18_fpn_digits.py'

# Of 4 images or fewer BatchNorm in the attention has hardly any statistics.
model = dict(
    backbone=dict(type='ODResNet', conv_cfg=dict(type='FDConv2d', norm_cfg=dict(type='LN'))))
