_base_ = ['mmdet::retinanet/retinanet_r50_fpn_1x_coco.py', '../_base_/odconv.py']

model = dict(
    backbone=dict(
        type='ODResNet',
        kernel_num=4,
        init_cfg=dict(type='Pretrained', checkpoint='checkpoints/od_resnet50_4x.pth.tar')))

optim_wrapper = dict(optimizer=dict(fused=True))
