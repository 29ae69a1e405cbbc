"""An object store for the tests, with a layer in front that fails as it is told to: moto's S3 server ("s3"), the same
with what Google's protocol has otherwise ("gcs"), or so much of Azure's Blob Storage as is used ("azure").

Prints "listening on URL", makes the bucket "bucket", and ends with its standard input. PUT /_fault with a JSON object
sets what goes wrong from then on, and counts requests from 0 anew; GET /_fault returns the number of requests since.
"""

import email.utils
import json
import re
import sys
import threading
import time
from urllib.parse import parse_qs, quote
from xml.sax.saxutils import escape

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

EXPIRED = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
SLOW = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"


class Faults:
    def __init__(self, app):
        self.app, self.lock, self.count, self.fault = app, threading.Lock(), 0, {}

    def __call__(self, environ, start):
        path, method = environ["PATH_INFO"], environ["REQUEST_METHOD"]
        if path == "/_fault":
            with self.lock:
                if method == "PUT":
                    self.fault = json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
                    self.count = 0
                return self.answer(start, "200 OK", str(self.count).encode())
        with self.lock:
            number, fault = self.count, self.fault
            self.count += 1
        kind, at = fault.get("kind"), fault.get("at", 0)
        if kind == "slow":
            time.sleep(0.5)
        if kind == "busy" and number == at:
            return self.answer(start, "503 Slow Down", SLOW)
        if kind == "down":
            return self.answer(start, "503 Slow Down", SLOW)
        if kind == "cut" and number == at:
            environ["werkzeug.socket"].shutdown(2)
            return self.answer(start, "200 OK", b"")
        if kind == "expired" and number >= at:
            return self.answer(start, "400 Bad Request", EXPIRED)
        if kind == "denied" and number >= at:
            return self.answer(start, "403 Forbidden", DENIED)
        if kind == "lying" and method == "GET" and fault["path"] in path:
            said = {}
            body = b"".join(self.app(environ, lambda status, headers: said.update(status=status, headers=headers)))
            if said["status"].startswith("200") and body:
                body = body[:-1] + bytes([body[-1] ^ 1])
            start(said["status"], said["headers"])
            return [body]
        return self.app(environ, start)

    @staticmethod
    def answer(start, status, body):
        start(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [body]


class Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, *_):
        pass


class Google:
    """Google's XML protocol is S3's but for the condition of a put and the words of who asks."""

    def __init__(self, app):
        self.app = app

    def __call__(self, environ, start):
        if environ.get("HTTP_AUTHORIZATION") != "Bearer of-the-test":
            return Faults.answer(start, "401 Unauthorized", b"<Error><Code>AuthenticationRequired</Code></Error>")
        if environ.pop("HTTP_X_GOOG_IF_GENERATION_MATCH", None) == "0":
            environ["HTTP_IF_NONE_MATCH"] = "*"
        # moto wants to see somebody, and believes anybody.
        who = "AWS4-HMAC-SHA256 Credential=a/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
        environ["HTTP_AUTHORIZATION"] = who
        return self.app(environ, start)


class Azure:
    """One container, "bucket", of the account "account": blobs are put, with or without a condition, read, listed
    and removed by batches."""

    def __init__(self):
        self.lock, self.blobs = threading.Lock(), {}

    def __call__(self, environ, start):
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        query = {name: values[0] for name, values in parse_qs(environ["QUERY_STRING"]).items()}
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        if not environ.get("HTTP_AUTHORIZATION", "").startswith("SharedKey account:"):
            return self.error(start, "403 Forbidden", "AuthenticationFailed")
        if path.rstrip("/") != "/bucket" and not path.startswith("/bucket/"):
            return self.error(start, "404 Not Found", "ContainerNotFound")
        name = path[len("/bucket/") :]
        with self.lock:
            if query.get("comp") == "batch":
                return self.batch(environ, start, body)
            if query.get("comp") == "list":
                return self.list(start, query.get("prefix", ""), query.get("marker", ""))
            if method == "PUT":
                if environ.get("HTTP_IF_NONE_MATCH") == "*" and name in self.blobs:
                    return self.error(start, "409 Conflict", "BlobAlreadyExists")
                assert environ["HTTP_X_MS_BLOB_TYPE"] == "BlockBlob"
                self.blobs[name] = (body, email.utils.formatdate(usegmt=True))
                start("201 Created", self.headers(self.blobs[name]) + [("Content-Length", "0")])
                return []
            if name not in self.blobs:
                return self.error(start, "404 Not Found", "BlobNotFound", method)
            body = self.blobs[name][0]
            headers, status = self.headers(self.blobs[name]), "200 OK"
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", environ.get("HTTP_X_MS_RANGE") or environ.get("HTTP_RANGE", ""))
            if wanted and method == "GET":
                first, last = int(wanted[1]), min(int(wanted[2]), len(body) - 1)
                headers.append(("Content-Range", f"bytes {first}-{last}/{len(body)}"))
                body, status = body[first : last + 1], "206 Partial Content"
            start(status, headers + [("Content-Length", str(len(body)))])
            return [] if method == "HEAD" else [body]

    def batch(self, environ, start, body):
        boundary = environ["CONTENT_TYPE"].split("boundary=")[1]
        parts = []
        for number, name in enumerate(re.findall(r"DELETE /bucket/(\S+) HTTP/1.1", body.decode())):
            gone = self.blobs.pop(name, None) is not None
            status = "202 Accepted" if gone else "404 The specified blob does not exist."
            code = "" if gone else "x-ms-error-code: BlobNotFound\r\n"
            parts.append(
                f"--{boundary}\r\nContent-Type: application/http\r\nContent-ID: {number}\r\n\r\n"
                f"HTTP/1.1 {status}\r\n{code}x-ms-request-id: 0\r\n\r\n"
            )
        answer = ("".join(parts) + f"--{boundary}--").encode()
        start(
            "202 Accepted",
            [("Content-Type", f"multipart/mixed; boundary={boundary}"), ("Content-Length", str(len(answer)))],
        )
        return [answer]

    def list(self, start, prefix, marker):
        """A few at a time, so that lists have several pages."""
        names = sorted(name for name in self.blobs if name.startswith(prefix) and name >= marker)
        page, rest = names[:3], names[3:]
        blobs = "".join(
            f"<Blob><Name>{escape(name)}</Name><Properties><Last-Modified>{self.blobs[name][1]}</Last-Modified>"
            f"<Etag>{self.etag(self.blobs[name])}</Etag><Content-Length>{len(self.blobs[name][0])}</Content-Length>"
            "<Content-Type>application/octet-stream</Content-Type>"
            "</Properties></Blob>"
            for name in page
        )
        answer = (
            f'<?xml version="1.0" encoding="utf-8"?><EnumerationResults><Prefix>{escape(prefix)}</Prefix>'
            f"<Blobs>{blobs}</Blobs><NextMarker>{quote(rest[0]) if rest else ''}</NextMarker></EnumerationResults>"
        )
        return Faults.answer(start, "200 OK", answer.encode())

    def etag(self, blob):
        return f"{hash(blob):x}"

    def headers(self, blob):
        return [("ETag", self.etag(blob)), ("Last-Modified", blob[1]), ("Content-Type", "application/octet-stream")]

    @staticmethod
    def error(start, status, code, method="GET"):
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
        start(status, [("x-ms-error-code", code), ("Content-Length", str(len(body)))])
        return [] if method == "HEAD" else [body]


def main():
    kind = sys.argv[1]
    moto = DomainDispatcherApplication(create_backend_app)
    app = Azure() if kind == "azure" else moto
    server = make_server(
        "127.0.0.1", 0, Faults(Google(app) if kind == "gcs" else app), threaded=True, request_handler=Quiet
    )
    server.daemon_threads = True
    if app is moto:
        make_bucket(moto)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print("listening on", f"http://127.0.0.1:{server.server_port}", flush=True)
    sys.stdin.read()


def make_bucket(moto):
    """Through a server of its own, which knows no other protocol."""
    server = make_server("127.0.0.1", 0, moto, threaded=True, request_handler=Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    import boto3

    url = f"http://127.0.0.1:{server.server_port}"
    boto3.client(
        "s3", endpoint_url=url, aws_access_key_id="a", aws_secret_access_key="b", region_name="us-east-1"
    ).create_bucket(Bucket="bucket")
    server.shutdown()


main()
