_base_ = 'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py'

custom_imports = dict(imports=['mmdet_odconv'], allow_failed_imports=False)
custom_hooks = [*_base_.custom_hooks, dict(type='InputCheckHook')]

# The layer goes wherever a config takes conv_cfg; CSPNeXt passes it to its blocks. No ImageNet
# weights of this backbone are published.
model = dict(
    backbone=dict(conv_cfg=dict(type='ODConv2d', kernel_num=1), init_cfg=None))

optim_wrapper = dict(optimizer=dict(fused=True))
