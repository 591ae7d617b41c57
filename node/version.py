"""The version of this program, from the installed package's metadata."""

from importlib.metadata import PackageNotFoundError, version


def _read() -> str:
    try:
        return version("swarmd")
    except PackageNotFoundError:
        return "0+unknown"


VERSION = _read()
