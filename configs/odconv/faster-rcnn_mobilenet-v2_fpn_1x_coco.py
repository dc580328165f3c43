_base_ = ['mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', '../_base_/odconv.py']

# The static baseline: the pyramid reads strides 4, 8, 16 and 32, as the ODConv release does.
model = dict(
    backbone=dict(
        _delete_=True,
        type='MobileNetV2',
        out_indices=(1, 2, 4, 7),
        frozen_stages=2,  # the releases' 1: up to the first map that the pyramid reads
        norm_eval=True,
        init_cfg=dict(type='Pretrained', checkpoint='open-mmlab://mmdet/mobilenet_v2')),
    neck=dict(in_channels=[24, 32, 96, 1280]))

optim_wrapper = dict(optimizer=dict(fused=True))
