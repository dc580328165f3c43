_base_ = '../_base_/keypoints.py'

model = dict(
    backbone=dict(_delete_=True, type='MobileNetV2', out_indices=(7, )),
    head=dict(in_channels=1280))
