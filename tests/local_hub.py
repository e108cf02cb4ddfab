"""A model hub on loopback, in the layout that the hub's client expects: an index, links to large files on another host, ranges, and faults."""

import json
import re
import threading
from contextlib import contextmanager
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

ALIASES = {"gpt2": "openai-community/gpt2", "gpt2-medium": "openai-community/gpt2-medium"}  # old names, redirected as the hub does
INDEX = re.compile(r"/api/models/(?P<name>[^/?]+(?:/[^/?]+)?)(?:/revision/(?P<revision>[^/?]+))?$")
FILE = re.compile(r"/(?P<name>[^/]+(?:/[^/]+)?)/resolve/(?P<revision>[^/]+)/(?P<file>.+)$")
STORE = re.compile(r"/store/(?P<key>[0-9a-f]{64})$")


class Hub(ThreadingHTTPServer):
    """Its repositories and its faults may be changed while it runs; `log` holds what was asked for."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories = {}  # name → {revision: {file: bytes}}
        self.stored = {}  # what a redirect calls a large file → bytes
        self.log = []  # (method, path, Range header)
        self.announced = {}  # file → headers of its metadata, true or not
        self.cuts = {}  # file → for each further answer, how many bytes come before the connection breaks (0: no answer at all)
        self.held = {}  # file → how many bytes come before nothing more does
        self.refusals = {}  # start of a path → (status, headers)
        self.then = {}  # file → what happens once it was sent
        self.silent = False  # take requests, answer none
        self.closing = threading.Event()

    def publish(self, name, files, revision="main"):
        """What a revision had before stays there under its commit."""
        revisions = self.repositories.setdefault(name, {})
        if revision in revisions: revisions[commit(revisions[revision])] = revisions[revision]
        revisions[revision] = files

    def asked_for(self, part, method="GET"):
        return [entry for entry in self.log if entry[0] == method and part in entry[1]]

    def handle_error(self, request, client_address):
        """A client that goes away is no news."""


def commit(files):
    return sha1(b"".join(name.encode() + content for name, content in sorted(files.items()))).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args): pass

    def do_HEAD(self): self.answer()

    def do_GET(self): self.answer()

    def answer(self):
        path, hub = unquote(self.path.partition("?")[0]), self.server
        hub.log.append((self.command, path, self.headers.get("Range")))
        if hub.silent: return hub.closing.wait()
        for start, (status, headers) in hub.refusals.items():
            if path.startswith(start): return self.send(status, b"{}", headers)
        if found := STORE.match(path): return self.send_bytes(*hub.stored[found["key"]])
        if found := INDEX.match(path): return self.index(found["name"], found["revision"] or "main")
        if found := FILE.match(path): return self.metadata(**found.groupdict())
        return self.send(404, b"{}", {})

    def files(self, name, revision):
        """Its files, or None and an answer: a redirect from an old name, or what the hub says of a name or revision that it does not have."""
        if name in ALIASES: return self.send(307, b"", {"Location": self.path.replace(name, ALIASES[name], 1)})
        revisions = self.server.repositories.get(name)
        if revisions is None: return self.send(401, b"{}", {"X-Error-Message": "Invalid username or password."})
        found = next((files for known, files in revisions.items() if revision in (known, commit(files))), None)
        return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}) if found is None else found

    def index(self, name, revision):
        if (files := self.files(name, revision)) is None: return
        index = {"id": name, "sha": commit(files), "siblings": [{"rfilename": file} for file in files]}
        self.send(200, json.dumps(index).encode(), {"Content-Type": "application/json"})

    def metadata(self, name, revision, file):
        if (files := self.files(name, revision)) is None: return
        headers = {"X-Repo-Commit": commit(files)}
        if file not in files: return self.send(404, b"{}", headers | {"X-Error-Code": "EntryNotFound"})
        if file.endswith((".safetensors", ".bin")): return self.link(file, files[file], headers)
        etag = sha1(b"blob %d\0" % len(files[file]) + files[file]).hexdigest()  # as git names it
        self.send(200, files[file], headers | {"ETag": f'"{etag}"'} | self.server.announced.get(file, {}))
        if self.command == "GET" and file in self.server.then: self.server.then[file]()

    def link(self, file, content, headers):
        """Large files lie on another host ('localhost' is another name), and what they are is said here."""
        key = sha256(content).hexdigest()
        self.server.stored[key] = (file, content)
        headers["Location"] = f"http://localhost:{self.server.server_port}/store/{key}"
        promised = {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{key}"'}
        self.send(302, b"", headers | promised | self.server.announced.get(file, {}))

    def send_bytes(self, file, content):
        first = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        part = {"Content-Range": f"bytes {first}-{len(content) - 1}/{len(content)}"} if first else {}
        limit = next(self.server.cuts.get(file, iter(())), self.server.held.get(file))
        if limit == 0: self.close_connection = True  # not even a status line
        else: self.send(206 if first else 200, content[first:], part, limit)

    def send(self, status, body, headers, limit=None):
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | headers).items(): self.send_header(key, value)
        self.end_headers()
        if self.command == "GET": self.wfile.write(body[:limit])
        if limit is not None: self.close_connection = True
        if limit in self.server.held.values(): self.server.closing.wait()


@contextmanager
def running():
    """A hub that listens until the end of the block."""
    hub = Hub()
    threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try: yield hub
    finally:
        hub.closing.set()
        hub.shutdown()
        hub.server_close()
