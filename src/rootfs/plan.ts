/**
 * Reads a snapshotter's mounts: what a host would mount, in the words of mount(2), becomes what Kiln has to convert.
 *
 * containerd hands a rootfs over as a list of {type, source, options}. In practice it is one of
 *   overlay  lowerdir=TOP:…:BOTTOM, upperdir=, workdir=   an image's layers under a container's own directory
 *   overlay  lowerdir= alone                              a read-only view of several layers
 *   bind     one directory, rw or ro                      the native snapshotter; overlayfs with no or one layer
 * With none at all, root.path of config.json is the container's as it is, and no disk.
 * An option that could change what is in the tree, and that we do not carry out, is refused and never ignored.
 */
import { isAbsolute, resolve } from 'node:path';
import { KilnError } from '../errors.ts';

/** A mount as containerd hands it over (containerd.types.Mount). */
export interface SnapshotMount {
  readonly type: string;
  readonly source: string;
  readonly options: readonly string[];
}

/** What the container's read-only disk is made of. */
export type LowerSource =
  | {
      readonly kind: 'overlay';
      /** Absolute paths, topmost layer first. Committed snapshots: their content never changes. */
      readonly layers: readonly string[];
      /** Opaque marks are in user.overlay.* instead of trusted.overlay.* (containerd in a user namespace). */
      readonly userxattr: boolean;
    }
  | {
      readonly kind: 'directory';
      readonly path: string;
      /** False when somebody may still write there, so that it is converted afresh for each create. */
      readonly immutable: boolean;
    };

/** Where the container's writable disk lives. */
export type WritableSource =
  /** A file in this directory, which goes when the snapshot goes. */
  | { readonly kind: 'in-directory'; readonly directory: string }
  /** A file in Kiln's cache that belongs to this snapshot directory, whose own content is the rootfs. */
  | { readonly kind: 'of-snapshot'; readonly snapshot: string };

/** The container's own directory on the host, which the host's tools take for what it has written. */
export interface UpperDirectory {
  readonly path: string;
  /** On the same filesystem; goes when the snapshot goes. */
  readonly work: string;
  /** As of LowerSource. */
  readonly userxattr: boolean;
}

export interface RootfsPlan {
  readonly lower: LowerSource;
  /** null: a read-only view, nothing can be written. */
  readonly writable: WritableSource | null;
  /** null: the snapshotter keeps what a container writes in no directory of its own. */
  readonly upper: UpperDirectory | null;
}

/** Flags of mount(8) that cannot change what a tree holds; the guest sets its own. */
const neutralFlags = new Set(
  'bind rbind private rprivate slave rslave shared rshared suid nosuid dev nodev exec noexec atime noatime relatime norelatime strictatime diratime nodiratime sync async'.split(
    ' ',
  ),
);

/** Overlay options that are about the host's kernel objects, not about content. */
const neutralOverlayOptions =
  /^(index|xino|nfs_export|uuid|verity)=|^volatile$|^(redirect_dir|metacopy)=(off|nofollow)$/;

const hint = 'use the overlayfs or the native snapshotter';

/**
 * Decides what the disks of a container are made of. Looks at no file.
 *
 * @throws KilnError unimplemented for a mount or option that Kiln cannot turn into a disk, invalid-argument for one that
 *   makes no sense
 */
export function planRootfs(mounts: readonly SnapshotMount[]): RootfsPlan {
  const [mount] = mounts;
  if (mount === undefined) throw new KilnError('invalid-argument', 'there is no mount of a root filesystem');
  const foreign = mounts.find(({ type }) => type !== 'overlay' && type !== 'bind');
  if (foreign !== undefined) {
    throw new KilnError('unimplemented', `${describe(foreign)} is not supported as a root filesystem`, { hint });
  }
  if (mounts.length > 1) {
    const list = mounts.map(describe).join(', ');
    throw new KilnError('unimplemented', `a root filesystem of ${mounts.length} mounts is not supported: ${list}`, {
      hint,
    });
  }
  return mount.type === 'overlay' ? planOverlay(mount) : planBind(mount);
}

function planBind(mount: SnapshotMount): RootfsPlan {
  const path = absolute(mount.source, `the source of ${describe(mount)}`);
  const readOnly = isReadOnly(mount);
  for (const option of mount.options) refuseUnknown(mount, option);
  return {
    lower: { kind: 'directory', path, immutable: readOnly },
    writable: readOnly ? null : { kind: 'of-snapshot', snapshot: path },
    upper: null,
  };
}

function planOverlay(mount: SnapshotMount): RootfsPlan {
  const values = new Map<string, string>();
  let userxattr = false;
  for (const option of mount.options) {
    const match = /^(lowerdir|upperdir|workdir)=(.*)$/s.exec(option);
    if (match !== null) values.set(match[1] ?? '', match[2] ?? '');
    else if (option === 'userxattr') userxattr = true;
    else if (!neutralOverlayOptions.test(option)) refuseUnknown(mount, option);
  }
  const layers = splitLowerdir(values.get('lowerdir') ?? '').map((layer) => absolute(layer, 'lowerdir of the overlay'));
  if (layers.length === 0)
    throw new KilnError('invalid-argument', 'the overlay of the root filesystem has no lowerdir');
  const upper = values.get('upperdir');
  if (upper === undefined || isReadOnly(mount)) {
    return { lower: { kind: 'overlay', layers, userxattr }, writable: null, upper: null };
  }
  const work = values.get('workdir');
  if (work === undefined) {
    throw new KilnError('invalid-argument', `the overlay of the root filesystem has upperdir=${upper} but no workdir`);
  }
  const directory = absolute(unescaped(work), 'workdir of the overlay');
  return {
    lower: { kind: 'overlay', layers, userxattr },
    writable: { kind: 'in-directory', directory },
    upper: { path: absolute(unescaped(upper), 'upperdir of the overlay'), work: directory, userxattr },
  };
}

/** overlayfs separates layers by colons; a backslash takes the meaning from the character after it. */
function splitLowerdir(value: string): string[] {
  const layers: readonly string[] = value.match(/(?:\\.|[^:\\])+|:(?=:)/gs) ?? [];
  if (layers.includes(':')) {
    throw new KilnError('unimplemented', `data-only layers ("::") in lowerdir=${value} are not supported`, { hint });
  }
  return layers.map(unescaped);
}

function unescaped(value: string): string {
  return value.replaceAll(/\\(.)/gs, '$1');
}

function isReadOnly(mount: SnapshotMount): boolean {
  // As in mount(8), the last one counts.
  return mount.options.findLast((option) => option === 'ro' || option === 'rw') === 'ro';
}

function refuseUnknown(mount: SnapshotMount, option: string): void {
  const isSecurityLabel = /^(context|fscontext|defcontext|rootcontext)=/.test(option);
  if (option === 'ro' || option === 'rw' || neutralFlags.has(option) || isSecurityLabel) return;
  if (/^[ug]idmap=/.test(option)) {
    throw new KilnError('unimplemented', `${describe(mount)}: id-mapped layers (${option}) are not supported`, {
      hint: 'the container already has a kernel of its own; run it without a user namespace (hostUsers: true)',
    });
  }
  throw new KilnError('unimplemented', `${describe(mount)}: the option "${option}" is not supported`, { hint });
}

function absolute(path: string, what: string): string {
  if (isAbsolute(path)) return resolve(path);
  throw new KilnError('invalid-argument', `${what} must be an absolute path, not "${path}"`);
}

function describe({ type, source }: SnapshotMount): string {
  return `a mount of type "${type}" from "${source}"`;
}
