_base_ = ['mmdet::dcn/faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py', '../_base_/odconv.py']

# Deformable 3x3 convolutions in the last three stages, ODConv in the others' place: a kernel's
# elements are either moved or mixed. Static ImageNet weights serve both.
model = dict(
    backbone=dict(
        type='ODResNet',
        kernel_num=4,
        conv_cfg=dict(gate_scale=2),  # the bank is then the static kernel
        init_cfg=dict(type='StaticPretrained', checkpoint='torchvision://resnet50')))

optim_wrapper = dict(optimizer=dict(fused=True))
