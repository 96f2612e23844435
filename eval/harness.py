"""What the evaluation scripts share: where things are, how runs are described and results kept."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "eval" / "results"
LLAMA_BIN = ROOT / "build" / "llama.cpp" / "build" / "bin"
BUILD = ROOT / "build" / "release"
MODEL = ROOT / "build" / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def fail(message):
    sys.exit(f"{Path(sys.argv[0]).name}: {message}")


def need(path, remedy):
    if not Path(path).exists():
        fail(f"{path} is missing; {remedy}")
    return Path(path)


def data_file(name):
    """Evaluation data: in ZIPCACHE_DATA, or in ../shared/data beside the repository."""
    folder = Path(os.environ.get("ZIPCACHE_DATA") or ROOT.parent / "shared" / "data")
    return need(folder / name, f"set ZIPCACHE_DATA to the folder that holds {name}")


def parser(description):
    """The arguments that all scripts take."""
    args = argparse.ArgumentParser(description=description.splitlines()[0])
    args.add_argument("--model", type=Path, default=MODEL)
    args.add_argument("--build", type=Path, default=BUILD, help="build tree of zipcache")
    args.add_argument("--threads", type=int, default=os.cpu_count())
    args.add_argument("--results", type=Path, default=RESULTS, help="folder of the .jsonl files")
    return args


def settings_of(spec):
    """"key-bits=4,3,hold=0" -> {"key-bits": "4,3", "hold": "0"}; "default" -> {}."""
    settings, name = {}, None
    for part in [] if spec in ("", "default") else spec.split(","):
        if "=" in part:
            name, value = part.split("=", 1)
            settings[name] = value
        elif name is None:
            fail(f"policy '{spec}': expected name=value,... or default")
        else:
            settings[name] += "," + part
    return settings


def environment(settings=None):
    """This process's, with no ZIPCACHE_ settings but these."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("ZIPCACHE_", "GGML_BACKEND_"))}
    for name, value in (settings or {}).items():
        env["ZIPCACHE_" + name.replace("-", "_").upper()] = str(value)
    return env


def cpu_model():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown"


def run_meta(build):
    """How a result came about, without paths of this machine."""
    version = subprocess.run([build / "bin" / "zipcache", "version", "-v"], capture_output=True,
                             text=True, env=environment(), check=True).stdout
    rows = dict(line.split(None, 1) for line in version.splitlines() if " " in line)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True,
                            capture_output=True).stdout.strip()
    return {
        "command": " ".join(["eval/" + Path(sys.argv[0]).name, *map(short, sys.argv[1:])]),
        "zipcache": rows.get("zipcache", "?"),
        "commit": commit,
        "llama.cpp": rows.get("llama.cpp", "?"),
        "cpu": cpu_model(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def short(argument):
    return Path(argument).name if os.sep in argument else argument


def append(folder, name, record):
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / name, "a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")


def write(folder, name, records):
    """All records of a file, instead of what it held."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    (folder / name).write_text("".join(lines), encoding="utf-8")


def read(folder, pattern):
    """The records of all files that match, file by file."""
    return [json.loads(line) for path in sorted(folder.glob(pattern))
            for line in path.read_text(encoding="utf-8").splitlines() if line]


def markdown(columns, rows):
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(lines)
