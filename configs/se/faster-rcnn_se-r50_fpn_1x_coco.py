_base_ = ['mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', '../_base_/odconv.py']

model = dict(
    backbone=dict(
        type='SEResNet',
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://download.openmmlab.com/mmclassification/v0/se-resnet/'
            'se-resnet50_batch256_imagenet_20200804-ae206104.pth',
            prefix='backbone.')))

optim_wrapper = dict(optimizer=dict(fused=True))
