_base_ = ['mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', '../_base_/odconv.py']

# ImageNet weights trained with MMPretrain, saved to checkpoints/ (see the README).
model = dict(
    backbone=dict(
        type='ODResNet',
        dynamic_convs=r'layer4\.\d+\.conv\d',  # by the published 90.0M parameters more
        conv_cfg=dict(type='CondConv2d', kernel_num=8),
        init_cfg=dict(
            type='Pretrained', checkpoint='checkpoints/cond_resnet50_8x.pth', prefix='backbone.')))

optim_wrapper = dict(optimizer=dict(fused=True))
