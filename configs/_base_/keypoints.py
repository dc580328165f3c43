# What every pose here shares: MMPose's SimpleBaseline on COCO, 8 GPUs x 64 people, at HRNet's
# learning rate. Those that inherit from it start from scratch, so that they can be compared.
_base_ = 'mmpose::body_2d_keypoint/topdown_heatmap/coco/td-hm_res50_8xb64-210e_coco-256x192.py'

custom_imports = dict(
    imports=['mmdet_odconv', 'mmdet_odconv.poses'], allow_failed_imports=False)
custom_hooks = [*_base_.custom_hooks, dict(type='InputCheckHook')]

optim_wrapper = dict(optimizer=dict(lr=1e-3))
