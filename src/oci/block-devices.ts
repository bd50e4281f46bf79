/**
 * Block devices of the host in a spec. Each becomes a drive of the virtual machine, which has another number there; so
 * what names it by its number (linux.devices, the rules of the device cgroup) is translated, and what names it by a path of
 * the host (mounts) as well. Which path of the host is a block device is for the caller to say: no file is read here.
 */
import { posix } from 'node:path';
import { KilnError } from '../errors.ts';
import { isBind } from './binds.ts';
import { virtualFilesystems } from './mount-options.ts';
import type { Device, DeviceRule, Mount, Spec } from './spec.ts';

export interface DeviceNumber {
  readonly major: number;
  readonly minor: number;
}

/** A block device's node on the host. */
export interface HostNode extends DeviceNumber {
  /** The node's permissions and owner. */
  readonly mode: number;
  readonly uid: number;
  readonly gid: number;
}

/** A block device of the host that a container gets, by whatever it asks for it. */
export interface BlockDevice extends DeviceNumber {
  readonly readOnly: boolean;
  /** Where the spec asks for it first, and as what: for messages. */
  readonly at: string;
}

/** A filesystem on such a device, mounted by the guest at a path of its own for the container. */
export interface FilesystemMount {
  /** The device's place in the list. */
  readonly device: number;
  readonly target: string;
  readonly type: string;
  readonly options: readonly string[];
}

/** Which block device a path of the host is; undefined for one that is none. */
export type NodeAt = (path: string) => HostNode | undefined;

/** What a spec asks for that only a block device of the host could be. */
export const blockMountType = 'block';

/** Paths of the host that may be block devices, if anything there is one. */
export function possibleNodes({ mounts = [] }: Spec): string[] {
  return mounts.flatMap((mount) => (mayBeOfNode(mount) ? [mount.source ?? ''] : []));
}

function mayBeOfNode(mount: Mount): boolean {
  const { type = '', source = '' } = mount;
  if (isBind(mount)) return source.startsWith('/dev/');
  return posix.isAbsolute(source) && !virtualFilesystems.has(type);
}

/** All writing is the device's, whatever a rule says of it; the spec's rules are of cgroup v1, where the last one wins. */
function mayWrite(rules: readonly DeviceRule[] | undefined, device: DeviceNumber): boolean {
  const last = rules?.findLast((rule) => concerns(rule, device) && (rule.access || 'rwm').includes('w'));
  return last === undefined ? rules === undefined || rules.length === 0 : last.allow === true;
}

function concerns({ type = 'a', major, minor }: DeviceRule, device: DeviceNumber): boolean {
  if (type !== '' && type !== 'a' && type !== 'b') return false;
  return matches(major, device.major) && matches(minor, device.minor);
}

/** Absent and -1 mean any. */
function matches(wanted: DeviceRule['major'], number: number): boolean {
  return wanted === undefined || wanted < 0 || Number(wanted) === number;
}

/** The spec's block devices, and how to name them in the guest. */
export class BlockDevices {
  readonly list: readonly BlockDevice[];
  /** The spec, in which block devices that are mounted as files are added to linux.devices. */
  readonly spec: Spec;
  readonly filesystems: FilesystemMount[] = [];
  readonly #nodeAt: NodeAt;
  readonly #guestNumbers: readonly DeviceNumber[] | undefined;

  /**
   * @param nodeAt asked for absolute paths
   * @param guestNumbers of the devices in the list, once they are known
   * @throws KilnError invalid-argument for a mount of the type "block" whose source is none
   */
  constructor(given: Spec, nodeAt: NodeAt, guestNumbers?: readonly DeviceNumber[]) {
    this.#nodeAt = nodeAt;
    this.#guestNumbers = guestNumbers;
    const list: BlockDevice[] = [];
    const rules = given.linux?.resources?.devices;
    const add = ({ major, minor }: DeviceNumber, readOnly: boolean, at: string) => {
      const index = list.findIndex((known) => known.major === major && known.minor === minor);
      const known = list[index];
      if (known === undefined) list.push({ major, minor, readOnly, at });
      else list[index] = { ...known, readOnly: known.readOnly && readOnly };
    };
    for (const [index, { path, type, major = 0, minor = 0 }] of (given.linux?.devices ?? []).entries()) {
      const device = { major: Number(major), minor: Number(minor) };
      if (type === 'b') add(device, !mayWrite(rules, device), `linux.devices[${index}]: ${path}`);
    }
    const nodes: Device[] = [];
    const moreRules: DeviceRule[] = [];
    for (const [index, mount] of (given.mounts ?? []).entries()) {
      const { destination, type, source = '', options = [] } = mount;
      const at = `mounts[${index}]: ${destination}`;
      const node = this.nodeOf(mount);
      if (node === undefined && type === blockMountType) {
        throw new KilnError('invalid-argument', `${at}: ${source || 'its source'} is no block device of the host`);
      }
      if (node === undefined) continue;
      const { major, minor, mode, uid, gid } = node;
      const readOnly = options.findLast((option) => option === 'ro' || option === 'rw') === 'ro';
      add(node, readOnly || (isBind(mount) && !mayWrite(rules, node)), at);
      if (!this.isNode(mount)) continue;
      nodes.push({ path: posix.resolve('/', destination), type: 'b', major, minor, fileMode: mode, uid, gid });
      // Who mounts it as a device wants to use it. Who binds its node gets the node, as with runc, and what the rules say.
      if (type === blockMountType)
        moreRules.push({ allow: true, type: 'b', major, minor, access: readOnly ? 'r' : 'rw' });
    }
    this.list = list;
    this.spec = nodes.length === 0 ? given : withNodes(given, nodes, moreRules);
  }

  /** The block device that a mount is of; undefined for any other mount. */
  nodeOf(mount: Mount): HostNode | undefined {
    return mayBeOfNode(mount) ? this.#nodeAt(mount.source ?? '') : undefined;
  }

  /** True for a mount that shows a block device itself, and so is one of `linux.devices` in `spec`. */
  isNode(mount: Mount): boolean {
    return (mount.type === blockMountType || isBind(mount)) && this.nodeOf(mount) !== undefined;
  }

  /** A node of linux.devices in the guest's terms; until its number there is known, with the host's. */
  translateNode(device: Device): Device {
    const index = this.#indexOf({ major: Number(device.major ?? 0), minor: Number(device.minor ?? 0) });
    const number = this.#guestNumbers?.[index];
    return number === undefined ? device : { ...device, major: number.major, minor: number.minor };
  }

  /** The guest mounts it where the container's mount is bound from. */
  addFilesystem(mount: Omit<FilesystemMount, 'device' | 'target'>, node: DeviceNumber, directory: string): string {
    const target = `${directory}/${this.filesystems.length}`;
    this.filesystems.push({ ...mount, device: this.#indexOf(node), target });
    return target;
  }

  /**
   * Rules of the device cgroup: those of block devices by the guest's numbers. The host's numbers name other disks in the
   * guest, so a rule of a device that the container does not have is left out.
   */
  translateRules(rules: readonly DeviceRule[]): readonly DeviceRule[] {
    return rules.flatMap((rule) => {
      if (rule.type !== 'b' || (matches(rule.major, -1) && matches(rule.minor, -1))) return [rule];
      return this.list.flatMap((device, index) => {
        const { major, minor } = this.#guestNumbers?.[index] ?? device;
        return concerns(rule, device) ? [{ ...rule, major, minor }] : [];
      });
    });
  }

  #indexOf({ major, minor }: DeviceNumber): number {
    return this.list.findIndex((known) => known.major === major && known.minor === minor);
  }
}

function withNodes(spec: Spec, nodes: readonly Device[], rules: readonly DeviceRule[]): Spec {
  const { linux = {} } = spec;
  const resources =
    rules.length === 0
      ? linux.resources
      : { ...linux.resources, devices: [...(linux.resources?.devices ?? []), ...rules] };
  return { ...spec, linux: { ...linux, devices: [...(linux.devices ?? []), ...nodes], resources } };
}
