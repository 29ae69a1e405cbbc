"""An S3 server of moto's for the tests, with a layer in front that fails as it is told to.

Prints "listening on URL", makes the bucket "bucket", and ends with its standard input. PUT /_fault with a JSON object
sets what goes wrong from then on, and counts requests from 0 anew; GET /_fault returns the number of requests since.
"""

import json
import sys
import threading

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
        if kind == "busy" and number == at:
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


def main():
    app = Faults(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Quiet)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    import boto3

    url = f"http://127.0.0.1:{server.server_port}"
    boto3.client(
        "s3", endpoint_url=url, aws_access_key_id="a", aws_secret_access_key="b", region_name="us-east-1"
    ).create_bucket(Bucket="bucket")
    print("listening on", url, flush=True)
    sys.stdin.read()


main()
