_base_ = ['mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', '../_base_/odconv.py']

# Every convolution but the first is dynamic, as in the ODConv paper's comparison. ImageNet weights
# trained with MMPretrain, saved to checkpoints/ (see the README).
model = dict(
    backbone=dict(
        type='DyResNet',
        kernel_num=4,
        dynamic_convs='layer.*',
        init_cfg=dict(
            type='Pretrained', checkpoint='checkpoints/dy_resnet50_4x.pth', prefix='backbone.')))

optim_wrapper = dict(optimizer=dict(fused=True))
