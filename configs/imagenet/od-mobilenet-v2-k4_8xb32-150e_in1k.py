_base_ = './mobilenet-v2_8xb32-150e_in1k.py'

model = dict(backbone=dict(type='ODMobileNetV2', kernel_num=4, init='he'))

# From scratch, attention starts out near-uniform, so that every kernel of a bank learns.
custom_hooks = [
    *_base_.custom_hooks,
    dict(type='TemperatureAnnealingHook', begin=30, end_epoch=10)
]
