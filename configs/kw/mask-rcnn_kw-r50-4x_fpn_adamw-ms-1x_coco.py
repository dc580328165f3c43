_base_ = './mask-rcnn_kw-r50_fpn_adamw-ms-1x_coco.py'

model = dict(
    backbone=dict(
        budget='4x', init_cfg=dict(checkpoint='checkpoints/kw4x_resnet50.pth')))
