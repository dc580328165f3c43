# What every classifier here shares: MMPretrain's ImageNet, resized by Pillow as torchvision does
# (the ODConv release's loader), SGD on 8 GPUs x 32 images, and the plugin's registrations.
_base_ = [
    'mmpretrain::_base_/datasets/imagenet_bs32_pil_resize.py',
    'mmpretrain::_base_/schedules/imagenet_bs256.py',
    'mmpretrain::_base_/default_runtime.py'
]

custom_imports = dict(
    imports=['mmdet_odconv', 'mmdet_odconv.pretraining'], allow_failed_imports=False)
custom_hooks = [dict(type='InputCheckHook')]
# As MMPretrain's own train.py sets them, for those who train by this plugin's.
train_dataloader = dict(
    collate_fn=dict(type='default_collate'), persistent_workers=True, pin_memory=True)
val_dataloader = dict(
    collate_fn=dict(type='default_collate'), persistent_workers=True, pin_memory=True)
test_dataloader = val_dataloader
