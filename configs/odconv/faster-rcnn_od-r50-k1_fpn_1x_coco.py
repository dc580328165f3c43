_base_ = ['mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', '../_base_/odconv.py']

# ImageNet weights of the ODConv release, downloaded to checkpoints/ (see the README).
model = dict(
    backbone=dict(
        type='ODResNet',
        kernel_num=1,
        init_cfg=dict(type='Pretrained', checkpoint='checkpoints/od_resnet50_1x.pth.tar')))

optim_wrapper = dict(optimizer=dict(fused=True))
