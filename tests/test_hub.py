"""Names of models that the hub does not give: each case says which it is and what to do. A server on loopback is the hub."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from crd.errors import CRDError
from crd.models.load import load_pipeline

ANSWERS = {
    "gated/model": (403, "GatedRepo"),
    "mis/spelt": (401, "RepoNotFound"),
    "no/pipeline": (404, "EntryNotFound"),
    "ill/hub": (400, ""),
}
EXPECTED = {
    "gated/model": "accept its licence",
    "mis/spelt": "Check the spelling",
    "no/pipeline": "has no model_index.json",
    "ill/hub": "Bad request",
}
ASK = """
import json, sys, torch
from crd.errors import CRDError
from crd.models.load import load_pipeline
said = {}
for name in sys.argv[1:]:
    try:
        load_pipeline(name, torch.float32)
    except CRDError as error:
        said[name] = str(error)
print(json.dumps(said))
"""


class Hub(BaseHTTPRequestHandler):
    def do_HEAD(self):
        code, kind = next(answer for name, answer in ANSWERS.items() if name in self.path)
        self.send_response(code)
        self.send_header("X-Error-Code", kind)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *arguments):
        pass


def test_what_the_hub_answers(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "0",
    }
    environment |= {"NO_PROXY": "*", "no_proxy": "*"}
    done = subprocess.run(
        [sys.executable, "-c", ASK, *ANSWERS], check=False, env=environment, capture_output=True, text=True, timeout=120
    )
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said.keys() == EXPECTED.keys()
    for name, part in EXPECTED.items():
        assert part in said[name] and name in said[name], said[name]


@pytest.mark.parametrize(
    "name, part",
    [("some/model", "cannot be reached"), ("no such folder", "neither a folder nor"), ("a/b/c", "neither a folder nor")],
)
def test_without_the_hub(name, part):
    with pytest.raises(CRDError, match=part):
        load_pipeline(name, torch.float32)
