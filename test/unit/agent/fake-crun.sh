#!/bin/sh
# Stands in for crun where there is no root: the same command line, real processes, no namespaces. The "container" is
# the spec's third argument, a shell script; its init waits on a FIFO until `start`, as crun's does.
root=$2
log=$5
shift 7
verb=$1
shift
fail() {
  echo "$1" >"$log"
  exit 1
}
case $verb in
create)
  bundle=$2
  pid_file=$4
  id=$5
  mkdir -p "$root/$id"
  script=$(sed -n 's/.*"script":"\([^"]*\)".*/\1/p' "$bundle/config.json")
  case $script in
  nosuch) rm -r "$root/$id"; fail 'executable file `nosuch` not found in $PATH: No such file or directory' ;;
  esac
  mkfifo "$root/$id/exec"
  # A shell gives its background processes /dev/null as stdin unless told otherwise.
  exec 3<&0
  sh -c 'read -r _ <"$0"; exec sh -c "$1" 3<&-' "$root/$id/exec" "$script" <&3 &
  echo $! >"$root/$id/pid"
  cp "$root/$id/pid" "$pid_file"
  ;;
start)
  [ -e "$root/$1/exec" ] || fail "container \`$1\` does not exist"
  echo >"$root/$1/exec"
  ;;
delete)
  [ -e "$root/$2/pid" ] || exit 0
  kill -9 "$(cat "$root/$2/pid")" 2>/dev/null
  rm -r "$root/$2"
  ;;
esac
