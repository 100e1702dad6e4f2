"""A server that speaks S3, on loopback, for this process and every one that it starts."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def s3_environment(endpoint: str) -> dict[str, str]:
    """What a process needs in its environment to speak to this endpoint."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "an-id",
        "AWS_SECRET_ACCESS_KEY": "a-secret",
        "AWS_REGION": "us-east-1",
    }


def forbid_writing(client: Any, bucket: str) -> None:
    """Have a bucket's policy refuse what a credential that may only read is refused."""
    actions = ["s3:PutObject", "s3:DeleteObject", "s3:PostObject"]
    denial = {
        "Effect": "Deny",
        "Principal": "*",
        "Action": actions,
        "Resource": f"arn:aws:s3:::{bucket}/*",
    }
    client.put_bucket_policy(
        Bucket=bucket, Policy=json.dumps({"Version": "2012-10-17", "Statement": [denial]})
    )


@contextmanager
def s3_server() -> Iterator[str]:
    """Its endpoint, which every process started after this one finds in its environment."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    os.environ |= s3_environment(endpoint)
    try:
        yield endpoint
    finally:
        server.stop()
