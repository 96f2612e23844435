#!/usr/bin/env bash
# Fails when a file of the project names a package registry's host (package managers reach
# registries as the user configured them) or a path that exists only on somebody's machine.
set -euo pipefail
cd "$(dirname "$0")/.."

# The bracketed letters keep the patterns from finding themselves.
patterns=(
  '(pyp[i]|pythonhoste[d]|anacond[a]|npmj[s]|crate[s]|rubygem[s]|docke[r]|ghc[r]|qua[y])\.(org|com|io)'
  '(archive|security|deb|ftp)\.(debia[n]|ubunt[u])\.(org|com)'
  '(^|[^A-Za-z0-9_.}-])/(wor[k]|roo[t]|home/[a-z]+)/'
  '/tmp/d[l](/|$|[^A-Za-z0-9_])'
)

status=0
for pattern in "${patterns[@]}"; do
  if git grep --untracked -nIE -e "$pattern" -- .; then
    status=1
  fi
done
if ((status != 0)); then
  echo "words: the lines above name a registry host or a path of one machine" >&2
  exit 1
fi
echo "words: clean"
