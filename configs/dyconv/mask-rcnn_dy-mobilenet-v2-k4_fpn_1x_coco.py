_base_ = '../odconv/mask-rcnn_mobilenet-v2_fpn_1x_coco.py'

# Every convolution but the first is dynamic, as in the ODConv paper's comparison. ImageNet weights
# trained with MMPretrain, saved to checkpoints/ (see the README).
model = dict(
    backbone=dict(
        type='DyMobileNetV2',
        kernel_num=4,
        dynamic_convs='(layer|conv2).*',
        init_cfg=dict(
            type='Pretrained',
            checkpoint='checkpoints/dy_mobilenetv2_100_4x.pth',
            prefix='backbone.')))
