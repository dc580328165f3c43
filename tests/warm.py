"""Runs scripts in processes forked from one that has imported what they all import.

Importing torch, mmcv and mmdet takes longer than most of what the tests ask of a script, so it is
done once. The plugin is not imported before the fork: a script finds the process as Python leaves
it to whoever has imported MMDetection.
"""
import atexit
import contextlib
import functools
import json
import os
import runpy
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(script: Path, *args: str, cwd: Path) -> subprocess.CompletedProcess:
    """Run a script as ``python script args`` would, in ``cwd`` and with this environment."""
    with tempfile.TemporaryFile('w+') as out, tempfile.TemporaryFile('w+') as err:
        request = dict(script=str(script), args=[str(arg) for arg in args], cwd=str(cwd),
                       environment=dict(os.environ),
                       outputs=[f'/proc/{os.getpid()}/fd/{file.fileno()}' for file in (out, err)])
        server = start()
        print(json.dumps(request), file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        for file in (out, err):
            file.seek(0)
        return subprocess.CompletedProcess(request['args'], status, out.read(), err.read())


@functools.cache
def start() -> subprocess.Popen:
    server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True)
    atexit.register(server.communicate)  # it ends when its input does
    return server


def serve() -> None:
    with contextlib.redirect_stdout(sys.stderr):  # what a package prints is no exit status
        import matplotlib.pyplot  # noqa: F401
        import mmcv.ops  # noqa: F401
        import mmdet.apis  # noqa: F401
        import mmdet.models  # noqa: F401  (half of what importing the plugin takes)
        import pycocotools.coco  # noqa: F401
        import torch._dynamo  # noqa: F401  (a second, in the first optimizer)
        from mmengine.config import Config
    spare_repetition()
    Config.fromfile(ROOT / 'configs/quickstart/faster-rcnn_r18_fpn_digits.py',
                    import_custom_modules=False)  # the metafiles are read
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            status = 0
            try:
                become(**request)
            except SystemExit as end:  # of another exception Python itself tells
                status = end.code if isinstance(end.code, int) else int(end.code is not None)
                if isinstance(end.code, str):
                    print(end.code, file=sys.stderr)
            leave(status)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def spare_repetition() -> None:
    """Of MMEngine: it formats the config of a run four times, and reads all metafiles of a package
    for each config that names one of the package's."""
    from mmengine.config import config, utils
    from yapf.yapflib import yapf_api

    def once(function):
        results = {}

        def remembered(argument, **options):
            if argument not in results:
                results[argument] = function(argument, **options)
            return results[argument]

        return remembered

    utils.load, yapf_api.FormatCode = once(utils.load), once(yapf_api.FormatCode)
    if hasattr(config, 'FormatCode'):  # the continuation imports it where it is called
        config.FormatCode = yapf_api.FormatCode


def become(script, args, cwd, environment, outputs) -> None:
    for descriptor, path in zip((0, 1, 2), (os.devnull, *outputs)):
        os.dup2(os.open(path, os.O_RDWR), descriptor)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [script, *args]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name='__main__')


def leave(status: int) -> None:
    """End this process, but spare it tearing down what was imported: seconds, of each run."""
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


if __name__ == '__main__':
    serve()
