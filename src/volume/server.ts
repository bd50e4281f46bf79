/**
 * The file server of one sandbox: a process of `kiln-volumes` (native/volumes.c), which speaks 9P2000.L with the guest's
 * kernel and sees the sandbox's volumes and nothing else. In the guest's mount, volume n is the entry `/n`.
 *
 * It serves one connection, and ends with that: when the guest is gone, so is its server. It does not end with kilnd.
 */
import { closeSync, openSync, readdirSync } from 'node:fs';
import { z } from 'zod';
import { KilnError } from '../errors.ts';
import type { ControlGroup } from '../host/control-group.ts';
import { adoptHelper, describeExit, type HelperProcess, startHelper } from '../host/helper-process.ts';
import { identityRecord, isAlive } from '../host/process-identity.ts';

/** One bind mount. */
export interface Volume {
  /** Absolute path of a directory or regular file of the host. */
  readonly source: string;
  /** What can be changed through the server: all, all but the source's own mount, or nothing in it nor below. */
  readonly readOnly: 'no' | 'mount' | 'tree';
  /** With what is mounted below the source, as `rbind` has it. */
  readonly recursive: boolean;
  /** What the host mounts below the source later appears, too, as `rslave` has it. */
  readonly follows: boolean;
}

/** What a later kilnd needs to take the server over. */
const volumeServerRecord = z.object({ process: identityRecord.optional() });
export type VolumeServerRecord = Readonly<z.infer<typeof volumeServerRecord>>;

export interface VolumeServerOptions {
  /** The kiln-volumes program. */
  readonly program: string;
  /** The sandbox's private directory. */
  readonly directory: string;
  /** The sandbox's control group. */
  readonly controlGroup?: ControlGroup | undefined;
}

/** What the server says, in the sandbox's directory; and what those say that change its volumes. */
const serverLogName = 'volumes.log';
const changeLogName = 'volumes-change.log';

const hint = 'run `npm run build`';

export class VolumeServer implements AsyncDisposable {
  readonly #options: VolumeServerOptions;
  readonly #ended = Promise.withResolvers<string>();
  /** Those that the process starts with; later ones are added to it. */
  readonly #first: { readonly index: number; readonly volume: Volume }[] = [];
  #next: number;
  /** Undefined before `serve`. */
  #process: Promise<HelperProcess> | undefined;
  #running: HelperProcess | undefined;

  private constructor(options: VolumeServerOptions, next: number) {
    this.#options = options;
    this.#next = next;
  }

  /** One that has no volumes, and no process before `serve`. */
  static start(options: VolumeServerOptions): Promise<VolumeServer> {
    return Promise.resolve(new VolumeServer(options, 0));
  }

  /**
   * Takes over the server that an earlier kilnd has started.
   *
   * @throws KilnError not-found when it has ended; ZodError for what is no record
   */
  static adopt(record: Readonly<Record<string, unknown>>, options: VolumeServerOptions): Promise<VolumeServer> {
    const { process: identity } = volumeServerRecord.parse(record);
    const process = identity && adoptHelper(identity, { directory: options.directory, logName: serverLogName });
    const entries = process && entriesOf(process.pid);
    if (process === undefined || entries === undefined) {
      return Promise.reject(new KilnError('not-found', 'the file server of the sandbox has ended'));
    }
    // What is there is what counts: the earlier kilnd may have ended before it wrote down its last volumes.
    const server = new VolumeServer(options, Math.max(-1, ...entries) + 1);
    server.#process = Promise.resolve(process);
    server.#hasStarted(process);
    return Promise.resolve(server);
  }

  /** Resolves when the process has ended, with how; never rejects. */
  get ended(): Promise<string> {
    return this.#ended.promise;
  }

  /** Of the process; undefined before `serve`. */
  get pid(): number | undefined {
    return this.#running?.pid;
  }

  /**
   * Makes volumes visible to the guest: all of them, or none when this fails. Returns their numbers, which are never used
   * again. Before `serve` they are only noted, and that is what fails for one that cannot be mounted.
   *
   * @throws KilnError failed-precondition when a source cannot be mounted, unavailable when the server has ended
   */
  async add(volumes: readonly Volume[]): Promise<number[]> {
    const numbered = volumes.map((volume) => ({ index: this.#next++, volume }));
    const indexes = numbered.map(({ index }) => index);
    if (this.#process === undefined) {
      this.#first.push(...numbered);
    } else if (numbered.length > 0) {
      await this.#process;
      try {
        await this.#change(['add', ...numbered.flatMap(asArguments)]);
      } catch (error) {
        await this.remove(indexes).catch(() => {});
        throw error;
      }
    }
    return indexes;
  }

  /** Takes volumes away; what the guest has open of them stays until it is closed. Numbers that are gone are no error. */
  async remove(indexes: readonly number[]): Promise<void> {
    if (this.#process === undefined) {
      const kept = this.#first.filter(({ index }) => !indexes.includes(index));
      this.#first.splice(0, this.#first.length, ...kept);
    } else if (indexes.length > 0) {
      await this.#process;
      if (this.#hasRunningProcess()) await this.#change(['remove', ...indexes.map(String)]);
    }
  }

  /**
   * Serves the guest at the other end of a connected socket. Takes the descriptor, also when this fails; then nothing is
   * left of the process either, and it can be called again. Else it is called once.
   *
   * @throws KilnError failed-precondition
   */
  async serve(connection: number): Promise<void> {
    if (this.#process !== undefined) {
      closeSync(connection);
      throw new KilnError('failed-precondition', 'the file server has a connection already');
    }
    this.#process = this.#startProcess(connection);
    try {
      this.#hasStarted(await this.#process);
    } catch (error) {
      this.#process = undefined; // The guest may call again, when the volume that was in the way is gone.
      throw error;
    }
  }

  record(): VolumeServerRecord {
    const identity = this.#running?.identity;
    return identity === undefined ? {} : { process: identity };
  }

  async [Symbol.asyncDispose](): Promise<void> {
    // One that could not be started left nothing.
    const process = await this.#process?.catch(() => undefined);
    await process?.kill();
  }

  async #startProcess(connection: number): Promise<HelperProcess> {
    const { program, directory, controlGroup } = this.#options;
    let process: HelperProcess;
    try {
      process = await startHelper({
        program,
        args: ['serve', directory, ...this.#first.flatMap(asArguments)],
        directory,
        logName: serverLogName,
        title: 'the file server',
        hint,
        statusPipe: true,
        inherit: [connection],
        controlGroup,
      });
    } finally {
      closeSync(connection);
    }
    await expectReady(process, 'cannot start the file server');
    return process;
  }

  #hasStarted(process: HelperProcess): void {
    this.#running = process;
    void process.exited.then((exit) => {
      this.#ended.resolve([describeExit(exit), process.lastWords()].filter(Boolean).join(': '));
    });
  }

  #hasRunningProcess(): boolean {
    const identity = this.#running?.identity;
    return identity !== undefined && isAlive(identity);
  }

  /** Runs a program that works in the server's mount namespace. */
  async #change(args: readonly string[]): Promise<void> {
    const { program, directory, controlGroup } = this.#options;
    const namespace = this.#openNamespace();
    let change: HelperProcess;
    try {
      change = await startHelper({
        program,
        args,
        directory,
        logName: changeLogName,
        title: 'kiln-volumes',
        hint,
        statusPipe: true,
        inherit: [namespace],
        controlGroup,
      });
    } finally {
      closeSync(namespace);
    }
    await expectReady(change, "cannot change the sandbox's volumes");
    await change.exited;
  }

  #openNamespace(): number {
    try {
      const fd = openSync(`/proc/${this.pid}/ns/mnt`, 'r');
      // Looked at with the file open, so that it is of this process and no other that has got its pid.
      if (this.#hasRunningProcess()) return fd;
      closeSync(fd);
    } catch {
      // It has ended.
    }
    throw new KilnError('unavailable', 'the file server of the sandbox has ended', {
      hint: 'its volumes give I/O errors; start the container again',
    });
  }
}

/** The numbers of the volumes that a server has; undefined when it ended just now. */
function entriesOf(pid: number): number[] | undefined {
  try {
    return readdirSync(`/proc/${pid}/root`).map(Number);
  } catch {
    return undefined;
  }
}

const readOnlyWords = { no: [], mount: ['ro'], tree: ['rro'] };

function asArguments({ index, volume }: { readonly index: number; readonly volume: Volume }): string[] {
  const options = [
    ...readOnlyWords[volume.readOnly],
    ...(volume.recursive ? ['recursive'] : []),
    ...(volume.follows ? ['slave'] : []),
  ];
  return [String(index), options.join(',') || '-', volume.source];
}

/** @throws KilnError failed-precondition with what the program said; it has ended then */
async function expectReady(process: HelperProcess, failure: string): Promise<void> {
  const status = (await process.status).trim();
  if (status === 'ready') return;
  await process.kill();
  const said = status.replace(/^error: /, '') || process.lastWords();
  const reason = said || `it ended at once ${describeExit(await process.exited)}`;
  throw new KilnError('failed-precondition', `${failure}: ${reason}`);
}
