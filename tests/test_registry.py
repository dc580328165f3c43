"""The scope that a config with ``_base_ = 'mmdet_odconv::...'`` has."""
from mmdet_odconv.registry import REGISTRIES


def test_each_is_imported_from_where_it_is(monkeypatch):
    said = []
    monkeypatch.setattr('mmengine.logging.print_log', lambda text, *_, **__: said.append(text))
    for registry in REGISTRIES:
        monkeypatch.setattr(registry, '_imported', False)
        registry.import_from_location()
    assert not [text for text in said if 'will not be registered' in text]
