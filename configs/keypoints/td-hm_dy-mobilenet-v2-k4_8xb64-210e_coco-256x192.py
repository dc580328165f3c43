_base_ = './td-hm_mobilenet-v2_8xb64-210e_coco-256x192.py'

# The published parameters: those of a static last 1x1 convolution.
model = dict(backbone=dict(type='DyMobileNetV2', kernel_num=4, init='he'))

# From scratch, attention starts out near-uniform, so that every kernel of a bank learns.
custom_hooks = [
    *_base_.custom_hooks,
    dict(type='TemperatureAnnealingHook', begin=30, end_epoch=10)
]
