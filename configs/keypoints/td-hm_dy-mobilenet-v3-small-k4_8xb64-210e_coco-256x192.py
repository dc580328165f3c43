_base_ = './td-hm_mobilenet-v3-small_8xb64-210e_coco-256x192.py'

model = dict(backbone=dict(type='DyMobileNetV3', arch='small', kernel_num=4, init='he'))

# From scratch, attention starts out near-uniform, so that every kernel of a bank learns.
custom_hooks = [
    *_base_.custom_hooks,
    dict(type='TemperatureAnnealingHook', begin=30, end_epoch=10)
]
