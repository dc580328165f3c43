_base_ = './od-r101-k2_8xb32-100e_in1k.py'

model = dict(backbone=dict(kernel_num=1))
