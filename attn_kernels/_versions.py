"""Versions of Triton and numpy that do not work together."""

from __future__ import annotations


def interpreter_clash(triton: str, numpy: str) -> str:
    """Why this version of Triton cannot interpret kernels beside this one of numpy; empty where it can.

    Until 3.6 Triton's interpreter took an array of one element for an integer, which numpy refuses from 2.4 on.
    Compiled kernels need no numpy.
    """
    if _release(triton) >= (3, 7) or _release(numpy) < (2, 4):
        return ""
    return f"the interpreter of Triton {triton} needs numpy below 2.4, and this is numpy {numpy}"


def _release(version: str) -> tuple[int, int]:
    """The first two numbers of a version."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
