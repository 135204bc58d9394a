#!/usr/bin/env bash
# The tests that take minutes: five seeds of the quickstart, BatchNorm over several processes.
cd "$(dirname "$0")/.." && exec pytest -m slow "$@"
