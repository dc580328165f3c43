_base_ = './td-hm_r18_digits.py'

model = dict(backbone=dict(type='DyResNet', kernel_num=4))
