# The guest's kernel, initrd and image. Needs common.sh and apt.sh; callers hold the lock.
# shellcheck shell=bash

# One Debian release for the guest on every host, so that all run the same kernel and the same crun. Another one, or
# "host" for the host's own: KILN_GUEST_SUITE.
KILN_GUEST_SUITE=${KILN_GUEST_SUITE:-bookworm}
GUEST_CACHE=$KILN_CACHE/guest

fetch_guest_packages() {
  fetch_deb "$KILN_GUEST_SUITE" "$GUEST_CACHE/kernel" @linux-image-amd64
  fetch_deb "$KILN_GUEST_SUITE" "$GUEST_CACHE/packages" +crun +tini +busybox-static +libstdc++6
}

# build_guest: makes what is out of date in dist/guest. Its own inputs come from fetch_guest_packages and scripts/build.
build_guest() {
  local lib=$KILN_ROOT/scripts/lib src=$KILN_DIST/guest-src guest=$KILN_DIST/guest tools key
  command -v mkfs.erofs >/dev/null || die "mkfs.erofs is not installed; run: npm run setup"
  tools=$(hash_of "$lib/guest.ts" "$lib/kernel.ts" "$lib/cpio.ts" "$src/kiln-init" "$GUEST_CACHE/kernel.packages")
  if ! is_fresh "$GUEST_CACHE/boot.stamp" "$tools" || [ ! -f "$guest/vmlinux" ] || [ ! -f "$guest/initrd" ]; then
    say 'making the guest kernel and initrd'
    "$KILN_NODE" "$lib/guest.ts" boot "$GUEST_CACHE/kernel"
    mark_fresh "$GUEST_CACHE/boot.stamp" "$tools"
  fi
  key=$tools$(hash_of "$src/agent.cjs" "$src/kiln-mount-volumes" "$src/kiln-listeners" "$src/kiln-nameservers" "$src/kiln-oom-score" "$src/kiln-joined-writes.so" "$src/libsystemd.so" "$src/koffi.node" "$GUEST_CACHE/packages.packages" "$KILN_ROOT/package-lock.json")
  if ! is_fresh "$GUEST_CACHE/image.stamp" "$key" || [ ! -f "$guest/guest.erofs" ]; then
    say 'making the guest image'
    "$KILN_NODE" "$lib/guest.ts" image "$GUEST_CACHE/kernel" "$GUEST_CACHE/packages" "$GUEST_CACHE/root"
    mark_fresh "$GUEST_CACHE/image.stamp" "$key"
  fi
}
