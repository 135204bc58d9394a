"""Datasets on disk that several tests read."""

from pathlib import Path

import ilsvrc
import pytest

from starnet_jax.data import prepare, records


@pytest.fixture(autouse=True, scope="session")
def cache_home(tmp_path_factory):
    """Keeps indices and the digits out of the home of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tars(tmp_path_factory) -> Path:
    """A folder with small ILSVRC2012 tar files."""
    folder = tmp_path_factory.mktemp("tars")
    ilsvrc.write(folder)
    return folder


@pytest.fixture(scope="session", params=records.FORMATS)
def imagenet_dir(request, tars, tmp_path_factory) -> str:
    """A data.dir with TFDS's own imagenet2012, made from the tar files, in either format."""
    folder = str(tmp_path_factory.mktemp(request.param))
    prepare.prepare("imagenet2012", folder, str(tars), request.param)
    return folder
