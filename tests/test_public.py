import subprocess
import sys
from importlib import import_module

import pytest

import anysplade
from anysplade._common.extras import extra


def test_every_public_name_is_there():
    for name in anysplade.__all__:
        assert getattr(anysplade, name) is not None
    assert set(anysplade.__all__) <= set(dir(anysplade))
    with pytest.raises(AttributeError, match="no_such_name"):
        anysplade.no_such_name  # noqa: B018


def test_importing_is_light():
    """The libraries that take seconds are imported with the first name that needs them."""
    code = "import sys, anysplade; anysplade.TrainingConfig; sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_error_is_an_anysplade_error():
    for name in ("DataError", "MeasureError", "ModelError", "OptionError", "OutputError"):
        assert issubclass(getattr(anysplade, name), anysplade.UsageError)
    assert issubclass(anysplade.UsageError, anysplade.AnyspladeError)


def test_a_missing_extra_is_one_line_with_the_command():
    message = r'^no_such_library is not installed: pip install "anysplade\[search\]"$'
    with pytest.raises(anysplade.ExtraError, match=message), extra("search"):
        import_module("no_such_library")
    with pytest.raises(ModuleNotFoundError, match=r"anysplade\.nowhere"), extra("search"):  # a fault of the package itself
        import_module("anysplade.nowhere")
