"""Differences paired by seed, and data sets as they are laid out."""
import json
import math

import pytest
from mmengine.config import Config
from records import record

from mmdet_odconv import InputError
from mmdet_odconv.engine.comparison import (
    affordable,
    check_one_comparison,
    equal_budget,
    paired_difference,
    summarise,
)
from mmdet_odconv.engine.data_sets import find_splits


def test_differences_are_paired_and_have_students_interval():
    # Sleep gained with one drug over another, Student 1908: mean 1.58, interval 0.70 to 2.46.
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    mean, half, n = paired_difference(dict(enumerate(second)), dict(reversed([*enumerate(first)])))
    assert (mean, n) == (pytest.approx(1.58), 10)
    assert (mean - half, mean + half) == pytest.approx((0.70, 2.46), abs=0.005)


def test_only_seeds_of_both_count():
    mean, half, n = paired_difference({0: 0.5, 1: 0.7}, {1: 0.6, 2: 0.9})
    assert (mean, n) == (pytest.approx(0.1), 1) and math.isnan(half)
    assert paired_difference({0: 0.5}, {1: 0.5}) is None


@pytest.mark.parametrize(('seconds', 'ends', 'expected'), [
    (2.0, [], None),  # not asked for, or failed and so without a record
    (2.0, [dict(error='killed')], None),
    (2.0, [dict(map=0.4)], -0.1),
    (1.0, [], 0.2)])  # as cheap as the first: the same
def test_equal_time_is_told_where_it_is_known(seconds, ends, expected):
    runs = [record('static', 0), record('dynamic', 0, score=0.7, seconds=seconds)]
    runs += [{**record('dynamic', 0, 375, 'time'), **end} for end in ends]
    row = summarise(runs)[1]
    assert row['difference'][0] == pytest.approx(0.2)
    found = row['at_equal_time']
    assert found is None if expected is None else found[0] == pytest.approx(expected)
    runs[1]['seconds'] = 1.02  # which nineteen twentieths pay for; a hundredth more is the same
    assert affordable({0: runs[1]}, {0: runs[0]}) == 712
    runs[1]['seconds'] = 1.008
    assert affordable({0: runs[1]}, {0: runs[0]}) == 750
    runs[1]['seconds'] = 4.18  # which 4.78 twentieths pay for
    assert affordable({0: runs[1]}, {0: runs[0]}) == 150
    greater = {**runs[1], 'seconds': 2.0}  # of a seed that is given first, and changes nothing
    assert affordable({1: greater, 0: runs[1]}, {1: runs[0], 0: runs[0]}) == 150
    for key in ('cpu', 'threads', 'torch'):
        unknown = [{**run, key: 'unknown'} for run in runs]
        assert affordable({0: unknown[1]}, {0: unknown[0]}) is None
    runs[0]['threads'] = 2  # as the first config, alone, was run at first
    assert affordable({0: runs[1]}, {0: runs[0]}) is None


def test_one_comparison_is_of_one_budget(tmp_path):
    # At equal time there are fewer iterations, and as many for all seeds of a config.
    runs = [record('static', 0), record('dynamic', 0, 600, 'time')]
    check_one_comparison(runs, tmp_path)
    with pytest.raises(InputError, match=r'iterations at equal time of dynamic \(525, 600\)'):
        check_one_comparison([*runs, record('dynamic', 1, 525, 'time')], tmp_path)
    with pytest.raises(InputError, match='2 records of static with seed 0 at equal iterations'):
        check_one_comparison([*runs, record('static', 0)], tmp_path)


@pytest.mark.parametrize(('given', 'iterations', 'expected'), [
    (dict(interval=50), 3, 3), (dict(interval=50), 100, 50), ({}, 3, 3), ({}, 100, 10)])
def test_the_shortest_budget_is_logged_once(given, iterations, expected):
    config = Config(dict(log_processor={}, default_hooks=dict(logger=given, checkpoint={})))
    equal_budget(config, iterations, seed=0)
    assert config.default_hooks.logger.interval == expected


@pytest.mark.parametrize(('iterations', 'evaluations', 'at'), [
    (750, 3, [250, 500, 750]), (500, 3, [167, 334, 500]), (2, 5, [1, 2])])
def test_a_curve_has_as_many_points_as_asked_for(iterations, evaluations, at):
    config = Config(dict(log_processor={}, default_hooks=dict(logger={}, checkpoint={})))
    interval = equal_budget(config, iterations, 0, evaluations).train_cfg.val_interval
    assert [i for i in range(1, iterations + 1) if i % interval == 0 or i == iterations] == at


def test_attention_is_annealed_over_a_third_of_the_iterations():
    hooks = [dict(type=kind, end_epoch=9) for kind in (
        'TemperatureAnnealingHook', 'WarehouseWarmUpHook', 'InputCheckHook')]
    config = Config(dict(log_processor={}, default_hooks=dict(logger={}, checkpoint={}),
                         custom_hooks=hooks))
    equal_budget(config, 750, seed=0)
    assert [hook.get('end_iter') for hook in config.custom_hooks] == [250, 250, None]


@pytest.mark.parametrize(('names', 'expected'), [
    (['annotations/train.json', 'annotations/val.json', 'annotations/test.json'],
     ['train/', 'val/', 'test/']),
    (['annotations/instances_train2017.json', 'annotations/instances_val2017.json'],
     ['train2017/', 'val2017/']),
    (['train/_annotations.coco.json', 'valid/_annotations.coco.json'], ['train/', 'valid/'])])
def test_layouts_of_coco_directories(tmp_path, names, expected):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({}))
    splits = find_splits(tmp_path)
    assert [annotations for annotations, _ in splits.values()] == names
    assert [images for _, images in splits.values()] == expected
    (tmp_path / names[1]).unlink()
    with pytest.raises(InputError, match='has none of .*val.* give a directory in COCO format'):
        find_splits(tmp_path)
