"""The live page: what it shows in a browser, that it follows the run, and that nothing else is served."""

import http.client
import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import browser
from command import SMALL, decaf, line_of
from decaf_lora.records import Record
from decaf_lora.runs.live import HOST, Live, serving
from test_report import make_run


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    return json.loads((make_run(tmp_path_factory.mktemp("live") / "r", agents=3, rounds=1) / "run.json").read_text())


def record(round_, score):
    return Record(
        round=round_, scores=[score] * 3, losses=[1.0] * 3, bytes_sent=1.0, learning_rate=0.1, seconds={"train": 1.0}
    )


def asked(address, path="/", host=None, method="GET"):
    """(status, headers, text) of the answer to a request of exactly this path."""
    parts = urlsplit(address)
    connection = http.client.HTTPConnection(HOST, parts.port, timeout=60)
    connection.putrequest(method, path, skip_host=True)
    connection.putheader("Host", host or parts.netloc)
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read().decode()


def test_follows_the_run(facts):
    with serving() as (watch, address):
        assert "The run is being prepared" in asked(address)[2]
        before = asked(address, "/revision")[2]
        run = watch("mine")
        run.start(facts)
        run.record(record(0, 0.125))
        assert asked(address, "/revision")[2] != before
        assert ">0.125<" in asked(address)[2]
        run.record(record(1, 0.625))
        page = asked(address)[2]
        assert ">0.625<" in page
        assert f'data-revision="{asked(address, "/revision")[2]}"' in page
        other = watch("other")
        other.start(facts | {"algorithm": "dlora"})
        other.record(record(0, 0.25))
        page = asked(address)[2]
        assert all(name in page for name in ("DeCAF", "DLoRA"))


def test_ends_with_the_run(facts):
    with serving() as (_, address):
        assert asked(address)[0] == 200
    with pytest.raises(ConnectionRefusedError):
        asked(address)


@pytest.fixture(scope="module")
def address(facts):
    with serving() as (watch, address):
        watch("mine").start(facts)
        yield address


class TestNothingElse:
    @pytest.mark.parametrize(
        "path",
        [
            "/../../../../etc/passwd",
            "//etc/passwd",
            "/%2e%2e/%2e%2e/etc/passwd",
            "/report.html",
            "/config.yaml",
            "/.git/config",
            "/?file=/etc/passwd",
            "/revision/../../etc/passwd",
            "http://example.org/",
            "*",
        ],
    )
    def test_other_addresses_are_not_found(self, address, path):
        status, _, text = asked(address, path)
        assert status == 404
        assert "root:" not in text

    @pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT"])
    def test_nothing_can_be_changed(self, address, method):
        assert asked(address, "/", method=method)[0] == 501

    @pytest.mark.parametrize("host", ["example.org", "evil.test:80", "127.0.0.1.evil.test", "0.0.0.0"])
    def test_a_name_of_another_site_that_leads_here_is_refused(self, address, host):
        assert asked(address, host=host)[0] == 403

    def test_this_machine_alone_can_connect(self, address):
        port = urlsplit(address).port
        assert urlsplit(address).hostname == "127.0.0.1"
        own = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), port, socket.AF_INET)}
        for other in own - {"127.0.0.1"}:
            with pytest.raises(OSError), socket.create_connection((other, port), timeout=5):
                pass

    def test_only_its_own_script_may_run(self, address):
        _, headers, page = asked(address)
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert re.search(r"script-src 'sha256-[^']+'$", policy)
        assert page.count("<script>") == 1
        assert headers["Cache-Control"] == "no-store"


def test_in_a_browser(facts, tmp_path, monkeypatch):
    """The page follows the run without being loaded again, and the policy lets its script run."""
    with serving() as (watch, address):
        run = watch("mine")
        run.start(facts)
        run.record(record(0, 0.125))
        served = []

        def page(self, original=Live.page):
            served.append(original(self))
            if len(served) == 1:  # the browser has the page of round 0, and round 1 ends
                run.record(record(1, 0.625))
            return served[-1]

        monkeypatch.setattr(Live, "page", page)
        seen = browser.dom(address, tmp_path / "profile")
    assert ">0.125<" in served[0]
    assert ">0.625<" not in served[0]
    assert ">0.625<" in seen
    assert "live: updated every round" in seen
    assert len(served) == 2, "the page is fetched again only if something is new"


class TestCommand:
    def test_a_whole_run(self, tmp_path):
        """The address is printed before training, the page can be read while the run goes on, and ends with it."""
        command = [sys.executable, "-u", "-m", "decaf_lora", "run", "digits", *SMALL, "--rounds", "1000000"]
        command += [
            "--evaluate-every",
            "1000000",
            "--checkpoint-every",
            "1000000",
            "--live",
            "--out",
            str(tmp_path / "r"),
        ]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            assert process.stderr is not None
            address = next(line for line in process.stderr if line.startswith("live: ")).split()[1]
            while True:  # until the first record is there
                with urllib.request.urlopen(address, timeout=300) as answer:
                    if "DeCAF on" in answer.read().decode():
                        break
                time.sleep(0.1)
            process.terminate()
            assert process.wait(timeout=300) == 130
        finally:
            process.kill()
        with pytest.raises(ConnectionRefusedError):
            asked(address)

    def test_a_port_that_is_taken(self, tmp_path, capsys):
        with serving() as (_, address):
            port = urlsplit(address).port
            line = line_of(capsys, "run", "digits", *SMALL, "--live", "--port", port, "--out", tmp_path / "r")
        assert f"port: cannot listen on {port} (Address already in use)" in line
        assert not (tmp_path / "r").exists()

    @pytest.mark.parametrize("port", ["-1", "65536", "99999999"])
    def test_a_port_that_does_not_exist(self, port, tmp_path, capsys):
        assert f"port: cannot listen on {port}" in line_of(
            capsys, "run", "digits", *SMALL, "--live", "--port", port, "--out", tmp_path / "r"
        )

    def test_a_port_without_a_page(self, tmp_path, capsys):
        line = line_of(capsys, "run", "digits", *SMALL, "--port", "8000", "--out", tmp_path / "r")
        assert "port: it is that of the live page; give --live too." in line

    def test_a_given_port_is_the_one(self, tmp_path, capsys):
        with socket.socket() as free:
            free.bind((HOST, 0))
            port = free.getsockname()[1]
        assert decaf("run", "digits", *SMALL, "--live", "--port", port, "--out", tmp_path / "r") == 0
        assert f"live: http://127.0.0.1:{port}/" in capsys.readouterr().err
        assert Path(tmp_path / "r" / "report.html").exists()
