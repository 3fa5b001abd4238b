"""A folder of toy faces for every test that wants data, drawn once per session."""
import pytest
from program import toy_data


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory):
    """train/ (10 people, 80 pictures), val/, test/, pairs/ of 32 px with all labels."""
    return toy_data(tmp_path_factory.mktemp("data") / "toy")
