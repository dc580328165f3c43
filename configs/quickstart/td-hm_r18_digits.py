_base_ = '../keypoints/td-hm_r18_8xb64-210e_coco-256x192.py'

# Corners of turned digits, written by tools/dataset_converters/digits.py --keypoints, found by a
# narrower network in crops of 64x64, and a schedule for two CPU cores.
codec = dict(type='MSRAHeatmap', input_size=(64, 64), heatmap_size=(16, 16), sigma=1)
model = dict(
    backbone=dict(base_channels=16, stem_channels=16),
    head=dict(
        in_channels=128, out_channels=4, deconv_out_channels=(64, 64, 64), decoder=codec),
    test_cfg=dict(flip_test=False))  # a digit's mirror image is none

data_root = 'data/digits-keypoints/'
corners = ('top left', 'top right', 'bottom right', 'bottom left')
colours = ([0, 114, 178], [230, 159, 0], [213, 94, 0], [0, 158, 115])
metainfo = dict(
    dataset_name='digits',
    keypoint_info={
        i: dict(name=name, id=i, color=colours[i], type='', swap='')
        for i, name in enumerate(corners)
    },
    skeleton_info={
        i: dict(link=(corners[i], corners[(i + 1) % 4]), id=i, color=colours[i])
        for i in range(4)
    },
    joint_weights=[1.] * 4,
    sigmas=[0.05] * 4)
images = dict(type='CocoDataset', data_root=data_root, data_mode='topdown', metainfo=metainfo)
prepare = [
    dict(type='LoadImage'),
    dict(type='GetBBoxCenterScale'),
    dict(type='TopdownAffine', input_size=codec['input_size'])
]
train_dataloader = dict(
    _delete_=True,
    batch_size=16,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        **images,
        ann_file='annotations/train.json',
        data_prefix=dict(img='train/'),
        pipeline=[
            *prepare, dict(type='GenerateTarget', encoder=codec), dict(type='PackPoseInputs')
        ]))
val_dataloader = dict(
    _delete_=True,
    batch_size=64,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
    dataset=dict(
        **images,
        ann_file='annotations/val.json',
        data_prefix=dict(img='val/'),
        test_mode=True,
        pipeline=[*prepare, dict(type='PackPoseInputs')]))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/val.json')
test_evaluator = val_evaluator

optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=2e-3, weight_decay=0.01, fused=True))
param_scheduler = [dict(type='OneCycleLR', eta_max=2e-3, total_steps=334, by_epoch=False)]
train_cfg = dict(max_epochs=1, val_interval=1)
custom_hooks = [dict(type='InputCheckHook')]
default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(interval=1, max_keep_ckpts=1, save_best=None))
randomness = dict(seed=0)
