_base_ = './faster-rcnn_mobilenet-v2-x0.5_fpn_digits.py'

# Of 4 images or fewer BatchNorm in the attention has hardly any statistics.
model = dict(
    backbone=dict(type='ODMobileNetV2', kernel_num=4, conv_cfg=dict(norm_cfg=dict(type='LN'))))

custom_hooks = [
    *_base_.custom_hooks,
    # From scratch, attention starts out near-uniform, so that every kernel of a bank learns.
    dict(type='TemperatureAnnealingHook', begin=30, end_epoch=1)
]
