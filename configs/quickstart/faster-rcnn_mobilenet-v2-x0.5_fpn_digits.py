_base_ = './faster-rcnn_r18_fpn_digits.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='MobileNetV2',
        widen_factor=0.5,
        out_indices=(1, 2, 4, 7),
        norm_eval=False),
    neck=dict(in_channels=[16, 16, 48, 1280]))
