"""One tiny model and its texts for all tests of recipes."""

import pytest
import recipe_cases

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("yaml")


@pytest.fixture(scope="session")
def recipe_files(tmp_path_factory):
    """A folder with `model` and `texts`; tests read it and write elsewhere."""
    folder = tmp_path_factory.mktemp("recipes")
    recipe_cases.save_model(folder / "model")
    recipe_cases.save_texts(folder / "texts")
    return folder


@pytest.fixture
def recipe_config(recipe_files):
    """The smallest config on them, as a dict of the test's own."""
    return recipe_cases.config(recipe_files)
