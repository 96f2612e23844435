#!/bin/sh
# Usage: keep_log.sh OBJECT COMMAND...
#
# Runs COMMAND, which makes OBJECT; what it prints is also kept in OBJECT.log.
object=$1
shift
"$@" >"$object.log" 2>&1
status=$?
cat "$object.log"
exit "$status"
