_base_ = '../_base_/keypoints.py'

model = dict(
    backbone=dict(
        _delete_=True, type='ResNet', depth=18, out_indices=(3, ), norm_eval=False),
    head=dict(in_channels=512))
