_base_ = './r18_8xb32-100e_in1k.py'

model = dict(
    backbone=dict(type='ODResNet', kernel_num=4, init='he'),
    head=dict(type='DropoutLinearClsHead', dropout=0.2))

# From scratch, attention starts out near-uniform, so that every kernel of a bank learns.
custom_hooks = [
    *_base_.custom_hooks,
    dict(type='TemperatureAnnealingHook', begin=30, end_epoch=10)
]
