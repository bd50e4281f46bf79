import { closeSync, fchmodSync, ftruncateSync, mkdirSync, openSync } from 'node:fs';
import { rm } from 'node:fs/promises';
import path from 'node:path';
import { type HelperProcess, startHelper } from '../../host/helper-process.ts';
import { mkfifo } from '../../sys/fifo.ts';
import type { Parking } from '../cards.ts';
import type { SlotName } from '../vmm.ts';

/** One file under its two paths. */
export interface Seen {
  /** Kiln's. */
  readonly host: string;
  /** Firecracker's. */
  readonly inside: string;
}

/** Where a Firecracker runs, and what it sees there: the host as it is, or a jail. Disposing it leaves nothing of it. */
export interface Place extends AsyncDisposable {
  /** The user id of the jail; undefined where Firecracker runs as we do. */
  readonly uid: number | undefined;
  /** The sockets, made when the VM starts. */
  readonly apiSocket: Seen;
  readonly vsock: Seen;
  /** Makes a file of the host readable for Firecracker and returns its path for it. */
  show(name: BootFile | SnapshotFile | 'guest', file: string): Promise<string>;
  /** As `show`, and writable. The file stays whose it is. */
  lend(name: SnapshotFile, file: string): Promise<string>;
  /** Takes a file back that Firecracker needs no more; nothing there is no error. */
  hide(name: BootFile | SnapshotFile): void;
  /** Makes an empty file, for a drive that has none yet. */
  makeEmpty(slot: SlotName, size: { readonly bytes: number; readonly readOnly: boolean }): string;
  /** Makes a file or a block device usable behind a slot; what is returned is what Firecracker opens. */
  fill(slot: SlotName, file: string, readOnly: boolean): Promise<Seen>;
  /** Takes back what `fill` has made: the empty file is there again. Returns its path for Firecracker. */
  clear(slot: SlotName): string;
  /** Makes a FIFO that Firecracker writes to. */
  makeFifo(name: FifoName): Seen;
  /** The FIFO that was made earlier. */
  fifo(name: FifoName): Seen;
  /** Lets Firecracker connect to a socket of ours. */
  admit(socket: string): void;
  /** Starts Firecracker. Throws the errors of `startHelper`, and `internal` with the words of a program that ended. */
  start(args: readonly string[], signal: AbortSignal): Promise<HelperProcess>;
}

export type BootFile = 'kernel' | 'initrd';
export type SnapshotFile = 'memory' | 'state';
export type FifoName = 'log' | 'metrics';

/** What Firecracker itself prints, and the guest on its serial port. */
export const logName = 'vmm.log';

export const firecrackerTitle = 'Firecracker (vm.firecracker in the config file)';

export interface OpenPlaceOptions {
  /** Program name or path. */
  readonly program: string;
  /** Firecracker's --id. */
  readonly id: string;
  readonly directory: string;
  /**
   * Firecracker knows drive slots and vsock by paths below the VM's directory, which are the same for every VM. What it
   * saves can then be restored in the directory of another VM.
   */
  readonly portable: boolean;
  /** The network namespace that Firecracker runs in. */
  readonly network: Parking;
}

/** The host as it is. */
export function openPlace(directory: string, options?: Omit<OpenPlaceOptions, 'directory'>): Place {
  const { program = '', id = '', portable = false, network } = options ?? {};
  const own = (name: string) => path.join(directory, name);
  const seen = (file: string): Seen => ({ host: file, inside: file });
  const saved = (name: string): Seen => ({ host: own(name), inside: portable ? name : own(name) });
  const slots = own('slots');
  const apiSocket = seen(own('fc.sock'));
  const vsock = saved('vsock');
  const fifo = (name: FifoName) => seen(own(`${name}.fifo`));
  return {
    ...{ uid: undefined, apiSocket, vsock, fifo },
    show: async (_name, file) => file,
    lend: async (_name, file) => file,
    hide: () => {},
    makeEmpty(slot, { bytes }) {
      mkdirSync(slots, { recursive: true, mode: 0o700 });
      const empty = saved(path.join('slots', slot));
      makeSparse(empty.host, bytes, 0o600);
      return empty.inside;
    },
    fill: async (_slot, file) => seen(file),
    clear: (slot) => saved(path.join('slots', slot)).inside,
    makeFifo(name) {
      mkfifo(fifo(name).host, 0o600);
      return fifo(name);
    },
    admit: () => {},
    start(args) {
      return startHelper({
        ...{ program, directory, logName, title: firecrackerTitle },
        args: ['--id', id, '--api-sock', apiSocket.inside, ...args],
        hint: 'install Firecracker, or set vm.vmm = "qemu"',
        ...(portable ? { workingDirectory: directory } : {}),
        ...(network === undefined ? {} : { network }),
      });
    },
    async [Symbol.asyncDispose]() {
      const left = [slots, apiSocket.host, vsock.host, fifo('log').host, fifo('metrics').host];
      for (const file of left) await rm(file, { recursive: true, force: true });
    },
  };
}

/** A file of that length which takes no space, of that mode whatever the umask. */
export function makeSparse(file: string, bytes: number, mode: number): string {
  const fd = openSync(file, 'wx', mode);
  try {
    fchmodSync(fd, mode);
    ftruncateSync(fd, bytes);
  } finally {
    closeSync(fd);
  }
  return file;
}
