_base_ = './faster-rcnn_r18_fpn_digits.py'

model = dict(backbone=dict(type='DyResNet', kernel_num=4, dynamic_convs='layer.*'))

custom_hooks = [
    *_base_.custom_hooks,
    # From scratch, attention starts out near-uniform, so that every kernel of a bank learns.
    dict(type='TemperatureAnnealingHook', begin=30, end_epoch=1)
]
