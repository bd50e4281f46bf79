import type { PreparedRootfs } from './store.ts';

/** One mount of a container's root filesystem, in the guest's terms; done in the order of the list. */
export interface RootfsMount {
  /** A disk of the VM by its serial, or any other source for mount(2). */
  readonly source: { readonly disk: string } | { readonly device: string };
  readonly target: string;
  readonly type: 'erofs' | 'ext4' | 'overlay';
  readonly options: readonly string[];
  /** Directories below target to create after the mount. */
  readonly directories: readonly string[];
}

/** The serials by which the guest knows the container's disks. */
export interface RootfsSerials {
  /** Not looked at when the root filesystem has no disks. */
  readonly lower?: string | undefined;
  /** Not looked at when the root filesystem has no writable disk. */
  readonly writable?: string | undefined;
}

/** The guest directory of a container's root filesystem: root.path of its spec in the guest. */
export function guestRootDirectory(containerId: string): string {
  return `${containerDirectory(containerId)}/rootfs`;
}

function containerDirectory(containerId: string): string {
  return `/run/kiln/roots/${containerId}`;
}

/** The mounts that make a container's root filesystem at `guestRootDirectory(containerId)`. */
export function guestMounts(
  prepared: Pick<PreparedRootfs, 'lower' | 'writable'>,
  containerId: string,
  serials: RootfsSerials,
): RootfsMount[] {
  if (prepared.lower === null) return [];
  const { lower } = serials;
  if (lower === undefined) throw new Error(`the disk of container ${containerId} is not attached`);
  const base = containerDirectory(containerId);
  const root = guestRootDirectory(containerId);
  const erofs = (target: string): RootfsMount => ({
    source: { disk: lower },
    target,
    type: 'erofs',
    options: ['ro'],
    directories: [],
  });
  if (prepared.writable === null) return [erofs(root)];
  if (serials.writable === undefined) throw new Error(`the writable disk of container ${containerId} is not attached`);
  return [erofs(`${base}/lower`), ...writableMounts(`${base}/lower`, containerId, serials.writable)];
}

/**
 * The mounts that put a writable disk over a directory of the guest, at `guestRootDirectory(containerId)`.
 *
 * @param disk its serial
 */
export function writableMounts(lower: string, containerId: string, disk: string): RootfsMount[] {
  const base = containerDirectory(containerId);
  return [
    {
      source: { disk },
      target: `${base}/rw`,
      type: 'ext4',
      // noinit_itable: the file is sparse, so its inode tables are zero already; the kernel's background thread would
      // write them out in full. discard: deleted files give their space back to the host.
      options: ['rw', 'relatime', 'noinit_itable', 'discard'],
      directories: ['upper', 'work'],
    },
    {
      source: { device: 'overlay' },
      target: guestRootDirectory(containerId),
      type: 'overlay',
      options: [`lowerdir=${lower}`, `upperdir=${base}/rw/upper`, `workdir=${base}/rw/work`],
      directories: [],
    },
  ];
}
