_base_ = './faster-rcnn_dy-mobilenet-v2-x0.5-k4_fpn_digits.py'

model = dict(
    backbone=dict(widen_factor=0.25), neck=dict(in_channels=[8, 8, 24, 1280]))
