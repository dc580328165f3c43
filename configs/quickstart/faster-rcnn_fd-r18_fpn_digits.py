_base_ = './faster-rcnn_r18_fpn_digits.py'

model = dict(backbone=dict(type='ODResNet', conv_cfg=dict(type='FDConv2d')))
