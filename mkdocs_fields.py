"""The comment behind a field of a dataclass or a named tuple is its description in the reference."""

import ast
import re
from typing import Any

import griffe


class FieldComments(griffe.Extension):
    """Reads ``name: type  # comment``."""

    def on_attribute_instance(self, *, node: ast.AST | griffe.ObjectNode, attr: griffe.Attribute, **_: Any) -> None:
        line = attr.lines[-1] if attr.lines else ""
        comment = re.search(r"  # (?!noqa|type:)(.+)", line)
        if comment and attr.docstring is None and attr.parent is not None and attr.parent.is_class:
            attr.docstring = griffe.Docstring(comment[1], parent=attr)
