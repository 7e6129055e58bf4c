"""`push_to_hub`: huggingface_hub uploads to a small hub on this machine."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from conftest import tensors_equal
from lavit.config import InputError
from lavit.model import LaVIT

SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """What a hub answers to an upload; files lie in memory, by branch."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.branches: dict[str, dict[str, bytes]] = {"main": {}}
        self.created: dict[str, Any] = {}
        self.token, self.summary = "", ""


class Answer(BaseHTTPRequestHandler):
    """One request."""

    server: Hub

    def log_message(self, *_: object) -> None: ...

    def answer(self, content: Any, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        hub, path = self.server, self.path.split("?")[0]
        body = self.rfile.read(int(self.headers["Content-Length"]))
        hub.token = self.headers.get("Authorization", "")
        repository = re.match(r"/api/models/([^/]+/[^/]+)/", path)
        address = f"http://{self.headers['Host']}/{repository[1]}" if repository else ""
        if path == "/api/repos/create":
            hub.created = json.loads(body)
            name = f"{hub.created.get('organization') or 'me'}/{hub.created['name']}"
            refused = name == "org/forbidden"
            self.answer({"url": f"http://{self.headers['Host']}/{name}"}, 403 if refused else 200)
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif found := re.search("/branch/(.+)", path):
            hub.branches.setdefault(found[1], {})
            self.answer({})
        elif path.endswith("/discussions"):
            hub.branches["refs%2Fpr%2F1"] = {}
            self.answer({"num": 1})
        elif "/preupload/" in path:
            named = [one["path"] for one in json.loads(body)["files"]]
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            self.answer({"files": [{"path": name, **modes} for name in named]})
        elif found := re.search("/commit/(.+)", path):
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    hub.summary = value["summary"]
                else:
                    hub.branches[found[1]][value["path"]] = base64.b64decode(value["content"])
            self.answer({"commitUrl": f"{address}/commit/{SHA}", "commitOid": SHA})
        else:
            self.answer({"error": f"there is no {path}"}, 404)

    def do_GET(self) -> None:
        """A pull request; a repository that cannot be made is not there either."""
        if not self.path.split("?")[0].endswith("/discussions/1"):
            return self.answer({}, 404)
        said = {"title": "?", "num": 1, "author": {"name": "me"}, "status": "draft", "events": []}
        said |= {"createdAt": "2026-01-01T00:00:00.000Z", "isPullRequest": True}
        said |= {
            "repo": {"name": "me/toy", "type": "model"},
            "changes": {"base": "refs/heads/main"},
        }
        self.answer({**said, "filesWithConflicts": []})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
    huggingface_hub.close_session()


@pytest.fixture
def model(toy_run: Path) -> LaVIT:
    return LaVIT.from_pretrained(toy_run)


def test_what_is_uploaded_opens_again(hub: Hub, model: LaVIT, tmp_path: Path) -> None:
    done = model.push_to_hub("org/toy", private=True, token="secret", revision="v1")
    assert (done.commit_url.split("/", 3)[3], done.oid) == (f"org/toy/commit/{SHA}", SHA)
    assert (hub.created["organization"], hub.created["name"]) == ("org", "toy")
    assert "private" in json.dumps(hub.created) and hub.token == "Bearer secret"
    assert hub.summary == "Upload a LaVIT model" and not hub.branches["main"]
    there = {"README.md", "config.json", "training.json", "reader/model.safetensors"}
    assert there <= hub.branches["v1"].keys()
    for name, content in hub.branches["v1"].items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert tensors_equal(LaVIT.from_pretrained(tmp_path), model)


def test_a_name_alone_is_the_users_own(hub: Hub, model: LaVIT) -> None:
    done = model.push_to_hub("toy", commit_message="first", create_pr=True, token="secret")
    assert "/me/toy/" in done.commit_url and str(done.pr_url).endswith("/me/toy/discussions/1")
    assert hub.summary == "first" and not hub.branches["main"]


def test_what_a_hub_refuses_is_said(hub: Hub, model: LaVIT) -> None:
    with pytest.raises(InputError, match=r"cannot upload to org/forbidden: .*403"):
        model.push_to_hub("org/forbidden", token="secret")
    hub.shutdown()
    hub.server_close()
    with pytest.raises(InputError, match=r"cannot upload to org/toy: .*give a `token`"):
        model.push_to_hub("org/toy", token="secret")
