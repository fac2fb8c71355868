"""An S3 server on loopback, buckets, and models in them."""

import pytest
from support.merge.s3_server import put_tree, s3_server_or_skip
from support.merge.stores import NUMBERS

from merit_fast.merge.read.remote import as_location


@pytest.fixture(scope="package")
def server():
    yield from s3_server_or_skip()


@pytest.fixture
def bucket(server):
    """A new bucket of the server."""
    location = as_location(f"s3://bucket-{next(NUMBERS)}")
    location.store.mkdir(location.path)
    return location


@pytest.fixture
def in_memory():
    """A place in fsspec's memory."""
    return as_location(f"memory://place-{next(NUMBERS)}")


@pytest.fixture
def remote(bucket, branches):
    """The four models in the bucket, under the same names."""
    for branch in branches:
        put_tree(branch, bucket / branch.name)
    return [bucket / branch.name for branch in branches]
