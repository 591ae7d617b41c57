"""Errors about a model's files."""

from __future__ import annotations


class ModelFileError(Exception):
    """A model file is refused: the message names the file or tensor, what is wrong with it, and what to do."""
