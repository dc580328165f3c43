_base_ = './faster-rcnn_od-r18-k1_fpn_digits.py'

# The classifier of od-r18-k1_digits.py, trained by `make pretrain`.
model = dict(
    backbone=dict(
        conv_cfg=dict(type='ODConv2d', norm_cfg=dict(type='LN')),
        init_cfg=dict(
            _delete_=True,
            type='Pretrained',
            checkpoint='work_dirs/pretrain/epoch_4.pth',
            prefix='backbone.')))
train_cfg = dict(max_epochs=1)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=125, end=250, T_max=125, eta_min=1e-6)
]
