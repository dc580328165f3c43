"""Tests of tools/dataset_converters/digits.py: what it writes, and what it refuses to touch."""

import errno
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip('sklearn')
pytest.importorskip('PIL')
cv2 = pytest.importorskip('cv2')
COCO = pytest.importorskip('pycocotools.coco').COCO
pytest.importorskip('rich')

SCRIPT = Path(__file__).parents[2] / 'tools/dataset_converters/digits.py'
SMALL = ('--train', '6', '--val', '3', '--size', '96')
SPLIT_SIZES = {'train': 6, 'val': 3}


@pytest.fixture(scope='module')
def digits():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location('digits_converter', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def dataset(digits, tmp_path_factory):
    """A dataset that no test may change."""
    out_dir = tmp_path_factory.mktemp('digits') / 'dataset'
    digits.main([str(out_dir), *SMALL])
    return out_dir


@pytest.fixture(params=SPLIT_SIZES)
def split(request):
    return request.param


def load_json(out_dir, split):
    return json.loads((out_dir / 'annotations' / f'{split}.json').read_text())


def snapshot(folder):
    """Path to (bytes, mtime in ns) of every file below ``folder``."""
    return {
        path.relative_to(folder): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob('*'))
        if path.is_file()
    }


def contents(folder):
    """Path to bytes of every file below ``folder``."""
    return {path: data for path, (data, _) in snapshot(folder).items()}


def refusal(digits, *argv):
    """Run the script, expecting it to exit with status 1 and one sentence; return the sentence."""
    with pytest.raises(SystemExit) as exit_info:
        digits.main([str(arg) for arg in argv])
    sentence = exit_info.value.code
    assert isinstance(sentence, str)
    assert '\n' not in sentence
    assert sentence.endswith('.')
    return sentence


def test_loads_as_coco(dataset, split):
    coco = COCO(str(dataset / 'annotations' / f'{split}.json'))
    assert len(coco.imgs) == SPLIT_SIZES[split]
    assert [(cat['id'], cat['name']) for cat in coco.loadCats(coco.getCatIds())] == [
        (number + 1, str(number)) for number in range(10)
    ]
    for image_id, image in coco.imgs.items():
        pixels = cv2.imread(str(dataset / split / image['file_name']))
        assert pixels.shape == (image['height'], image['width'], 3) == (96, 96, 3)
        assert 1 <= len(coco.imgToAnns[image_id]) <= 8
    assert len(coco.anns) == len(coco.dataset['annotations'])
    assert 0 not in coco.anns
    assert coco.dataset['info']['seed'] == 0
    assert 'digits.py' in coco.dataset['info']['made_by']


def test_box_and_area_are_those_of_the_mask(dataset, split):
    coco = COCO(str(dataset / 'annotations' / f'{split}.json'))
    for annotation in coco.anns.values():
        mask = coco.annToMask(annotation)
        assert mask.shape == (96, 96)
        rows, columns = np.nonzero(mask)
        left, top = columns.min(), rows.min()
        box = [left, top, columns.max() + 1 - left, rows.max() + 1 - top]
        assert annotation['bbox'] == box
        assert annotation['area'] == mask.sum() > 0
        assert annotation['iscrowd'] == 0


def test_masks_of_an_image_are_disjoint(dataset, split):
    coco = COCO(str(dataset / 'annotations' / f'{split}.json'))
    for annotations in coco.imgToAnns.values():
        assert np.sum([coco.annToMask(one) for one in annotations], axis=0).max() == 1


def test_masks_lie_on_the_visible_ink(digits):
    ink, labels, photos = digits.load_sources()
    pool = np.arange(len(labels))
    for seed in range(5):
        background = digits.crop_background(photos, 192, np.random.default_rng(seed))
        image, found = digits.compose_image(ink, pool, photos, 192, np.random.default_rng(seed))
        change = np.abs(image - background).mean(axis=-1)
        union = np.zeros((192, 192), np.uint8)
        for _, mask, _ in found:
            assert change[mask > 0].mean() > 40
            union |= mask
        fringe = cv2.dilate(union, np.ones((9, 9), np.uint8))
        assert change[fringe == 0].max() < 1


def test_a_hard_image_has_smaller_digits_among_strokes_of_no_class(digits):
    ink, labels, photos = digits.load_sources()
    pool = np.arange(len(labels))
    for seed in range(5):
        background = digits.crop_background(photos, 192, np.random.default_rng(seed))
        image, found = digits.compose_image(ink, pool, photos, 192, np.random.default_rng(seed),
                                            hard=True)
        change = np.abs(image - background).mean(axis=-1)
        assert 6 <= len(found) <= 16
        union = np.zeros((192, 192), np.uint8)
        for _, mask, _ in found:
            assert change[mask > 0].mean() > 40
            assert max(cv2.boundingRect(mask)[2:]) <= 192 // 6
            assert not (union & mask).any()
            union |= mask
        fringe = cv2.dilate(union, np.ones((9, 9), np.uint8))
        strokes, _ = cv2.connectedComponents((change * (fringe == 0) > 20).astype(np.uint8))
        assert strokes > digits.STROKES // 2


def test_a_hard_dataset_is_told_from_a_plain_one(digits, dataset, tmp_path):
    digits.main([str(tmp_path / 'hard'), *SMALL, '--hard'])
    hard = load_json(tmp_path / 'hard', 'train')
    assert hard['images'] == load_json(dataset, 'train')['images']
    assert max(max(one['bbox'][2:]) for one in hard['annotations']) <= 96 // 6
    assert '--seed 0 --hard, where --train 6' in refusal(digits, tmp_path / 'hard', *SMALL)


@pytest.mark.parametrize('degrees', [-45, -20, 0, 31, 45])
def test_corners_are_where_turning_puts_them(digits, degrees):
    alpha = np.zeros((23, 14), np.float32)
    for y, x in ((0, 0), (0, 13), (22, 13), (22, 0)):
        alpha[:] = 0
        alpha[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2] = 1  # 2x2 pixels in that corner
        turned, corners = digits.turn(alpha, degrees)
        assert turned.sum() == pytest.approx(4, abs=1.5)  # nothing is cut off, but at its edge
        weights = np.stack(np.meshgrid(*map(np.arange, turned.shape[::-1])), -1) * turned[..., None]
        centre = weights.sum((0, 1)) / turned.sum()
        nearest = np.linalg.norm(corners - centre, axis=1).argmin()
        assert nearest == [(0, 0), (0, 13), (22, 13), (22, 0)].index((y, x))
        assert np.linalg.norm(corners[nearest] - centre) < 1.2
    sides = np.linalg.norm(corners - np.roll(corners, -1, axis=0), axis=1)
    assert sides == pytest.approx([13, 22, 13, 22])  # rigid
    assert (corners >= 0).all() and (corners <= np.array(turned.shape[::-1]) - 1).all()
    across = corners[1] - corners[0]
    assert np.degrees(np.arctan2(-across[1], across[0])) == pytest.approx(degrees)


def test_a_keypoint_dataset_loads_as_coco(digits, tmp_path):
    digits.main([str(tmp_path / 'corners'), *SMALL, '--keypoints'])
    coco = COCO(str(tmp_path / 'corners/annotations/val.json'))
    category, = coco.loadCats(coco.getCatIds())
    assert category['keypoints'] == list(digits.CORNERS)
    for annotation in coco.anns.values():
        points = np.reshape(annotation['keypoints'], (4, 3))
        assert annotation['num_keypoints'] == 4 and (points[:, 2] == 2).all()
        assert (points[:, :2] >= 0).all() and (points[:, :2] <= 95).all()
        left, top, width, height = annotation['bbox']
        assert points[:, :2].min(0) == pytest.approx([left, top])
        assert points[:, :2].max(0) == pytest.approx([left + width - 1, top + height - 1])
        rows, columns = np.nonzero(coco.annToMask(annotation))
        assert left - 1 <= columns.min() and columns.max() <= left + width
        assert top - 1 <= rows.min() and rows.max() <= top + height


@pytest.mark.parametrize('side', [8, 9, 24, 64])
def test_every_source_digit_stays_visible(digits, side):
    ink, _, _ = digits.load_sources()
    for one in ink:
        alpha = digits.upscale_ink(one, side)
        assert max(alpha.shape) <= side
        assert (alpha > 0.5).sum() >= 5


def test_same_options_give_the_same_bytes(digits, dataset, tmp_path):
    digits.main([str(tmp_path / 'again'), *SMALL])
    assert contents(tmp_path / 'again') == contents(dataset)


def test_seed_changes_every_image(digits, dataset, tmp_path):
    digits.main([str(tmp_path / 'other'), *SMALL, '--seed', '1'])
    images = [path.read_bytes() for path in dataset.rglob('*.jpg')]
    images += [path.read_bytes() for path in tmp_path.rglob('*.jpg')]
    assert len(set(images)) == len(images) == 2 * 9


def test_train_and_val_use_disjoint_source_digits(digits, dataset):
    _, labels, _ = digits.load_sources()
    pools = {name: set(pool.tolist()) for name, pool in digits.split_digits(labels).items()}
    assert not pools['train'] & pools['val']
    assert pools['train'] | pools['val'] == set(range(1797))
    for name, pool in pools.items():
        assert set(labels[list(pool)]) == set(range(10))
        for annotation in load_json(dataset, name)['annotations']:
            assert annotation['source_digit'] in pool
            assert annotation['category_id'] == labels[annotation['source_digit']] + 1


def test_a_test_split_has_source_digits_of_its_own(digits, dataset, tmp_path):
    digits.main([str(tmp_path / 'three'), *SMALL, '--test', '4'])
    assert contents(tmp_path / 'three/train') == contents(dataset / 'train')
    _, labels, _ = digits.load_sources()
    pools = {name: set(pool.tolist()) for name, pool in digits.split_digits(labels, True).items()}
    assert sum(map(len, pools.values())) == 1797 and set.union(*pools.values()) == set(range(1797))
    for name, pool in pools.items():
        annotations = load_json(tmp_path / 'three', name)['annotations']
        assert {annotation['source_digit'] for annotation in annotations} <= pool
    assert len(list((tmp_path / 'three/test').glob('*.jpg'))) == 4


def test_more_images_leave_the_first_ones_alone(digits, dataset, tmp_path):
    grown = tmp_path / 'grown'
    digits.main([str(grown), '--train', '8', '--val', '3', '--size', '96'])
    images = contents(grown / 'train')
    assert len(images) == 8
    assert contents(dataset / 'train').items() <= images.items()
    assert contents(grown / 'val') == contents(dataset / 'val')
    before = load_json(dataset, 'train')['annotations']
    assert load_json(grown, 'train')['annotations'][: len(before)] == before


def test_splits_do_not_repeat_backgrounds(dataset):
    for path in (dataset / 'val').iterdir():
        val, train = (cv2.imread(str(dataset / name / path.name)) for name in ('val', 'train'))
        # Digits cover less than half of an image, so the median sees the backgrounds alone.
        assert np.median(cv2.absdiff(val, train)) > 3


@pytest.mark.parametrize('name', ['notes.txt', 'digits.json', 'train/000001.jpg'])
def test_foreign_directory_is_left_untouched(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('{"mine": 1}')
    before = snapshot(tmp_path)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path), *SMALL], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert 'not a dataset of this tool' in done.stderr
    assert 'pick another OUT_DIR' in done.stderr
    assert snapshot(tmp_path) == before
    assert list(tmp_path.parent.glob(f'{tmp_path.name}.*')) == []


@pytest.mark.parametrize('text', ['not JSON', '[1]', '\xff'])
def test_unreadable_marker_is_foreign(digits, tmp_path, text):
    (tmp_path / 'digits.json').write_bytes(text.encode('latin-1'))
    assert 'not a dataset of this tool' in refusal(digits, tmp_path, *SMALL)


def test_file_in_the_place_of_the_directory_is_kept(digits, tmp_path):
    (tmp_path / 'out').write_text('mine')
    assert 'not a dataset of this tool' in refusal(digits, tmp_path / 'out', *SMALL)
    assert contents(tmp_path) == {Path('out'): b'mine'}


def test_files_that_appear_meanwhile_are_kept(digits, tmp_path, monkeypatch):
    write_jpeg = digits.write_jpeg

    def write_beside_another_program(path, image):
        (tmp_path / 'out').mkdir(exist_ok=True)
        (tmp_path / 'out' / 'notes.txt').write_text('mine')
        write_jpeg(path, image)

    monkeypatch.setattr(digits, 'write_jpeg', write_beside_another_program)
    refusal(digits, tmp_path / 'out', *SMALL)
    assert contents(tmp_path) == {Path('out/notes.txt'): b'mine'}


def test_empty_directory_is_filled(digits, dataset, tmp_path):
    digits.main([str(tmp_path), *SMALL])
    assert contents(tmp_path) == contents(dataset)


def test_missing_parent_is_made(digits, dataset, tmp_path):
    digits.main([str(tmp_path / 'data' / 'digits'), *SMALL])
    assert contents(tmp_path / 'data' / 'digits') == contents(dataset)
    assert [path.name for path in (tmp_path / 'data').iterdir()] == ['digits']


def test_same_options_reuse_the_dataset(digits, dataset, capsys):
    before = snapshot(dataset)
    digits.main([str(dataset), *SMALL])
    assert 'reused' in capsys.readouterr().out
    assert snapshot(dataset) == before


@pytest.mark.parametrize('option', ['--train', '--val', '--size', '--seed'])
def test_other_options_are_refused(digits, dataset, option):
    before = snapshot(dataset)
    sentence = refusal(digits, dataset, *SMALL, option, '77')
    assert f'{option} 77' in sentence
    assert '--train 6 --val 3 --size 96 --seed 0' in sentence
    assert snapshot(dataset) == before


@pytest.mark.parametrize(
    ('failure', 'words'),
    [
        (OSError(errno.ENOSPC, 'No space left on device'), 'No space left on device'),
        (KeyboardInterrupt(), 'Interrupted'),
    ],
)
@pytest.mark.parametrize('existing', [False, True])
def test_failure_midway_leaves_nothing(digits, tmp_path, monkeypatch, failure, words, existing):
    out_dir = tmp_path / 'out'
    if existing:
        out_dir.mkdir()
    write_bytes = Path.write_bytes

    def fail_at_the_fourth_image(path, data):
        if path.name == '000004.jpg':
            assert len(list(path.parent.iterdir())) == 3
            raise failure
        return write_bytes(path, data)

    monkeypatch.setattr(Path, 'write_bytes', fail_at_the_fourth_image)
    sentence = refusal(digits, out_dir, *SMALL)
    assert words in sentence
    if isinstance(failure, OSError):
        assert str(out_dir) in sentence
        assert 'MB' in sentence
    assert list(tmp_path.rglob('*')) == ([out_dir] if existing else [])


def test_nothing_is_visible_before_it_is_complete(digits, tmp_path, monkeypatch):
    write_jpeg, seen = digits.write_jpeg, []

    def look_and_write(path, image):
        seen.append((tmp_path / 'out').exists())
        write_jpeg(path, image)

    monkeypatch.setattr(digits, 'write_jpeg', look_and_write)
    digits.main([str(tmp_path / 'out'), *SMALL])
    assert seen == [False] * 9


def test_low_disk_space_is_refused_up_front(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(digits.shutil, 'disk_usage', lambda path: SimpleNamespace(free=10_000))
    monkeypatch.setattr(digits, 'write_dataset', lambda *args: pytest.fail('started to write'))
    sentence = refusal(digits, tmp_path / 'data' / 'out', *SMALL)
    assert 'free' in sentence
    assert 'MB' in sentence
    assert list(tmp_path.iterdir()) == []


def test_disk_estimate_covers_the_dataset_but_not_wildly(digits, dataset):
    needed = digits.estimate_bytes({'train': 6, 'val': 3, 'size': 96})
    written = sum(len(data) for data in contents(dataset).values())
    assert written < needed < 5 * written


@pytest.mark.parametrize(('module', 'package'), [('sklearn', 'scikit-learn'), ('PIL', 'Pillow')])
def test_missing_package_is_named(digits, tmp_path, monkeypatch, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    sentence = refusal(digits, tmp_path / 'out', *SMALL)
    assert package in sentence
    assert 'pip install "mmdet_odconv[quickstart]"' in sentence
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    'options', [('--train', '0'), ('--val', '0'), ('--size', '63'), ('--seed', '-1')]
)
def test_values_out_of_range_are_usage_errors(digits, tmp_path, capsys, options):
    with pytest.raises(SystemExit) as exit_info:
        digits.main([str(tmp_path / 'out'), *options])
    assert exit_info.value.code == 2
    assert f'{options[0]} must be at least' in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope='module')
def classes(digits, tmp_path_factory):
    """A classification dataset that no test may change."""
    out_dir = tmp_path_factory.mktemp('digits') / 'classes'
    digits.main([str(out_dir), *SMALL, '--classification'])
    return out_dir


def test_classification_has_a_folder_for_each_class(classes, split):
    assert sorted(path.name for path in (classes / split).iterdir()) == list('0123456789')
    images = sorted((classes / split).glob('*/*.jpg'), key=lambda path: path.name)
    assert [path.name for path in images] == [
        f'{number:06d}.jpg' for number in range(1, SPLIT_SIZES[split] + 1)
    ]
    assert all(cv2.imread(str(path)).shape == (96, 96, 3) for path in images)


def test_classification_shows_each_source_digit_once(digits, monkeypatch, tmp_path):
    ink, labels, _ = digits.load_sources()
    shown = []
    monkeypatch.setattr(digits, 'write_jpeg', lambda path, image: shown.append(image))
    for name, pool in digits.split_digits(labels).items():
        shown.clear()
        settings = {'size': 8, 'seed': 0, name: len(pool)}
        digits.write_classes(tmp_path, name, settings, (ink, labels, None))
        sources = (255 * ink[pool]).round().astype(np.uint8)
        assert sorted(image.tobytes() for image in shown) == sorted(
            image.tobytes() for image in sources
        )


def test_classification_is_told_from_detection(digits, dataset, classes, capsys):
    before = snapshot(classes)
    digits.main([str(classes), *SMALL, '--classification'])
    assert 'reused' in capsys.readouterr().out
    assert snapshot(classes) == before
    sentence = refusal(digits, classes, *SMALL)
    assert '--seed 0 --classification, where --train 6' in sentence
    refusal(digits, dataset, *SMALL, '--classification')
