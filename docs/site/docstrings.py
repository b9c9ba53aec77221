"""Docstrings as the site shows them: options written out, Sphinx's roles as code, examples as blocks of code."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):`~?\.?([^`]+)`")
EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)
OPTIONS = "    {options}"


class Docstrings(griffe.Extension):
    """``{options}`` stands for the arguments of ``LayerOptions``, which an import of the package writes out."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        _, _, rest = pkg["options.LayerOptions"].docstring.value.partition("Args:\n")
        self._change(pkg, rest.partition("\n\nRaises:")[0].rstrip())

    def _change(self, owner: griffe.Object, options: str) -> None:
        if owner.docstring is not None:
            text = owner.docstring.value.replace(OPTIONS, options)
            owner.docstring.value = EXAMPLE.sub(r"```pycon\n\g<0>\n```", ROLE.sub(r"`\1`", text))
        for member in owner.members.values():
            if not member.is_alias:
                self._change(member, options)
