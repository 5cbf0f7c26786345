"""The syntax tree of a function, whose source file was seen to compile to the very code that runs."""

from __future__ import annotations

import ast
import functools
import linecache
from types import CodeType

from attn_kernels.fuse.terms import Refused

_Key = tuple[int, str]


@functools.lru_cache(64)
def _of_file(name: str) -> tuple[dict[_Key, list[CodeType]], dict[_Key, list[ast.FunctionDef]]]:
    """The code objects that a file compiles to, and the functions in it, by first line and name."""
    text = "".join(linecache.getlines(name))
    if not text:
        raise Refused(f"has no source: {name} is not to be had")
    try:
        module = ast.parse(text)
        todo = [compile(text, name, "exec", dont_inherit=True)]
    except (SyntaxError, ValueError):
        raise Refused("has a source file that does not compile") from None
    codes: dict[_Key, list[CodeType]] = {}
    functions: dict[_Key, list[ast.FunctionDef]] = {}
    while todo:
        code = todo.pop()
        codes.setdefault((code.co_firstlineno, code.co_name), []).append(code)
        todo += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            functions.setdefault((first, node.name), []).append(node)
    return codes, functions


@functools.lru_cache(2048)
def tree(code: CodeType) -> ast.FunctionDef:
    """The function whose code this is.

    Raises:
        Refused: its source cannot be read, gives other code (it was edited, patched or made at run time), or is
            decorated.
    """
    codes, functions = _of_file(code.co_filename)
    key = code.co_firstlineno, code.co_name
    found = functions.get(key, [])
    if len(found) != 1 or code not in codes.get(key, []):
        raise Refused(f"has a function, {code.co_name}, whose source is not what runs")
    if found[0].decorator_list:
        raise Refused(f"has a decorated function, {code.co_name}")
    return found[0]
