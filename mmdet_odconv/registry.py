"""The scope ``mmdet_odconv``, which MMEngine gives to what ``_base_ = 'mmdet_odconv::...'`` brings.

It holds nothing of its own: MMDetection's registries answer for it, and above them the root's,
where the plugin's layers, backbones and hooks are. MMEngine imports it then.
"""
import mmdet.registry
from mmengine.registry import Registry

REGISTRIES = [Registry(parent.name, parent=parent, scope='mmdet_odconv',
                       locations=[__name__])
              for parent in vars(mmdet.registry).values() if isinstance(parent, Registry)]
