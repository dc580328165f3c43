_base_ = ['mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py', '../_base_/odconv.py']

# The base is in Caffe's style; the weights of the ODConv release are in PyTorch's.
model = dict(
    data_preprocessor=dict(
        mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True),
    backbone=dict(
        type='ODResNet',
        kernel_num=4,
        norm_cfg=dict(type='BN', requires_grad=True),
        style='pytorch',
        init_cfg=dict(type='Pretrained', checkpoint='checkpoints/od_resnet50_4x.pth.tar')))

optim_wrapper = dict(optimizer=dict(fused=True))
