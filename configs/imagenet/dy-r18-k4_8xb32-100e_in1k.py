_base_ = './od-r18-k4_8xb32-100e_in1k.py'

model = dict(backbone=dict(type='DyResNet'))
