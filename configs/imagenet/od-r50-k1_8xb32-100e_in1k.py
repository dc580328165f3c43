_base_ = './od-r50-k4_8xb32-100e_in1k.py'

model = dict(backbone=dict(kernel_num=1))
