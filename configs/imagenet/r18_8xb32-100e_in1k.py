_base_ = ['mmpretrain::_base_/models/resnet18.py', '../_base_/imagenet.py']

# MMPretrain's schedule is that of the ODConv release: 100 epochs, lr 0.1 falling at 30, 60 and 90.
model = dict(backbone=dict(norm_eval=False, zero_init_residual=False))
