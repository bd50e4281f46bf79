# Debian packages: installing what the host lacks, and unpacking packages of any suite beside the host's own.
# Needs common.sh. Callers hold the lock (take_lock).
# shellcheck shell=bash

KILN_APT=$KILN_CACHE/apt
# What a run of apt may always do: try again, wait for another apt, ask nothing.
APT_OPTIONS=(-q -o APT::Get::Assume-Yes=true -o Acquire::Retries=3 -o DPkg::Lock::Timeout=600 -o APT::Color=0)

# apt_quietly COMMAND...: runs it and shows its output only when it fails.
apt_quietly() {
  local log
  log=$(mktemp)
  if ! DEBIAN_FRONTEND=noninteractive "$@" >"$log" 2>&1 </dev/null; then
    cat "$log" >&2
    rm -f "$log"
    return 1
  fi
  rm -f "$log"
}

# apt_missing PKG...: prints those that are not installed.
apt_missing() {
  local pkg
  for pkg in "$@"; do
    dpkg-query -W -f '${db:Status-Status}\n' "$pkg" 2>/dev/null | grep -qx installed || echo "$pkg"
  done
}

# apt_install PKG...: installs those that are missing, and nothing else. Refreshes the host's package lists only when
# the install does not work without.
apt_install() {
  local missing
  mapfile -t missing < <(apt_missing "$@")
  [ "${#missing[@]}" -eq 0 ] && return 0
  say "installing Debian packages: ${missing[*]}"
  local install=(apt-get "${APT_OPTIONS[@]}" --no-install-recommends install "${missing[@]}")
  if apt_quietly "${install[@]}" 2>/dev/null; then return 0; fi
  apt_quietly apt-get "${APT_OPTIONS[@]}" update || warn "apt-get update failed; trying with the lists that are there"
  apt_quietly "${install[@]}" || die "apt-get could not install: ${missing[*]}"
}

# host_suite: the code name of the host's Debian, e.g. bookworm. Empty VERSION_CODENAME means testing or unstable.
host_suite() {
  (
    . /etc/os-release
    echo "${VERSION_CODENAME:-unstable}"
  )
}

# host_sources: the host's APT sources as one line each: URIs|suites|components|signed-by|other options.
# A Signed-By with an embedded key keeps its line ends as \x01.
host_sources() {
  local file
  for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
    if [ -r "$file" ]; then sed -nE 's/[[:space:]]*#.*//; s/^[[:space:]]*deb[[:space:]]+//p' "$file"; fi
  done | awk '
    {
      signed = ""; trusted = ""
      if (match($0, /^\[[^]]*\][ \t]*/)) {
        n = split(substr($0, 2, index($0, "]") - 2), option, /[ \t]+/)
        for (i = 1; i <= n; i++) {
          if (option[i] ~ /^signed-by=/) signed = substr(option[i], 11)
          if (option[i] ~ /^trusted=/) trusted = substr(option[i], 9)
        }
        $0 = substr($0, RLENGTH + 1)
      }
      components = ""
      for (i = 3; i <= NF; i++) components = components " " $i
      print $1 "|" $2 "|" components "|" signed "|" trusted
    }'
  for file in /etc/apt/sources.list.d/*.sources; do
    # The blank line keeps the last stanza of one file and the first of the next apart.
    if [ -r "$file" ]; then cat "$file" && echo; fi
  done | awk '
    function flush() {
      if (field["types"] ~ /(^|[ \t])deb($|[ \t])/ && tolower(field["enabled"]) !~ /^(no|false|0)/)
        print field["uris"] "|" field["suites"] "|" field["components"] "|" field["signed-by"] "|" field["trusted"]
      split("", field); name = ""
    }
    /^#/ { next }
    /^[ \t]*$/ { flush(); next }
    /^[ \t]/ {
      # Continuation lines: a key keeps its shape, a list is one line.
      field[name] = field[name] (name == "signed-by" ? "\001" : " ") $0; next
    }
    {
      colon = index($0, ":"); name = tolower(substr($0, 1, colon - 1))
      value = substr($0, colon + 1); gsub(/^[ \t]+|[ \t]+$/, "", value); field[name] = value
    }
    END { flush() }'
}

# suite_sources SUITE: the same archives for SUITE, as deb822 text: only entries of Debian itself, only main.
# The host's own base entry becomes SUITE, its -security and -updates entries follow where SUITE has them.
suite_sources() {
  local suite=$1 host uris suites components signed trusted one new
  host=$(host_suite)
  while IFS='|' read -r uris suites components signed trusted; do
    [[ " $components " == *' main '* || $components == main ]] || continue
    [[ $uris =~ (^|/)debian(-security)?(/|[[:space:]]|$) ]] || continue
    new=
    for one in $suites; do
      case $one in
        "$host" | stable | testing | unstable | sid) new+=" $suite" ;;
        "$host-security" | "$host/updates" | stable-security) [[ $suite =~ ^(unstable|sid)$ ]] || new+=" $suite-security" ;;
        "$host-updates" | stable-updates) [[ $suite =~ ^(unstable|sid)$ ]] || new+=" $suite-updates" ;;
      esac
    done
    [ -n "$new" ] || continue
    printf 'Types: deb\nURIs: %s\nSuites:%s\nComponents: main\nTargets: Packages\n' "$uris" "$new"
    if [ -n "$signed" ]; then printf 'Signed-By: %s\n' "${signed//$'\x01'/$'\n'}"; fi
    if [ -n "$trusted" ]; then printf 'Trusted: %s\n' "$trusted"; fi
    echo
  done < <(host_sources)
}

# private_apt SUITE COMMAND...: apt with lists, cache, state and sources of its own, which knows nothing of the host's
# installed packages. The host's proxies and keys stay in force.
private_apt() {
  local dir=$KILN_APT/$1 tool=$2
  shift 2
  "$tool" "${APT_OPTIONS[@]}" -o Dir::Etc::SourceList="$dir/kiln.sources" -o Dir::Etc::SourceParts=/dev/null \
    -o Dir::Etc::Preferences=/dev/null -o Dir::Etc::PreferencesParts=/dev/null \
    -o Dir::State="$dir/state" -o Dir::State::Lists="$dir/lists" -o Dir::State::status="$dir/status" \
    -o Dir::Cache="$dir/cache" -o APT::Architecture=amd64 -o APT::Architectures::=amd64 -o Acquire::Languages=none \
    -o Acquire::PDiffs=false -o APT::Sandbox::User=root -o Dir::Log="$dir" -o APT::Install-Recommends=false "$@"
}

# private_update SUITE: fetches the lists of SUITE, once a day at most and again when the host's sources changed.
private_update() {
  local suite=$1 dir=$KILN_APT/$1 sources
  sources=$(suite_sources "$suite")
  [ -n "$sources" ] || die "no Debian entry with the component main in /etc/apt/sources.list or /etc/apt/sources.list.d"
  mkdir -p "$dir/state" "$dir/lists/partial" "$dir/cache/archives/partial"
  : >"$dir/status"
  if [ -n "$(find "$dir/updated" -mtime -1 2>/dev/null)" ] && is_fresh "$dir/kiln.sources" "$sources"; then return 0; fi
  say "fetching the package lists of Debian $suite"
  mark_fresh "$dir/kiln.sources" "$sources"
  # apt-get update reports success with warnings when an index could not be had; --error-on=any makes it say so.
  apt_quietly private_apt "$suite" apt-get update --error-on=any || die "could not fetch the package lists of Debian $suite"
  touch "$dir/updated"
}

# fetch_deb SUITE OUTDIR PKG...: unpacks the packages of SUITE (host: the host's own suite) into OUTDIR, a folder that
# becomes wholly ours. Nothing is installed. OUTDIR.packages lists what was unpacked, one "name version" a line. Does
# nothing when OUTDIR already has it, unless KILN_REFRESH is set.
#   PKG   that package        +PKG   and all its dependencies        @PKG   the first package PKG depends on
fetch_deb() {
  local suite=$1 out=$2
  shift 2
  [ "$suite" = host ] && suite=$(host_suite)
  local request="$suite $*"
  [ -z "${KILN_REFRESH:-}" ] && is_fresh "$out.request" "$request" && [ -d "$out" ] && return 0
  private_update "$suite"
  local pkg wanted downloads=$KILN_APT/$suite/download
  mapfile -t wanted < <(
    for pkg in "$@"; do
      case $pkg in
        # Against an empty package database, "install" names the whole closure.
        +*) private_apt "$suite" apt-get install --simulate "${pkg#+}" | awk '$1 == "Inst" { print $2 }' ;;
        @*) private_apt "$suite" apt-cache depends "${pkg#@}" | awk '$1 == "Depends:" { print $2; exit }' ;;
        *) echo "$pkg" ;;
      esac
    done | sort -u
  )
  [ -n "${wanted[*]}" ] || die "Debian $suite has no package for: $*"
  say "fetching from Debian $suite: ${wanted[*]}"
  rm -rf "$downloads" "$out.new"
  mkdir -p "$downloads" "$out.new"
  (cd "$downloads" && apt_quietly private_apt "$suite" apt-get download "${wanted[@]}") ||
    die "could not download from Debian $suite: ${wanted[*]}"
  for pkg in "$downloads"/*.deb; do
    dpkg -x "$pkg" "$out.new"
    # shellcheck disable=SC2016
    dpkg-deb -W --showformat='${Package} ${Version}\n' "$pkg"
  done | sort >"$out.packages"
  rm -rf "$downloads" "$out"
  mv "$out.new" "$out"
  mark_fresh "$out.request" "$request"
}
