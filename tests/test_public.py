import builtins
import inspect
import re
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


PUBLIC = {name: getattr(anysplade, name) for name in anysplade.__all__}
FUNCTIONS = {name: value for name, value in PUBLIC.items() if inspect.isfunction(value)}
CLASSES = {name: value for name, value in PUBLIC.items() if inspect.isclass(value)}
METHODS = {
    f"{name}.{method}": value
    for name, kind in CLASSES.items()
    for method, value in inspect.getmembers(kind, lambda member: inspect.isfunction(member) or inspect.ismethod(member))
    if not method.startswith("_") and value.__module__.startswith("anysplade.") and method not in ("to_dict",)
}
CALLABLES = FUNCTIONS | METHODS
FORMULAS = {"Calibration", "rescale_head", "mine", "TrainingConfig", "evaluate"}  # what they compute comes from a paper


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_names_have_a_docstring(name):
    docstring = PUBLIC[name].__doc__ or ""
    assert len(docstring.split()) >= 3
    assert not docstring.startswith(f"{name}(")  # that a dataclass writes itself
    if name in FORMULAS:
        assert "arXiv" in docstring


@pytest.mark.parametrize("name", sorted(CALLABLES))
def test_public_functions_describe_arguments_errors_and_shapes(name):
    function = CALLABLES[name]
    docstring = inspect.getdoc(function) or ""
    assert docstring
    explained = docstring.replace("`", "")
    for parameter in inspect.signature(function).parameters:
        # What "progress" is needs no words, nor does a parameter that the first line names.
        assert parameter in ("self", "cls", "progress") or re.search(rf"\b{parameter}\b", explained), parameter
    source = inspect.getsource(function)
    if re.search(r"^\s+raise (?!$)", source, re.MULTILINE):
        assert "Raises:" in docstring
    types = " ".join(map(str, inspect.get_annotations(function).values()))
    if re.search(r"ndarray|csr_matrix|Tensor", types):
        assert re.search(r"\([\w ]+,[\w ]*\)", docstring), "the shape of an array"


@pytest.mark.parametrize("name", sorted(name for name, kind in CLASSES.items() if hasattr(kind, "__annotations__")))
def test_every_field_is_explained(name):
    kind = CLASSES[name]
    lines = inspect.getsource(kind).splitlines()
    for field in kind.__annotations__:
        line = next((i for i, line in enumerate(lines) if re.match(rf"    {field}\s*:", line)), None)
        if line is None or field == "_":
            continue
        commented = "#" in lines[line] or lines[line - 1].strip().startswith("#")
        assert commented or re.search(rf"\b{field}\b", (kind.__doc__ or "").replace("`", "")), field


def test_errors_in_docstrings_exist():
    for name, function in CALLABLES.items():
        for error in re.findall(r"\b(\w+Error)\b", inspect.getdoc(function) or ""):
            assert hasattr(anysplade, error) or hasattr(builtins, error), (name, error)
