"""The console command. It stands beside the package, because importing that imports torch."""
import os
import sys


def main() -> None:
    """Check what costs nothing to check, then become the tool that was asked for."""
    os.environ['MMDET_ODCONV_LAYERS_ONLY'] = '1'  # until then
    from mmdet_odconv.command import tool_and_arguments
    from mmdet_odconv.errors import InputError
    try:
        arguments = tool_and_arguments(sys.argv[1:])
    except InputError as error:
        sys.exit(f'error: {error}')
    if arguments:
        del os.environ['MMDET_ODCONV_LAYERS_ONLY']
        os.execv(sys.executable, [sys.executable, *arguments])


if __name__ == '__main__':
    main()
