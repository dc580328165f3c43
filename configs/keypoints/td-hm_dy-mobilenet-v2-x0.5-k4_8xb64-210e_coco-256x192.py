_base_ = './td-hm_dy-mobilenet-v2-k4_8xb64-210e_coco-256x192.py'

model = dict(backbone=dict(widen_factor=0.5))
