_base_ = '../_base_/keypoints.py'

# The plugin's own, which the dynamic one extends: of the paper's first version, 66M MAdds.
model = dict(
    backbone=dict(
        _delete_=True, type='mmengine.MobileNetV3', arch='small_v1', out_indices=(12, )),
    head=dict(in_channels=576))
