"""llama.cpp's own programs as clients of the plug-in: how tests start them, with and without it."""

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import unittest
import urllib.error
import urllib.request
from pathlib import Path

OPTIONS = argparse.Namespace(plain=[])  # and of the command line, once main() has parsed it
# One thread: on a busy machine two of them mostly wait for each other.
COMMON = ["-t", "1", "-fa", "on"]
SECONDS = 120


def environment(**settings):
    """The environment without ZIPCACHE_ variables; `settings` become some."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("ZIPCACHE_", "GGML_BACKEND_"))}
    env.update({"ZIPCACHE_" + name.upper(): str(value) for name, value in settings.items()})
    return env


def command(program, *arguments, plugin=True, model=None):
    """The command line of a llama.cpp program on the test model."""
    line = [str(OPTIONS.bin / program), "-m", str(model or OPTIONS.model), *COMMON]
    device = ["-dev", getattr(OPTIONS, "device", "ZipCache"), "-ngl", "99"] if plugin else OPTIONS.plain
    return line + device + list(map(str, arguments))


def run(program, *arguments, plugin=True, model=None, check=True, **settings):
    env = environment(**settings)
    if plugin:
        env["GGML_BACKEND_PATH"] = str(OPTIONS.plugin)
    done = subprocess.run(command(program, *arguments, plugin=plugin, model=model), env=env,
                          capture_output=True, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL)
    if check and done.returncode != 0:
        raise AssertionError(f"{program} returned {done.returncode}:\n{done.stderr[-3000:]}")
    return done


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """llama-server, up and loaded; stopped on exit."""

    def __init__(self, *arguments, plugin=True, **settings):
        self.url = f"http://127.0.0.1:{free_port()}"
        env = environment(**settings)
        if plugin:
            env["GGML_BACKEND_PATH"] = str(OPTIONS.plugin)
        line = command("llama-server", "--port", self.url.rsplit(":", 1)[1], *arguments,
                       plugin=plugin)
        self.log = tempfile.TemporaryFile(mode="w+")
        self.process = subprocess.Popen(line, env=env, stdout=self.log, stderr=subprocess.STDOUT,
                                        stdin=subprocess.DEVNULL)

    def __enter__(self):
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                urllib.request.urlopen(self.url + "/health", timeout=5)
                return self
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.1)
        self.__exit__()
        raise AssertionError("llama-server did not start:\n" + self.output()[-3000:])

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        output = self.output()
        self.log.close()
        if self.process.returncode != 0:
            raise AssertionError(f"llama-server returned {self.process.returncode}:\n"
                                 + output[-3000:])

    def output(self):
        self.log.seek(0)
        return self.log.read()

    def post(self, path, body):
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path}: {error.code} {error.read()[:500]}\n"
                                 + self.output()[-2000:]) from None

    def complete(self, prompt, n=32, **extra):
        return self.post("/completion", {"prompt": prompt, "n_predict": n, "temperature": 0,
                                         "ignore_eos": True, "n_probs": 4, **extra})

    def rss_bytes(self):
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status).group(1)) * 1024


def main(description, add_arguments=lambda parser: None):
    """Parses the command line and runs the tests of the calling module; skips them all when a file
    that it names with a required option is missing."""
    root = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plugin", type=Path, required=True)
    parser.add_argument("--bin", type=Path, required=True, help="folder of llama.cpp's programs")
    parser.add_argument("--data", type=Path,
                        default=os.environ.get("ZIPCACHE_DATA", root.parent / "shared" / "data"))
    add_arguments(parser)
    _, rest = parser.parse_known_args(namespace=OPTIONS)
    for option in parser._actions:
        needed = getattr(OPTIONS, option.dest, None) if option.required else None
        if needed is not None and not needed.exists():
            print(f"SKIPPED: {needed} is missing")
            sys.exit(77)  # ctest's SKIP_RETURN_CODE
    unittest.main(argv=[sys.argv[0], *rest], verbosity=2)
