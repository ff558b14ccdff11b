"""memeff/_C.pyi, the stub of the extension: the same functions and arguments as the module has."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import memeff
from memeff import _library

STUB = Path(memeff.__file__).with_name("_C.pyi")


def test_the_stub_is_that_of_the_module() -> None:
    stub = {
        node.name: [argument.arg for argument in node.args.args]
        for node in ast.parse(STUB.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    extension = _library.load()
    module = {}
    for name in dir(extension):
        function = getattr(extension, name)
        if callable(function):
            # pybind11 writes the signature into the first line: plan(tokens: int, ...) -> dict
            signature = (function.__doc__ or "").splitlines()[0]
            module[name] = re.findall(r"(\w+): ", signature)
    assert stub == module
