import subprocess
import sys

import anysplade


def test_every_public_name_is_there_and_listed():
    assert anysplade.__all__ == sorted(anysplade.__all__)
    for name in anysplade.__all__:
        assert getattr(anysplade, name) is not None
    assert set(anysplade._HOME) | {"__version__"} == set(anysplade.__all__)
    assert set(anysplade.__all__) <= set(dir(anysplade))


def test_importing_is_light():
    """The libraries that take seconds are imported with the first name that needs them."""
    code = "import sys, anysplade; anysplade.TrainingConfig; sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_error_is_an_anysplade_error():
    for name in ("DataError", "MeasureError", "ModelError", "OptionError", "OutputError"):
        assert issubclass(getattr(anysplade, name), anysplade.UsageError)
    assert issubclass(anysplade.UsageError, anysplade.AnyspladeError)
