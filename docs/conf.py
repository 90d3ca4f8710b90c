"""Sphinx's configuration, and the check that the reference leaves out nothing public."""

from __future__ import annotations

import importlib.metadata

from sphinx.application import Sphinx
from sphinx.util.logging import getLogger

import aioreap

project = "aioreap"
release = importlib.metadata.version(project)
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
default_role = "literal"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_use_ivar = True
html_theme = "furo"
html_title = f"{project} {release}"


def _warn_of_what_is_missing(app: Sphinx) -> None:
    described = {entry[0] for entry in app.env.get_domain("py").get_objects()}
    for name in [*(f"aioreap.{name}" for name in aioreap.__all__), "aioreap.options.Options"]:
        if name not in described:
            getLogger(__name__).warning("the reference does not describe %s", name)


def setup(app: Sphinx) -> None:
    """Have it checked once all pages are read."""
    app.connect("env-check-consistency", lambda app, _env: _warn_of_what_is_missing(app))
