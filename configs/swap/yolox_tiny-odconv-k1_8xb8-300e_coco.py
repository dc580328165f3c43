_base_ = 'mmdet::yolox/yolox_tiny_8xb8-300e_coco.py'

custom_imports = dict(imports=['mmdet_odconv'], allow_failed_imports=False)
custom_hooks = [*_base_.custom_hooks, dict(type='InputCheckHook')]

# CSPDarknet passes conv_cfg to every convolution behind its stem's focus layer.
model = dict(backbone=dict(conv_cfg=dict(type='ODConv2d', kernel_num=1)))

optim_wrapper = dict(optimizer=dict(fused=True))
