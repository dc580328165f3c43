import importlib.util
import itertools
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / 'tools/analysis_tools/report.py'


@pytest.fixture(scope='module')
def report():
    spec = importlib.util.spec_from_file_location('report', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_labels_are_in_the_picture_and_do_not_collide(report):
    # One object found four times, and others at the picture's edges.
    boxes = [(40, 40, 60, 70)] * 4 + [(0, 0, 12, 20), (88, 0, 100, 20), (0, 85, 10, 100)]
    texts = ['7 0.52'] * 4 + ['1 1.00'] * 3
    labels = report.place_labels(boxes, texts, 100, 100, letter=3.5, line=8)
    assert len(labels) == len(boxes)
    for x1, y1, x2, y2 in labels:
        assert (x2 - x1, y2 - y1) == (21, 8)
        assert x1 >= 0 and y1 >= 0 and x2 <= 100 and y2 <= 100
    assert all(report.overlap(a, b) == 0 for a, b in itertools.combinations(labels, 2))
    assert report.overlap((0, 0, 2, 2), (1, 1, 3, 3)) == 1
