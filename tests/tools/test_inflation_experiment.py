import json

import digits


def test_each_detector_is_trained_once_and_the_converted_starts_where_the_static_ended(tmp_path):
    digits.make(tmp_path)
    args = ('analysis_tools/inflation.py', '--iterations', '2', '--finetune', '1', '--seeds', '0',
            '--jobs', '2', '--work-dir', 'out')
    digits.tool(tmp_path, *args)
    rows = json.loads((tmp_path / 'out/inflation.json').read_text())
    assert list(rows) == ['static, trained', 'converted from it', 'static, fine-tuned',
                          'converted, fine-tuned', 'dynamic, from scratch']
    assert rows['converted from it'] == rows['static, trained']
    assert '| dynamic, from scratch | 3 | ' in (tmp_path / 'out/inflation.md').read_text()

    for name, start in (('static-finetuned', 'static/iter_2.pth'),
                        ('converted-finetuned', 'converted.pth')):
        log = (tmp_path / 'out/seed0' / name / 'log.txt').read_text()
        assert f'Load checkpoint from {tmp_path / "out/seed0" / start}' in log

    finished = tmp_path / 'out/seed0/scratch/result.json'
    finished.write_text(json.dumps({'map': 0.75, 'seconds': 1.0}))
    digits.tool(tmp_path, *args)
    rows = json.loads((tmp_path / 'out/inflation.json').read_text())
    assert rows['dynamic, from scratch'] == [0.75]
