_base_ = ['mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', '../_base_/odconv.py']

# Static ImageNet weights, converted when training starts. As in the release, the first stage's
# spectra are frozen and its attention is not.
model = dict(
    backbone=dict(
        type='ODResNet',
        conv_cfg=dict(type='FDConv2d'),
        frozen_except='KSM|FBM',
        init_cfg=dict(type='StaticPretrained', checkpoint='torchvision://resnet50')))

optim_wrapper = dict(optimizer=dict(fused=True))
