_base_ = ['mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py', '../_base_/odconv.py']

model = dict(
    backbone=dict(
        type='ODResNet',
        kernel_num=4,
        init_cfg=dict(type='Pretrained', checkpoint='checkpoints/od_resnet50_4x.pth.tar')))

optim_wrapper = dict(optimizer=dict(fused=True))
