import importlib
import json

import digits
from digits import ROOT


def test_a_config_is_surveyed(tmp_path):
    digits.tool(tmp_path, 'analysis_tools/swap_survey.py', 'out', 'yolox/yolox_tiny*', '--size',
                '64')
    result, = map(json.loads, (tmp_path / 'out/results.jsonl').read_text().splitlines())
    assert result['reached'] == 'same features', result
    assert '| same features | 1 |' in (tmp_path / 'out/table.md').read_text()


def test_a_line_that_was_cut_short_is_tried_again(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / 'tools/analysis_tools')
    survey = importlib.import_module('swap_survey')
    log = tmp_path / 'results.jsonl'
    assert survey.read_results(log) == []
    log.write_text('{"config": "a"}\n{"config": "b", "rea')
    assert survey.read_results(log) == [{'config': 'a'}]
