"""Packaging of mmdet_odconv.

torch (2.4 or later), mmcv, mmengine and mmdet are not in install_requires: torch and mmcv must
match each other and the GPU, and mmcv, mmengine and mmdet come from either of two families of
distributions (see requirements/mminstall.txt and requirements/onedl.txt). The plugin checks them
at import instead.
"""
import re
import zipfile
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.editable_wheel import editable_wheel

HERE = Path(__file__).parent.resolve()


def requirements(name):
    return (HERE / 'requirements' / f'{name}.txt').read_text().split()


class EditableWheel(editable_wheel):
    """Editable install in which ``mim`` finds the checkout's configs and tools.

    mim looks beside the package metadata that it comes upon first on sys.path. A modern editable
    install keeps metadata in site-packages, far from the code, so this one puts the checkout,
    where setuptools leaves metadata too, ahead of site-packages. onedl-mim looks where the first
    file that the metadata lists is, or else where openmim does: so they list none.
    """

    def run(self):
        super().run()
        for wheel in Path(self.dist_dir).glob('mmdet_odconv-*.whl'):
            with zipfile.ZipFile(wheel, 'a') as archive:
                archive.writestr(
                    'mmdet_odconv_checkout.pth', 'import sys; sys.path.insert(sys.path.index('
                    f"sys._getframe(1).f_locals['sitedir']), {str(HERE)!r})\n")
        (HERE / 'mmdet_odconv.egg-info/SOURCES.txt').unlink(missing_ok=True)


setup(
    name='mmdet_odconv',
    version=re.search(r"'(.+)'", (HERE / 'mmdet_odconv/version.py').read_text()).group(1),
    description='Dynamic convolution (ODConv and its family) for MMDetection 3.x',
    long_description=(HERE / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.9',
    py_modules=['mmdet_odconv_command'],
    entry_points=dict(console_scripts=['mmdet_odconv = mmdet_odconv_command:main']),
    packages=find_packages(include=['mmdet_odconv', 'mmdet_odconv.*']),
    include_package_data=True,
    install_requires=requirements('runtime'),
    extras_require={name: requirements(name)
                    for name in ('quickstart', 'tests', 'imagenet', 'deploy', 'docs')},
    cmdclass={'editable_wheel': EditableWheel},
    zip_safe=False,
)
