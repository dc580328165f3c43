# What every config of the plugin adds to a detector of MMDetection: the layers and backbones,
# registered, and checks of the input that MMEngine leaves to the user.
custom_imports = dict(imports=['mmdet_odconv'], allow_failed_imports=False)
custom_hooks = [dict(type='InputCheckHook')]
