"""A Cloud Storage of the test's own: `python tests/gcs.py PORT BUCKET` serves it on this machine.

The emulator from PyPI lacks what gcsfs and tensorstore rely on: moving objects, the generation of a
downloaded object, and conditions on it.
"""

import sys
from http import HTTPStatus

from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

MOVE = (
    r"^/storage/v1/b/(?P<bucket_name>[-.\w]+)/o/(?P<object_id>[^/]+)"
    r"/moveTo/o/(?P<dest_object_id>[^/]+)$"
)
NONE = "0"  # the generation of an object that is not there


def environment(port: int) -> dict[str, str]:
    """What points gcsfs, google-cloud-storage and tensorstore to the server."""
    address = f"http://127.0.0.1:{port}"
    return {
        "STORAGE_EMULATOR_HOST": address,
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        "FSSPEC_GCS_TOKEN": "anon",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }


def generation(storage, bucket: str, name: str | None) -> str:
    try:
        return storage.get_file_obj(bucket, name)["generation"] if name else NONE
    except NotFound:
        return NONE


def with_generations(handler):
    """A handler that tells generations and keeps to the conditions on them."""

    def handle(request, response, storage):
        query = request.query
        name = request.params.get("object_id") or query.get("name", [None])[0]
        current = generation(storage, request.params.get("bucket_name"), name)
        if query.get("ifGenerationMatch", [current])[0] != current:
            _ = request.data  # read it, or the connection is out of step
            response.status = HTTPStatus.PRECONDITION_FAILED
            return
        if current != NONE and query.get("ifGenerationNotMatch", [None])[0] == current:
            response.status = HTTPStatus.NOT_MODIFIED
            return
        if request.method == "GET" and current != NONE:
            response["x-goog-generation"] = current
        handler(request, response, storage)

    return handle


def move(request, response, storage) -> None:
    place = request.params
    place["dest_bucket_name"] = place["bucket_name"]
    objects.copy(request, response, storage)
    if response.status == HTTPStatus.OK:
        storage.delete_file(place["bucket_name"], place["object_id"])


def main() -> None:
    guarded = {objects.get, objects.download, objects.insert, objects.delete}
    wrapped = tuple(
        (path, {m: with_generations(h) if h in guarded else h for m, h in methods.items()})
        for path, methods in server.HANDLERS
    )
    server.HANDLERS = ((MOVE, {"POST": move}), *wrapped)
    server.create_server("127.0.0.1", int(sys.argv[1]), True, sys.argv[2]).run()


if __name__ == "__main__":
    main()
