_base_ = './faster-rcnn_r18_fpn_digits.py'

model = dict(backbone=dict(type='KWResNet'))

custom_hooks = [
    *_base_.custom_hooks,
    # From scratch, each cell of a kernel is one of the warehouse's at first, so that all learn.
    dict(type='WarehouseWarmUpHook', end_epoch=1)
]
