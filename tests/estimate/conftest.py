"""The tiny prepared corpus of the training tests."""

from tests.train.conftest import prepared, recipe_file  # noqa: F401
