#!/bin/sh
# Stands in for crun where there is no root: the same command line, real processes, no namespaces. The "container" is
# the script in its spec, for sh; its init waits on a FIFO until `start`, as crun's does. An exec'd process is a
# script as well. A terminal is made by fake-console.c ($FAKE_CONSOLE).
root=$2
log=$5
shift 7
verb=$1
shift
fail() {
  echo "$1" >"$log"
  exit 1
}
# In any order: --bundle B, --process P, --pid-file F, --console-socket S, --detach, --force; then the id.
console=
while [ $# -gt 1 ]; do
  case $1 in
  --bundle) spec=$2/config.json && shift ;;
  --process) spec=$2 && shift ;;
  --pid-file) pid_file=$2 && shift ;;
  --console-socket) console=$2 && shift ;;
  esac
  shift
done
id=$1
# Sets `script`; a program that does not exist is refused as crun does it.
read_script() {
  script=$(sed -n 's/.*"script":"\([^"]*\)".*/\1/p' "$spec")
  case $script in
  nosuch) fail 'executable file `nosuch` not found in $PATH: No such file or directory' ;;
  killed) kill -9 $$ ;;
  esac
}
# Leaves a process behind and writes its id: with this shell's stdio, or with a terminal.
spawn() {
  # The directory that crun is started in may be removed while the process lives.
  cd / || exit 1
  if [ -n "$console" ]; then
    "$FAKE_CONSOLE" "$console" "$@" >"$pid_file" || fail "no terminal at $console"
  else
    # A shell gives its background processes /dev/null as stdin unless told otherwise.
    exec 3<&0
    "$@" <&3 3<&- &
    echo $! >"$pid_file"
  fi
}
case $verb in
create)
  read_script
  mkdir -p "$root/$id"
  mkfifo "$root/$id/exec"
  spawn sh -c 'read -r _ <"$0"; exec sh -c "$1"' "$root/$id/exec" "$script"
  cp "$pid_file" "$root/$id/pid"
  ;;
exec)
  [ -e "$root/$id/pid" ] || fail "container \`$id\` does not exist"
  read_script
  # The script runs when this shell has ended, which closes the FIFO: a shell waits for each of its children that ends,
  # and then that is nobody's child any more.
  gate=$(dirname "$pid_file")/gate
  mkfifo "$gate"
  spawn sh -c 'read -r _ <"$0"; exec sh -c "$1"' "$gate" "$script"
  exec 4>"$gate"
  ;;
start)
  [ -e "$root/$id/exec" ] || fail "container \`$id\` does not exist"
  echo >"$root/$id/exec"
  ;;
delete)
  [ -e "$root/$id/pid" ] || exit 0
  [ -e "$root/$id/stuck" ] && fail 'Device or resource busy'
  kill -9 "$(cat "$root/$id/pid")" 2>/dev/null
  rm -r "$root/$id"
  ;;
esac
