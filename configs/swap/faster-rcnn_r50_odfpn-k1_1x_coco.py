_base_ = ['mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', '../_base_/odconv.py']

# A static backbone under a pyramid of dynamic convolutions. With one image per device the
# attention has no batch to normalise over; the pyramid, unlike the backbone, is not in norm_eval,
# so it takes the norm that works for any batch. No norm follows its convolutions, to take out the
# scale of kernels and gates: with gates that begin at 3/4 its maps are as large as a static one's.
model = dict(
    neck=dict(
        conv_cfg=dict(type='ODConv2d', kernel_num=1, gate_scale=1.5, norm_cfg=dict(type='LN'))))

optim_wrapper = dict(optimizer=dict(fused=True))
