/** What the tests of VMMs share: a folder, programs that play QEMU and its backend, and a look for what was left. */
import { once } from 'node:events';
import {
  chmodSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  rmSync,
  watch,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { loggerTo } from '../../../src/observe/logger.ts';
import type { Parking, PersistentTaps } from '../../../src/vmm/cards.ts';
import type { HostDevices } from '../../../src/vmm/host-devices.ts';
import { cardMac, type VmConfig } from '../../../src/vmm/vmm.ts';

const fakeQemu = fileURLToPath(new URL('./fake-qemu.ts', import.meta.url));
const fakeJailer = fileURLToPath(new URL('./firecracker/fake-jailer.ts', import.meta.url));
const fakeFirecracker = fileURLToPath(new URL('./firecracker/fake-firecracker.ts', import.meta.url));

/** Nobody reads it. */
export const noLogger = loggerTo({ write: () => {} }, 'error');

/** The namespace we are in, for VMs without network cards: another one takes root. */
export const parking: Parking = { run: (action) => action() };

let tapsMade = 0;

/** Names only. */
export function playedTaps(_parking: Parking, count: number): PersistentTaps {
  const nics = Array.from({ length: count }, (_, index) => ({ mac: cardMac(index), tap: `kt${tapsMade++}` }));
  return { nics, [Symbol.dispose]: () => {} };
}

export class Workspace implements Disposable {
  readonly folder = mkdtempSync(path.join(tmpdir(), 'kiln-v'));
  /** The sandbox's directory. */
  readonly sandbox = path.join(this.folder, 'sandbox');

  constructor() {
    mkdirSync(this.sandbox, { mode: 0o700 });
  }

  path(name: string): string {
    return path.join(this.folder, name);
  }

  file(name: string, content: string | Uint8Array = ''): string {
    writeFileSync(this.path(name), content);
    return this.path(name);
  }

  has(name: string): boolean {
    return existsSync(this.path(name));
  }

  /** Resolves when there is a file of that name. */
  async appears(name: string): Promise<void> {
    const watcher = watch(this.folder);
    try {
      while (!this.has(name)) await once(watcher, 'change');
    } finally {
      watcher.close();
    }
  }

  /** Resolves when there is a file of that name that has such a text in it. */
  async hasLine(name: string, text: string): Promise<void> {
    const watcher = watch(this.folder);
    try {
      while (!(this.has(name) && readFileSync(this.path(name), 'utf8').includes(text))) await once(watcher, 'change');
    } finally {
      watcher.close();
    }
  }

  program(name: string, source: string): string {
    chmodSync(this.file(name, source), 0o755);
    return this.path(name);
  }

  /** A program that does as fake-qemu.ts says for the mode. */
  qemu(mode: string): string {
    return this.#played('qemu', fakeQemu, mode);
  }

  /** A program that does as firecracker/fake-firecracker.ts says for the mode. */
  firecracker(mode: string): string {
    return this.#played('firecracker', fakeFirecracker, mode);
  }

  /** A program that does as firecracker/fake-jailer.ts says for the mode. */
  jailer(mode: string): string {
    return this.#played('jailer', fakeJailer, mode);
  }

  #played(name: string, module: string, mode: string): string {
    const source = `#!${process.execPath}\nimport { main } from ${JSON.stringify(module)};\nmain(${JSON.stringify(mode)}, import.meta.filename);\n`;
    return this.program(name, source);
  }

  /** What the program that `firecracker` made was asked, as `METHOD /path`, with each body. */
  firecrackerRequests(): { name: string; body: unknown }[] {
    return readFileSync(this.path('firecracker.requests'), 'utf8')
      .trim()
      .split('\n')
      .map((line) => JSON.parse(line));
  }

  /** The arguments of every start of the program that `qemu` made. */
  qemuStarts(): string[][] {
    return readFileSync(this.path('qemu.starts'), 'utf8')
      .trim()
      .split('\n')
      .map((line) => JSON.parse(line));
  }

  /** Makes its socket, as far as anybody sees, and waits to be killed. */
  backend(): string {
    // Its arguments are --guest-cid N --socket PATH …
    return this.program(
      'backend',
      `#!${process.execPath}\nrequire('node:net').createServer().listen(process.argv[5]);\n`,
    );
  }

  /** A guest of empty files: enough for programs that only play QEMU. */
  vm(extra: Partial<VmConfig> = {}): VmConfig {
    return {
      id: 'one',
      directory: this.sandbox,
      memoryMib: 128,
      vcpus: 1,
      networkCards: 0,
      kernel: this.file('vmlinux'),
      initrd: this.file('initrd'),
      guestImage: this.file('guest.erofs'),
      ...extra,
    };
  }

  /** A host of the test's making; without KVM and vhost-vsock unless it says so. */
  devices(extra: Partial<HostDevices> = {}): HostDevices {
    return {
      arch: 'x64',
      modules: this.path('modules'),
      kvm: this.path('kvm'),
      vhostVsock: this.path('vhost-vsock'),
      cpuinfo: this.file('cpuinfo', 'processor\t: 0\ncpu MHz\t\t: 2799.998\n'),
      freeHugePages: this.path('free_hugepages'),
      ...extra,
    };
  }

  /** The helpers that run for the sandbox. */
  processes(): string[] {
    return readdirSync('/proc').filter((pid) => {
      try {
        if (readFileSync(`/proc/${pid}/environ`, 'utf8').includes(`KILN_SANDBOX_DIR=${this.sandbox}`)) return true;
        // One that a played jailer has started.
        return readlinkSync(`/proc/${pid}/cwd`).startsWith(`${this.sandbox}/`);
      } catch {
        return false;
      }
    });
  }

  /** What lies in the sandbox's directory and is no log. */
  files(): string[] {
    return readdirSync(this.sandbox).filter((name) => !name.endsWith('.log'));
  }

  [Symbol.dispose](): void {
    for (const pid of this.processes()) process.kill(Number(pid), 'SIGKILL');
    rmSync(this.folder, { recursive: true, force: true });
  }
}
