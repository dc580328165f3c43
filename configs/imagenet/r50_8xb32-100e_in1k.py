_base_ = './r18_8xb32-100e_in1k.py'

model = dict(backbone=dict(depth=50), head=dict(in_channels=2048))
