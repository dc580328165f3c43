"""A config for one's own data: renamed digits, in COCO's format and Pascal VOC's."""
import json
import os
import shutil

import digits
import pytest
import torch
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.runner import Runner

from mmdet_odconv import InputError
from mmdet_odconv.checkpoints.swapping import build_model, dynamic_config, locate_config
from mmdet_odconv.engine.data_sets import convert_voc, read_split, use_data
from mmdet_odconv.engine.new_config import new_config
from mmdet_odconv.names import find_config

NAMES = [f'kind-{i}' for i in range(10)]


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Digits under other names, and a class that nothing is of."""
    root = tmp_path_factory.mktemp('own')
    digits.make(root)
    folder = root / 'data/digits'
    for path in (folder / 'annotations').glob('*.json'):
        content = json.loads(path.read_text())
        for category in content['categories']:
            category['name'] = f'kind-{category["name"]}'
        content['categories'].append(dict(id=99, name='nothing'))
        path.write_text(json.dumps(content))
    return folder


@pytest.fixture
def mend(data, tmp_path):
    """A copy of the data whose annotations a test may change."""
    folder = shutil.copytree(data, tmp_path / 'data')

    def change(split, function):
        path = folder / f'annotations/{split}.json'
        content = json.loads(path.read_text())
        function(content)
        path.write_text(json.dumps(content))
        return folder

    return change


def test_the_command_says_what_is_in_the_data_and_what_comes_next(data, tmp_path):
    args = ('new_config.py', '--data', data, '--base', digits.CONFIG, '--weights', 'none', '--out',
            'my.py')
    said = digits.tool(tmp_path, *args).stdout
    assert 'train: 4 images' in said and ' classes, with boxes to learn from: ' in said
    assert said.rstrip().endswith('mmdet_odconv train my.py')
    again = digits.tool(tmp_path, *args, check=False)
    assert again.returncode == 1 and again.stderr.splitlines()[-1].startswith('error: my.py')


def test_the_config_trains_an_iteration_and_evaluates(data, tmp_path):
    out = tmp_path / 'my.py'
    made = new_config(data, digits.CONFIG, out, weights='none')
    assert made.splits['train'].images == 4 and set(made.classes) <= set(NAMES)
    assert sum(made.splits['train'].boxes.values()) > 0
    text = '; '.join(made.warnings)
    assert 'nothing without a box in any split: left out' in text
    assert 'with fewer than 10 boxes' in text
    assert len(out.read_text().splitlines()) < 25 and len(max(
        (line for line in out.read_text().splitlines() if 'classes' not in line), key=len)) < 100
    config = Config.fromfile(out)
    assert any(hook['type'] == 'InputCheckHook' for hook in config.custom_hooks)
    config.merge_from_dict({'model.backbone.base_channels': 8, 'model.backbone.stem_channels': 8,
                            'model.neck.in_channels': [8, 16, 32, 64],
                            'train_cfg.max_epochs': 1, 'work_dir': str(tmp_path / 'run')})
    runner = Runner.from_cfg(config)
    runner.train()
    assert runner.iter == 1
    head = runner.model.roi_head.bbox_head
    assert head.num_classes == len(made.classes)
    assert all(torch.isfinite(p).all() for p in runner.model.parameters())
    assert runner.val_dataloader.dataset.metainfo['classes'] == made.classes


@pytest.mark.parametrize(('base', 'heads'), [
    ('mask-rcnn_od-r18-k4_fpn_digits.py', ('bbox_head', 'mask_head')),
    ('mmdet::cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco', ('bbox_head',)),
    ('yolox_tiny-odconv-k1_8xb8-300e_coco', ()),  # whose training data are wrapped
])
def test_every_head_gets_the_classes(data, tmp_path, base, heads):
    register_all_modules()
    made = new_config(data, base, tmp_path / 'my.py', 'torchvision://resnet50')
    config = Config.fromfile(tmp_path / 'my.py')
    n, part = len(made.classes), config.model
    part = [part.roi_head[name] for name in heads] or [part.bbox_head]
    for head in part:
        for one in head if isinstance(head, list) else [head]:
            assert one.num_classes == n
    init_cfg = config.model.backbone.init_cfg
    assert init_cfg.checkpoint == 'torchvision://resnet50' and '_delete_' not in init_cfg
    assert init_cfg.type == ('Pretrained' if 'cascade' in base else 'StaticPretrained')
    # A bank of ODConv that static weights become starts with gates of 1, as swap_backbone has it.
    conv_cfg = config.model.backbone.get('conv_cfg') or {}
    assert conv_cfg.get('gate_scale') == (None if 'cascade' in base else 2)
    assert ('type' in conv_cfg) == ('yolox' in base)
    assert any(hook['type'] == 'InputCheckHook' for hook in config.custom_hooks)


@pytest.mark.parametrize(('base', 'kind'), [
    ('faster-rcnn_se-r50_fpn_1x_coco', 'Pretrained'),
    ('faster-rcnn_dy-r50-k4_fpn_1x_coco', 'StaticPretrained'),
    ('mask-rcnn_kw-r50_fpn_adamw-ms-1x_coco', 'StaticPretrained'),
    ('mmdet::regnet/faster-rcnn_regnetx-3.2GF_fpn_1x_coco', 'Pretrained'),
])
def test_weights_are_inflated_where_the_backbone_is_dynamic(data, tmp_path, base, kind):
    new_config(data, base, tmp_path / 'my.py', 'torchvision://resnet50')
    assert Config.fromfile(tmp_path / 'my.py').model.backbone.init_cfg.type == kind


@pytest.mark.parametrize(('base', 'norm'), [
    ('mask-rcnn_kw-r50_fpn_adamw-ms-1x_coco', dict(type='LN')),  # two images a device
    ('faster-rcnn_od-r50-k4_fpn_1x_coco', dict(type='LN')),
    ('faster-rcnn_dy-r50-k4_fpn_1x_coco', None),  # has no norm
    ('faster-rcnn_od-r18-k4_fpn_digits', dict(type='LN'))])  # four
def test_attention_from_scratch_has_no_batchnorm_of_few_images(data, tmp_path, base, norm):
    new_config(data, base, tmp_path / 'my.py', 'none')
    backbone = Config.fromfile(tmp_path / 'my.py').model.backbone
    assert (backbone.get('conv_cfg') or {}).get('norm_cfg') == norm
    if norm:
        with torch.device('meta'):
            model = build_model(Config.fromfile(tmp_path / 'my.py'))
        assert not any('attention' in n and 'running_mean' in n for n in model.state_dict())


def test_what_a_backbone_does_by_default_does_not_hold_back_training_from_scratch(data, tmp_path):
    """Darknet evaluates its norms, and ResNet freezes nothing, where the config says neither."""
    new_config(data, 'mmdet::yolo/yolov3_d53_8xb8-320-273e_coco', tmp_path / 'my.py', 'none')
    backbone = Config.fromfile(tmp_path / 'my.py').model.backbone
    assert backbone.norm_eval is False and 'frozen_stages' not in backbone
    assert not build_model(Config.fromfile(tmp_path / 'my.py')).backbone.norm_eval


def test_stages_that_are_counted_from_1_are_none_at_0(data, tmp_path):
    new_config(data, 'mmdet::efficientnet/retinanet_effb3_fpn_8xb4-crop896-1x_coco',
               tmp_path / 'my.py', 'none')
    config = Config.fromfile(tmp_path / 'my.py')
    assert config.model.backbone.get('frozen_stages', 0) == 0
    build_model(config)


def test_a_model_without_a_backbone_takes_no_weights(data, tmp_path):
    with pytest.raises(InputError, match='has no backbone of its own to start from weights'):
        new_config(data, 'mmdet::misc/d2_faster-rcnn_r50-caffe_fpn_ms-90k_coco',
                   tmp_path / 'my.py', 'none')
    assert not (tmp_path / 'my.py').exists()


def test_a_base_of_another_data_set(data, tmp_path):
    """Whose arguments CocoDataset does not take."""
    base = 'mmdet::openimages/faster-rcnn_r50_fpn_32xb2-1x_openimages'
    new_config(data, base, tmp_path / 'my.py')
    config = Config.fromfile(tmp_path / 'my.py')
    found = config.train_dataloader.dataset
    assert found.type == 'CocoDataset' and 'label_file' not in found
    base = Config.fromfile(locate_config(base)[0])
    assert found.pipeline == base.train_dataloader.dataset.pipeline
    assert config.val_dataloader.dataset.test_mode


@pytest.mark.parametrize(('weights', 'norm'), [
    (None, dict(type='LN')), ('torchvision://resnet18', dict(type='LN'))])
def test_an_attention_that_is_not_loaded_has_no_batchnorm_of_few_images(data, tmp_path, weights,
                                                                        norm):
    for base, found in (('faster-rcnn_od-r18-k4_fpn_digits', norm),
                        ('mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco', None),
                        ('faster-rcnn_od-r50-k4_fpn_1x_coco', None)):  # whose norms do not train
        new_config(data, base, tmp_path / 'my.py', weights, force=True)
        backbone = Config.fromfile(tmp_path / 'my.py').model.backbone
        assert (backbone.get('conv_cfg') or {}).get('norm_cfg') == found


@pytest.mark.parametrize(('base', 'attention', 'kind', 'gate_scale'), [
    ('faster-rcnn_od-r50-k4_fpn_1x_coco', None, 'StaticPretrained', 2),
    ('faster-rcnn_od-r50-k4_fpn_1x_coco', 'layer1.0.conv1.attention.fc.weight', 'Pretrained', None),
    ('faster-rcnn_fd-r50_fpn_1x_coco', 'layer1.0.conv1.KSM_Global.fc.weight', 'Pretrained', None),
    ('mmdet::regnet/faster-rcnn_regnetx-3.2GF_fpn_1x_coco', None, 'Pretrained', None)])
def test_a_classifiers_file_is_inflated_if_it_is_static(data, tmp_path, base, attention, kind,
                                                        gate_scale):
    state = {'conv1.weight': torch.zeros(64, 3, 7, 7), 'layer1.0.conv1.weight': torch.zeros(1)}
    if attention:
        state[attention] = torch.zeros(1)
    file = str(tmp_path / 'classifier.pth')
    torch.save(state, file)
    new_config(data, base, tmp_path / 'my.py', file)
    backbone = Config.fromfile(tmp_path / 'my.py').model.backbone
    assert backbone.init_cfg == dict(type=kind, checkpoint=file)
    assert (backbone.get('conv_cfg') or {}).get('gate_scale') == gate_scale


@pytest.mark.parametrize(('base', 'kind'), [
    ('faster-rcnn_od-r50-k4_fpn_1x_coco', 'StaticPretrained'),
    ('mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco', 'Pretrained')])
def test_a_classifiers_file_of_mmpretrains_names(data, tmp_path, base, kind):
    file = str(tmp_path / 'classifier.pth')
    torch.save({'state_dict': {'backbone.conv1.weight': torch.zeros(64, 3, 7, 7),
                               'head.fc.weight': torch.zeros(10, 2048)}}, file)
    new_config(data, base, tmp_path / 'my.py', file)
    config = Config.fromfile(tmp_path / 'my.py')
    assert config.model.backbone.init_cfg == dict(type=kind, checkpoint=file, prefix='backbone.')
    assert config.get('load_from') is None


@pytest.mark.parametrize('base', ['deformable-detr_od-r50-k4_16xb2-50e_coco',
                                  'mmdet::detr/detr_r50_8xb2-150e_coco'])
def test_norms_that_the_base_freezes_train_from_scratch(data, tmp_path, base):
    new_config(data, base, tmp_path / 'my.py', 'none')
    backbone = Config.fromfile(tmp_path / 'my.py').model.backbone
    assert backbone.norm_cfg == dict(type='BN', requires_grad=True)


def test_a_static_detector_in_a_dynamic_one_is_refused(data, tmp_path):
    file = str(tmp_path / 'detector.pth')
    torch.save({'backbone.conv1.weight': torch.zeros(64, 3, 7, 7)}, file)
    with pytest.raises(InputError, match=r'detector\.pth is of a static detector, .* swap-back'):
        new_config(data, digits.CONFIG, tmp_path / 'my.py', file)
    new_config(data, 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco', tmp_path / 'my.py', file)
    assert Config.fromfile(tmp_path / 'my.py').load_from == file


def test_evaluators_in_a_list_and_repeated_data(data, tmp_path):
    base = 'mmdet::cityscapes/mask-rcnn_r50_fpn_1x_cityscapes'
    made = new_config(data, base, tmp_path / 'my.py', 'none')
    config = Config.fromfile(tmp_path / 'my.py')
    assert Config.fromfile(locate_config(base)[0]).load_from and config.load_from is None
    backbone = config.model.backbone
    assert (backbone.init_cfg, backbone.frozen_stages, backbone.norm_eval) == (None, -1, False)
    new_config(data, base, tmp_path / 'weights.py', 'torchvision://resnet50')
    assert Config.fromfile(tmp_path / 'weights.py').load_from is None
    evaluator = config.val_evaluator
    assert evaluator.type == 'CocoMetric' and evaluator.metric == ['bbox', 'segm']
    train = made.splits['train']
    iterations = 8 * 8 * (train.images - train.empty)
    assert f'8 epochs are {iterations} iterations of 1 images' in '; '.join(made.warnings)


def test_a_base_that_imports_one_module_by_its_name(data, tmp_path):
    base = tmp_path / 'base.py'
    base.write_text("_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'\n"
                    "custom_imports = dict(imports='colorsys')\n")
    new_config(data, str(base), tmp_path / 'my.py')
    swapped = dynamic_config(Config.fromfile(base), str(base), {}, None)
    for config in (Config.fromfile(tmp_path / 'my.py'), Config.fromstring(swapped, '.py')):
        assert config.custom_imports.imports == ['colorsys', 'mmdet_odconv']


def test_a_pascal_voc_folder(data, tmp_path):
    from PIL import Image
    root = tmp_path / 'voc'
    for folder in ('JPEGImages', 'Annotations', 'ImageSets/Main'):
        (root / folder).mkdir(parents=True)
    for name in 'ab':
        Image.new('RGB', (64, 48)).save(root / f'JPEGImages/{name}.jpg')
        (root / f'Annotations/{name}.xml').write_text(
            '<annotation><filename>x.png</filename><size><width>64</width><height>48</height>'
            '<depth>3</depth></size><object><name>cat</name><difficult>0</difficult><bndbox>'
            '<xmin>1</xmin><ymin>11</ymin><xmax>20</xmax><ymax>40</ymax></bndbox></object>'
            '<object><name>dog</name><difficult>1</difficult><bndbox><xmin>2</xmin><ymin>2</ymin>'
            '<xmax>9</xmax><ymax>9</ymax></bndbox></object></annotation>')
    (root / 'ImageSets/Main/train.txt').write_text('a\n \n')
    (root / 'ImageSets/Main/val.txt').write_text('b  1\n')
    made = new_config(root, digits.CONFIG, tmp_path / 'my.py')
    assert [path.name for path in made.written] == ['voc_train.json', 'voc_val.json']
    assert made.splits['train'].boxes == {'cat': 1, 'dog': 0}  # one that is difficult
    annotation = json.loads(made.written[0].read_text())['annotations'][0]
    assert annotation['bbox'] == [0, 10, 20, 30] and annotation['area'] == 600
    assert annotation['id'] == 1  # pycocotools takes a match with 0 for none
    again = new_config(root, str(tmp_path / 'my.py'), tmp_path / 'again.py', 'none')
    assert not again.written
    text = (tmp_path / 'again.py').read_text()  # the base has as many classes already
    assert "_base_ = 'my.py'" in text and 'num_classes' not in text
    assert Config.fromfile(tmp_path / 'again.py').model.roi_head.bbox_head.num_classes == 1
    assert not any('in both' in warning for warning in made.warnings)
    (root / 'ImageSets/Main/val.txt').write_text('b\na\n')
    warnings = new_config(root, digits.CONFIG, tmp_path / 'my.py', force=True).warnings
    assert any(warning.startswith('1 images are in both train and val (the first: a.jpg)')
               for warning in warnings), warnings


@pytest.fixture
def voc(tmp_path):
    """Annotations and lists, which convert_voc reads; it never looks into an image."""
    for folder in ('JPEGImages', 'Annotations', 'ImageSets/Main'):
        (tmp_path / folder).mkdir(parents=True)
    for split, name in (('train', 'a cat 1'), ('val', 'b')):
        (tmp_path / f'ImageSets/Main/{split}.txt').write_text(name)
        (tmp_path / f'Annotations/{name}.xml').write_text(voc_annotation('cat'))
    return tmp_path


def voc_annotation(kind):
    return ('<annotation><size><width>64</width><height>48</height></size><object>'
            f'<name>{kind}</name><bndbox><xmin>1</xmin><ymin>11</ymin><xmax>20</xmax>'
            '<ymax>40</ymax></bndbox></object></annotation>')


def test_pascal_voc_annotations_that_changed_are_read_again(voc):
    written = convert_voc(voc)
    image, = json.loads(written[0].read_text())['images']
    assert image['file_name'] == 'a cat 1.jpg'  # not a flag, as 'a cat 1.xml' is there
    for path in written:  # later than anything else, however coarse the clock
        os.utime(path, ns=(2**62, 2**62))
    assert convert_voc(voc) == []
    (voc / 'Annotations/b.xml').write_text(voc_annotation('dog'))
    for changed in ('ImageSets/Main/val.txt', 'Annotations/b.xml'):
        os.utime(voc / changed, ns=(2**62, 2**62))
        assert convert_voc(voc) == written, changed
        os.utime(voc / changed, (1, 1))
    assert list(read_split(written[1]).boxes.items()) == [('cat', 0), ('dog', 1)]


def test_images_that_come_after_their_annotations_are_found(voc):
    written = convert_voc(voc)
    for path in written:
        os.utime(path, ns=(2**61, 2**61))
    (voc / 'JPEGImages/b.png').touch()
    os.utime(voc / 'JPEGImages', ns=(2**62, 2**62))
    assert convert_voc(voc) == written
    assert json.loads(written[1].read_text())['images'][0]['file_name'] == 'b.png'


def test_what_other_tools_write_into_pascal_voc_annotations(voc):
    (voc / 'Annotations/b.xml').write_text(voc_annotation(' cat\n').replace('64', '64.0').replace(
        '<bndbox>', '<difficult>Unspecified</difficult><bndbox>'))
    content = json.loads(convert_voc(voc)[1].read_text())
    assert [category['name'] for category in content['categories']] == ['cat']
    assert content['images'][0]['width'] == 64 and content['annotations'][0]['iscrowd'] == 0


@pytest.mark.parametrize(('images', 'said', 'expected'), [
    (['b.jpg', 'a.jpg'], 'a.jpg', 'b.jpg'),  # an augmented copy, which keeps the name of the first
    (['b.png'], 'b', 'b.png'),
    (['b.JPG'], '', 'b.JPG'),
    (['b.png', 'b.jpg'], 'b.png', 'b.png'),
    (['000001.jpg'], '000001.jpg', '000001.jpg'),
    ([], 'a.jpg', 'b.jpg')])
def test_the_image_of_a_pascal_voc_annotation(voc, images, said, expected):
    for image in images:
        (voc / 'JPEGImages' / image).touch()
    (voc / 'Annotations/b.xml').write_text(voc_annotation('cat').replace(
        '<size>', f'<filename>{said}</filename><size>'))
    image, = json.loads(convert_voc(voc)[1].read_text())['images']
    assert image['file_name'] == expected


def test_pascal_voc_lists_of_other_encodings_and_a_place_that_cannot_be_written(voc):
    (voc / 'ImageSets/Main/val.txt').write_text('b', encoding='utf-8-sig')
    convert_voc(voc)
    (voc / 'ImageSets/Main/val.txt').write_text('Ä', encoding='latin-1')
    with pytest.raises(InputError, match=r'val\.txt is no text in UTF-8 .*: save it as that\.'):
        convert_voc(voc)
    (voc / 'ImageSets/Main/val.txt').write_text('b')
    shutil.rmtree(voc / 'annotations')
    (voc / 'annotations').touch()
    with pytest.raises(InputError, match='annotations, where .* cannot be made .*: make .* writ'):
        convert_voc(voc)


@pytest.mark.parametrize(('file', 'text', 'message'), [
    ('Annotations/b.xml', '<annotation>', r'b\.xml could not be read as a Pascal VOC annotation'),
    ('Annotations/b.xml', voc_annotation(''), r'b\.xml could not be read .*an object has no name'),
    ('Annotations/b.xml', voc_annotation('cat').replace('size>', 'sizes>'),
     r'b\.xml could not be read .*it has no size/width'),
    ('Annotations/b.xml', voc_annotation('cat').replace('64', '0'), 'its size is 0 x 48'),
    ('Annotations/b.xml', voc_annotation('cat').replace('20', 'nan'), 'its bndbox/xmax is nan'),
    ('ImageSets/Main/val.txt', 'c 1', r'/c\.xml could not be read'),
    ('ImageSets/Main/val.txt', None, r'Main/val\.txt does not exist, where a Pascal VOC folder'),
])
def test_pascal_voc_folders_that_are_refused(voc, tmp_path, file, text, message):
    (voc / file).unlink()
    if text is not None:
        (voc / file).write_text(text)
    with pytest.raises(InputError, match=message):
        new_config(voc, digits.CONFIG, tmp_path / 'my.py')


def test_a_base_in_another_place(data, tmp_path):
    (tmp_path / 'real/deep').mkdir(parents=True)
    (tmp_path / 'link').symlink_to(tmp_path / 'real/deep')
    base = tmp_path / 'base.py'
    text = f'_base_ = {str(find_config(digits.CONFIG))!r}\n'
    base.write_text(text)
    new_config(data, str(base), tmp_path / 'link/my.py', 'none')
    assert Config.fromfile(tmp_path / 'link/my.py').model.backbone.init_cfg is None
    with pytest.raises(InputError, match=r'base\.py is the base itself: give another name'):
        new_config(data, str(base), base, 'none', force=True)
    assert base.read_text() == text


def test_data_without_a_box(mend, tmp_path):
    for split in ('train', 'val'):
        folder = mend(split, lambda content: content.update(annotations=[]))
    with pytest.raises(InputError, match=r'train\.json has \d+ categories, and no split a box'):
        new_config(folder, digits.CONFIG, tmp_path / 'my.py')


def test_what_is_refused_writes_nothing(mend, data, tmp_path):
    out = tmp_path / 'my.py'

    def refused(message, folder=data, base=digits.CONFIG, **kwargs):
        with pytest.raises(InputError, match=message):
            new_config(folder, base, out, **kwargs)
        assert not out.exists()

    refused('no directory', tmp_path / 'nowhere')
    refused('did you mean faster-rcnn_od-r18', base='faster-rcnn_od-r18-k5_fpn_digits.py')
    refused('does not exist', weights='nosuch.pth')
    refused('has none of annotations/train.json', tmp_path)
    (tmp_path / 'base.py').write_text('from mmdet.models import FasterRCNN\n'
                                      'model = dict(type=FasterRCNN)\n')
    refused('pure Python configs, from which', base=str(tmp_path / 'base.py'))
    (tmp_path / 'base.py').write_text(f'_base_ = {str(find_config(digits.CONFIG))!r}\n'
                                      'val_dataloader = val_evaluator = val_cfg = None\n')
    refused('has no val_dataloader: give', base=str(tmp_path / 'base.py'))
    with pytest.raises(InputError, match=r'my is no name of a config: .* such as .*my\.py'):
        new_config(data, digits.CONFIG, tmp_path / 'my')
    folder = mend('train', lambda content: content['annotations'][0].update(bbox=[0, 0, 1]))
    refused('could not be read as COCO|four finite numbers', folder)
    folder = mend('train', lambda content: content.pop('categories'))
    refused(r'train\.json could not be read as COCO \(KeyError', folder)


def test_splits_that_disagree_or_share_images(mend, tmp_path):
    folder = mend('val', lambda content: None)
    image = next((folder / 'train').iterdir())
    shutil.copy(image, folder / 'val')
    made = new_config(folder, digits.CONFIG, tmp_path / 'my.py')
    assert any('1 images are in both train and val' in warning for warning in made.warnings)
    folder = mend('val', lambda content: content['categories'][0].update(name='other'))
    with pytest.raises(InputError, match='The categories of val .* are not those of train'):
        new_config(folder, digits.CONFIG, tmp_path / 'my2.py')


def test_categories_in_another_order(mend, tmp_path):
    """By which MMDetection numbers them: a perfect detector would have an mAP of 0."""
    # A category without a box is left out, wherever it is.
    folder = mend('val', lambda content: content['categories'].insert(
        0, content['categories'].pop()))
    new_config(folder, digits.CONFIG, tmp_path / 'my.py')
    mend('val', lambda content: content['categories'].reverse())
    message = 'The categories of val .* in their order: give all splits the same'
    with pytest.raises(InputError, match=message):
        new_config(folder, digits.CONFIG, tmp_path / 'my2.py')
    with pytest.raises(InputError, match=message):
        use_data(Config.fromfile(find_config(digits.CONFIG)), folder)


@pytest.mark.parametrize('split', ['train', 'val'])
def test_masks_that_are_not_there(mend, tmp_path, split):
    """One is enough: training ends where it comes to it, and evaluation after an epoch."""
    folder = mend(split, lambda content: content['annotations'][1].update(segmentation=[]))
    with pytest.raises(InputError, match=rf'{split}\.json cannot .*: 1 of .* no segmentation'):
        new_config(folder, 'mask-rcnn_od-r18-k4_fpn_digits.py', tmp_path / 'my.py')
