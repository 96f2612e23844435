#!/usr/bin/env bash
# Makes sure the packages that the build needs are installed (Debian 12 or later).
# Nothing is fetched when nothing is missing, so that repeated calls cost milliseconds.
set -euo pipefail

packages=(
  g++ cmake ninja-build python3 python3-pip
  libcli11-dev libfmt-dev nlohmann-json3-dev libxxhash-dev libzstd-dev zlib1g-dev
  libgtest-dev libbenchmark-dev
)

if ! command -v dpkg-query >/dev/null; then
  echo "setup: not a Debian system; please make sure that these are installed: ${packages[*]}" >&2
  exit 0
fi

missing=()
for package in "${packages[@]}"; do
  status=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
  [[ $status == installed ]] || missing+=("$package")
done

if ((${#missing[@]} == 0)); then
  echo "setup: all packages are installed"
  exit 0
fi

if ((EUID != 0)); then
  echo "setup: missing packages; run: sudo apt-get install --no-install-recommends ${missing[*]}" >&2
  exit 1
fi

echo "setup: installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
apt-get update -q
apt-get install -q -y --no-install-recommends "${missing[@]}"
echo "setup: done"
