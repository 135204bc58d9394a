#!/usr/bin/env bash
# The tests that take minutes: five seeds of the quickstart.
cd "$(dirname "$0")/.." && exec pytest -m slow "$@"
