_base_ = './faster-rcnn_mobilenet-v2-x0.5_fpn_digits.py'

model = dict(backbone=dict(type='ODMobileNetV2', conv_cfg=dict(type='FDConv2d')))
