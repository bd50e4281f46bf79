/**
 * The host's files in the guest: one 9P session for all containers, mounted when the first one needs it. What a container
 * gets of it are bind mounts of directories and files below it, which crun makes.
 */
import { spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { mkdirSync, readFileSync } from 'node:fs';
import { text } from 'node:stream/consumers';
import { setTimeout as delay } from 'node:timers/promises';
import { AgentError } from './errors.ts';
import { flush } from './mounts.ts';
import type { Reaper } from './reaper.ts';
import { findPort } from './serial-port.ts';

/** Where the host listens for its guests' file sessions, unless the kernel's command line says otherwise. */
const filesPort = 9000;
const portWord = 'kiln.files_port=';

/** The virtio-serial port's name, which src/vmm/qemu/command-line.ts gives it. */
const portName = 'kiln.files';

/** native/guest-volumes.c. */
const program = '/usr/lib/kiln/kiln-mount-volumes';

/** How long the host may take to answer, in milliseconds. */
const mountLimit = 10_000;

/** How long what is still to be written may take to reach the host, in milliseconds. */
const flushLimit = 10_000;

export interface VolumesOptions {
  /** Where they are mounted; made when needed. */
  readonly directory: string;
  readonly reaper: Reaper;
  /** How the host's files are reached: the program's last two arguments. */
  readonly channel: () => readonly [kind: string, place: string];
}

export class Volumes {
  readonly #options: VolumesOptions;
  #mounted: Promise<void> | undefined;

  constructor(options: VolumesOptions) {
    this.#options = options;
  }

  /**
   * Mounts them, if they are not yet.
   *
   * @param mountOptions of v9fs, for the first mount
   * @throws AgentError internal, after which it may be tried again
   */
  mount(mountOptions: string): Promise<void> {
    this.#mounted ??= this.#mount(mountOptions).catch((error: unknown) => {
      this.#mounted = undefined;
      throw error;
    });
    return this.#mounted;
  }

  /** What programs have written through mappings of files may still be here: sends it to the host. Never rejects. */
  async flush(): Promise<void> {
    if (this.#mounted === undefined) return;
    const flushed = flush(this.#options.directory).catch(() => {});
    await Promise.race([flushed, delay(flushLimit, undefined, { ref: false })]);
  }

  async #mount(mountOptions: string): Promise<void> {
    const { directory, reaper, channel } = this.#options;
    mkdirSync(directory, { recursive: true, mode: 0o755 });
    const child = spawn(program, [directory, mountOptions, ...channel()], { stdio: ['ignore', 'ignore', 'pipe'] });
    reaper.leaveToNode(child);
    const timer = setTimeout(() => child.kill('SIGKILL'), mountLimit);
    try {
      const [[code, signal], message] = await Promise.all([once(child, 'exit'), text(child.stderr)]);
      if (code === 0) return;
      const silent = `the host's file server did not answer within ${mountLimit / 1000} s`;
      const reason = signal === null ? message.trim() || `status ${code}` : silent;
      throw new AgentError('internal', `cannot mount the host's files in the guest: ${reason}`);
    } finally {
      clearTimeout(timer);
    }
  }
}

/** Has clones of a template find in memory what mounting takes: a kernel's modules, and the program. */
export function prepareVolumes(): void {
  spawnSync('modprobe', ['-a', '9p', '9pnet_fd']);
  spawnSync(program, []);
}

/** The channel that the kernel's command line names. */
export function volumesChannel(): readonly [kind: string, place: string] {
  const words = readFileSync('/proc/cmdline', 'utf8').trim().split(' ');
  if (words.includes('kiln.channel=virtio-serial')) return ['serial', findPort(portName)];
  const port = words.find((word) => word.startsWith(portWord))?.slice(portWord.length);
  return ['vsock', port ?? String(filesPort)];
}
