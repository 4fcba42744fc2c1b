"""The `superscopes` command."""

from superscopes_tl.cli.main import app

__all__ = ["app"]
