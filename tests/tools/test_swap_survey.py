import json

import digits


def test_a_config_is_surveyed(tmp_path):
    digits.tool(tmp_path, 'analysis_tools/swap_survey.py', 'out', 'yolox/yolox_tiny*', '--size',
                '64')
    result, = map(json.loads, (tmp_path / 'out/results.jsonl').read_text().splitlines())
    assert result['reached'] == 'same features', result
    assert '| same features | 1 |' in (tmp_path / 'out/table.md').read_text()
