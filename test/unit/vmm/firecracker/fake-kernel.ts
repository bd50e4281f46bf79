/** Plays what a jail needs root for: a mount of a file is a link to it, and a tmpfs is the folder itself. */
import {
  readdirSync,
  readlinkSync,
  realpathSync,
  rmSync,
  statSync,
  symlinkSync,
  truncateSync,
  writeFileSync,
} from 'node:fs';
import path from 'node:path';
import { mkfifo } from '../../../../src/sys/fifo.ts';
import type { FileMount, JailKernel } from '../../../../src/vmm/firecracker/jail-kernel.ts';

export class FakeKernel implements JailKernel {
  /** What is mounted: of a file, which one and how. */
  readonly mounts = new Map<string, ({ file: string } & FileMount) | 'tmpfs'>();
  /** Who was given what. */
  readonly owners = new Map<string, string>();
  /** Nodes that were made. */
  readonly devices = new Map<string, bigint>();
  /** An error of the next mount of a file. */
  refusal: Error | undefined;

  mountTmpfs(target: string): void {
    this.mounts.set(realpathSync(target), 'tmpfs');
  }

  async mountFile(file: string, target: string, how: FileMount): Promise<void> {
    if (this.refusal !== undefined) throw this.refusal;
    // Over a file that is there, as mount(2) demands.
    statSync(target);
    const at = place(target);
    rmSync(target);
    symlinkSync(file, target);
    this.mounts.set(at, { file, ...how });
  }

  unmount(target: string): void {
    let at: string;
    try {
      at = place(target);
    } catch {
      return; // Not even its folder is there.
    }
    const mount = this.mounts.get(at);
    if (mount === undefined) return;
    const below = [...this.mounts.keys()].filter((each) => each === at || each.startsWith(`${at}/`));
    for (const each of below) this.mounts.delete(each);
    if (mount === 'tmpfs') for (const name of readdirSync(at)) rmSync(path.join(at, name), { recursive: true });
    else {
      rmSync(at);
      writeFileSync(at, '');
      truncateSync(at, 0);
    }
  }

  chown(file: string, uid: number, gid: number): void {
    statSync(file);
    this.owners.set(place(file), `${uid}:${gid}`);
  }

  mkfifo(file: string, mode: number): void {
    mkfifo(file, mode);
  }

  /** Without root nobody makes one. */
  mknod(file: string, mode: number, device: bigint): void {
    if (this.refusal !== undefined) throw this.refusal;
    writeFileSync(file, '', { flag: 'wx', mode });
    this.devices.set(place(file), device);
  }

  processesIn(root: string): number[] {
    const folder = realpathSync(root);
    const isIn = (pid: string): boolean => {
      try {
        return readlinkSync(`/proc/${pid}/cwd`) === folder;
      } catch {
        return false;
      }
    };
    return readdirSync('/proc')
      .filter((name) => /^\d+$/.test(name) && isIn(name))
      .map(Number);
  }
}

/** The file itself, by the real path of its folder. */
function place(file: string): string {
  return path.join(realpathSync(path.dirname(file)), path.basename(file));
}
