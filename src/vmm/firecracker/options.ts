import type { Logger } from '../../observe/logger.ts';
import { makePersistentTaps, type Parking } from '../cards.ts';
import { type HostDevices, hostDevices } from '../host-devices.ts';
import { type JailHost, jailHost } from './jail.ts';
import type { UidRange } from './jail-uids.ts';
import type { RateLimits } from './rate-limiter.ts';

export interface FirecrackerOptions {
  /** Program name or path. */
  readonly firecracker: string;
  /**
   * Asked at each start. Undefined starts it on the host as it is: as this user, confined by its own seccomp filter alone.
   */
  readonly jail: () => JailSettings | undefined;
  /** Of each of a container's disks. */
  readonly diskLimits: RateLimits;
  /** Of each network card, for what it sends and for what it gets. */
  readonly networkLimits: RateLimits;
  /** Has each guest tell when its first program starts, which goes into the log. */
  readonly bootTimer: boolean;
  /** Guest memory in pages of 2 MiB from the host's pool. */
  readonly hugePages: boolean;
  /** Up to what a VM's memory can grow while it runs, in MiB; no more than it has from its start is not at all. */
  readonly memoryMaxMib: number;
  /** Where Firecracker runs, and the taps of network cards wait. */
  readonly parking: Parking;
  /** Gets Firecracker's own log, and its failures. */
  readonly logger: Logger;
  /** Gets what each of its VMs counts, as it counts it. */
  readonly count?: (counter: string, by: number) => void;
}

export interface JailSettings {
  /** Absolute path of the jailer. */
  readonly jailer: string;
  /** What user ids its VMs may have. */
  readonly uids: UidRange;
}

/** The host that VMs run on. Another one is for tests. */
export interface FirecrackerHost {
  readonly devices: HostDevices;
  readonly jails: JailHost;
  readonly makeTaps: typeof makePersistentTaps;
}

export const thisHost: FirecrackerHost = { devices: hostDevices, jails: jailHost, makeTaps: makePersistentTaps };
