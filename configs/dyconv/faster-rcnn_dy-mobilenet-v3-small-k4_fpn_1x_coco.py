_base_ = ['mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', '../_base_/odconv.py']

# The pyramid reads strides 4, 8, 16 and 32. ImageNet weights trained with MMPretrain, saved to
# checkpoints/ (see the README).
model = dict(
    backbone=dict(
        _delete_=True,
        type='DyMobileNetV3',
        arch='small',
        kernel_num=4,
        frozen_stages=1,
        norm_eval=True,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='checkpoints/dy_mobilenetv3_small_4x.pth',
            prefix='backbone.')),
    neck=dict(in_channels=[16, 40, 48, 576]))

optim_wrapper = dict(optimizer=dict(fused=True))
