_base_ = './td-hm_r18_8xb64-210e_coco-256x192.py'

# The published parameters: those of dynamic convolutions in the last two stages.
model = dict(backbone=dict(type='DyResNet', kernel_num=4, init='he'))

# From scratch, attention starts out near-uniform, so that every kernel of a bank learns.
custom_hooks = [
    *_base_.custom_hooks,
    dict(type='TemperatureAnnealingHook', begin=30, end_epoch=10)
]
