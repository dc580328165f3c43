# The static network of the comparison.
_base_ = '../_base_/mask-rcnn_adamw-ms_1x.py'
