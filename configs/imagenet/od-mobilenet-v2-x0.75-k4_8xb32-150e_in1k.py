_base_ = './od-mobilenet-v2-k4_8xb32-150e_in1k.py'

model = dict(backbone=dict(widen_factor=0.75))
