/**
 * The host's files in a sandbox: one file server, started when the first container needs it, and one 9P session with the
 * guest. See docs/volumes.md.
 */
import { realpath, stat } from 'node:fs/promises';
import { setTimeout as delay } from 'node:timers/promises';
import { forLog, KilnError } from '../errors.ts';
import type { ControlGroup } from '../host/control-group.ts';
import { SingleFlight } from '../host/single-flight.ts';
import type { Logger } from '../observe/logger.ts';
import { guestsOwn, type VolumeMount } from '../oci/binds.ts';
import { guestVolumesDirectory } from '../oci/guest-spec.ts';
import { fileError } from '../rootfs/file-error.ts';
import type { Vm } from '../vmm/vmm.ts';

/** What a guest keeps of the host's files. One for all volumes of a VM, since they are one mount of its kernel's. */
export const volumeCaches = ['mmap', 'none', 'loose'] as const;
export type VolumeCache = (typeof volumeCaches)[number];

/**
 * The longest 9P message, in bytes. v9fs of Linux 6.1 needs each in one piece of memory (net/9p/client.c, p9_fcall_init), and
 * this is the largest that the page allocator goes on looking for until there is one (PAGE_ALLOC_COSTLY_ORDER of
 * include/linux/mmzone.h, pages of 4 KiB). With longer ones, reading a file is ENOMEM in a guest whose memory is in pieces.
 */
const messageBytes = 32 * 1024;

/**
 * v9fs's mount options. See docs/volumes.md for what they were chosen by: with "mmap" files are read from the host at each
 * read, and written there at each write, and yet can be mapped for writing.
 */
export function volumeOptions(cache: VolumeCache): string {
  return `access=client,cache=${cache},msize=${messageBytes}`;
}

/** What the file server is told of a volume. */
export type Volume = Omit<VolumeMount, 'destination'>;

/** What a later kilnd needs to find a file server again: JSON, and nobody's business but the server's. */
export type FileServerRecord = Readonly<Record<string, unknown>>;

/** A program that serves the files of one sandbox's volumes, and no others, to one guest. */
export interface FileServer extends AsyncDisposable {
  /** Resolves when it has ended, with the reason for a log; never rejects. */
  readonly ended: Promise<string>;
  /** Adds volumes, and returns the numbers by which the guest knows them. */
  add(volumes: readonly Volume[]): Promise<readonly number[]>;
  /** Takes volumes away that nobody in the guest uses any more. Those that are gone are no error. */
  remove(numbers: readonly number[]): Promise<void>;
  /** Serves the guest at the other end of a descriptor, which is the server's then. Once. */
  serve(fd: number): Promise<void>;
  record(): FileServerRecord;
}

export interface FileServerOptions {
  /** A private directory that is the sandbox's; the server's process is known by it. */
  readonly directory: string;
  /** The control group that the server is in. */
  readonly controlGroup?: ControlGroup | undefined;
  readonly logger: Logger;
}

/** src/volume/ has them. */
export interface FileServers {
  start(options: FileServerOptions): Promise<FileServer>;
  /** One of an earlier kilnd. Rejects with `not-found` when it has ended. */
  adopt(record: FileServerRecord, options: FileServerOptions): Promise<FileServer>;
}

/** How much later than its server's end a VM's own may be seen, in ms. */
const vmEndGraceMs = 500;

/** The state of a sandbox's volumes, for a later kilnd. */
export interface VolumesRecord {
  readonly server: FileServerRecord;
  /** It has got its guest. */
  readonly connected: boolean;
}

const kinds = [
  ['isSocket', 'a socket', 'a program in a virtual machine cannot connect to a socket of the host'],
  ['isFIFO', 'a FIFO', 'a FIFO ends at the kernel that has it'],
  ['isBlockDevice', 'a block device', 'it can be had by linux.devices, or by its path below /dev'],
  ['isCharacterDevice', 'a character device', 'the guest has devices of its own'],
] as const;

/**
 * The volumes that a container's mounts ask for, each with the path behind its links.
 *
 * @throws KilnError not-found in runc's words for a source that is missing; unimplemented for one that only the host's
 *   kernel can serve
 */
export async function checkVolumes(mounts: readonly VolumeMount[]): Promise<readonly Volume[]> {
  return Promise.all(mounts.map((mount) => checkVolume(mount)));
}

async function checkVolume({ destination, ...volume }: VolumeMount): Promise<Volume> {
  const { source } = volume;
  const name = `error mounting "${source}" to rootfs at "${destination}"`;
  let real: string;
  try {
    real = await realpath(source);
    const stats = await stat(real);
    const kind = kinds.find(([is]) => stats[is]());
    if (kind !== undefined) throw new KilnError('unimplemented', `${name}: it is ${kind[1]}: ${kind[2]}`);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') {
      throw new KilnError('not-found', `${name}: stat ${source}: no such file or directory`, { cause: error });
    }
    throw fileError(error, name);
  }
  // A link may lead to where the host tells of itself; as a path, the spec's translation has refused that.
  if (guestsOwn(real, name) === undefined) return { ...volume, source: real };
  throw new KilnError('unimplemented', `${name}: ${real} tells of the host, not of the guest`);
}

/** The volumes of one sandbox. */
export class SandboxVolumes implements AsyncDisposable {
  readonly #server: FileServer;
  readonly #logger: Logger;
  readonly #vmEnded = new AbortController();
  #connected: boolean;
  /** Containers of a pod that are made at once wait for the same, and each may give up alone. */
  readonly #connecting = new SingleFlight();
  #disposed = false;

  private constructor(server: FileServer, logger: Logger, connected: boolean) {
    this.#server = server;
    this.#logger = logger;
    this.#connected = connected;
    void this.#watch();
  }

  /** Tells when the server ends before its guest. Never rejects. */
  async #watch(): Promise<void> {
    const reason = await this.#server.ended;
    // Its end may be seen before that of the VM, which it follows.
    await delay(vmEndGraceMs, undefined, { ref: false, signal: this.#vmEnded.signal }).catch(() => {});
    if (this.#disposed || this.#vmEnded.signal.aborted) return;
    this.#logger.error({ reason }, 'the file server has ended: volumes give I/O errors from now on');
  }

  /** The server may end with this VM. */
  belongTo(vm: Pick<Vm, 'wait'>): void {
    void vm.wait().then(() => this.#vmEnded.abort());
  }

  static async start(servers: FileServers, options: FileServerOptions): Promise<SandboxVolumes> {
    return new SandboxVolumes(await servers.start(options), options.logger, false);
  }

  /** Undefined when the server has ended, or cannot be found: then there are I/O errors in the guest. */
  static async adopt(
    servers: FileServers,
    { server, connected }: VolumesRecord,
    options: FileServerOptions,
  ): Promise<SandboxVolumes | undefined> {
    try {
      return new SandboxVolumes(await servers.adopt(server, options), options.logger, connected);
    } catch (error) {
      options.logger.error(
        { err: forLog(error) },
        'cannot take the file server over: volumes give I/O errors from now on',
      );
      return undefined;
    }
  }

  /** Numbers for volumes, in their order. */
  add(volumes: readonly Volume[]): Promise<readonly number[]> {
    return this.#server.add(volumes);
  }

  /** For a container that has left the guest. Its volumes go with the server at the latest, so this does not fail. */
  async remove(numbers: readonly number[]): Promise<void> {
    try {
      await this.#server.remove(numbers);
    } catch (error) {
      this.#logger.warn({ err: forLog(error), numbers }, 'volumes that nobody uses stay until the VM ends');
    }
  }

  /** Hands the guest's channel to the server, if it does not have it yet. The guest may dial before or after. */
  connect(vm: Pick<Vm, 'acceptFiles'>, signal: AbortSignal): Promise<void> {
    return this.#connecting.run('', signal, (flight) => this.#connect(vm, flight));
  }

  async #connect(vm: Pick<Vm, 'acceptFiles'>, signal: AbortSignal): Promise<void> {
    if (this.#connected) return;
    await this.#server.serve(await vm.acceptFiles(signal));
    this.#connected = true;
    this.#logger.debug('the guest has its volumes');
  }

  record(): VolumesRecord {
    return { server: this.#server.record(), connected: this.#connected };
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#disposed = true;
    await this.#server[Symbol.asyncDispose]();
  }
}

/** An error of the guest's, with the host's names for the volumes in it. */
export function inHostsWords(error: unknown, mounts: readonly VolumeMount[], numbers: readonly number[]): unknown {
  if (!(error instanceof KilnError)) return error;
  const pattern = new RegExp(`${guestVolumesDirectory}/(\\d+)(?!\\d)`, 'g');
  const message = error.message.replaceAll(pattern, (path, number: string) => {
    return mounts[numbers.indexOf(Number(number))]?.source ?? path;
  });
  if (message === error.message) return error;
  const { code, hint } = error;
  return new KilnError(code, message, { ...(hint === undefined ? {} : { hint }), cause: error });
}
