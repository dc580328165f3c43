"""Records of runs, as tools/analysis_tools/compare.py keeps them."""


def record(config, seed, iterations=750, budget='iterations', score=0.5, seconds=1.0):
    return {'config': config, 'place': int(config != 'static'), 'seed': seed, 'budget': budget,
            'iterations': iterations, 'map': score, 'seconds': seconds, 'params': 1, 'gmadds': 1,
            'data': 'digits', 'images': dict(train=9, test=9), 'split': 'test', 'batch_size': 4,
            'cpu': 'EPYC', 'threads': 1, 'torch': '2.13.0'}
