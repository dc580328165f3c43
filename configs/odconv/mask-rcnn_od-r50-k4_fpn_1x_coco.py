_base_ = ['mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', '../_base_/odconv.py']

# ImageNet weights of the ODConv release, downloaded to checkpoints/ (see the README).
model = dict(
    backbone=dict(
        type='ODResNet',
        kernel_num=4,
        init_cfg=dict(type='Pretrained', checkpoint='checkpoints/od_resnet50_4x.pth.tar')))

optim_wrapper = dict(optimizer=dict(fused=True))
