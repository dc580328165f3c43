_base_ = '../odconv/faster-rcnn_mobilenet-v2_fpn_1x_coco.py'

# From the static MobileNetV2's ImageNet weights; its SE layers begin untrained.
model = dict(backbone=dict(type='SEMobileNetV2'))
