/** An initrd with the saboteur of saboteur.c in it, and the host's way to it. */
import { execFileSync } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { connect } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { cpio } from '../../scripts/lib/cpio.ts';
import { projectRoot } from './paths.ts';
import { Lines } from './spawn.ts';

/** PORT of saboteur.c. */
const port = 5000;

/** Writes the initrd of dist/guest to another file, with the saboteur as its first program. */
export function writeSaboteurInitrd(file: string): void {
  const guest = process.env.KILN_GUEST_DIR ?? join(projectRoot, 'dist', 'guest');
  const initrd = readFileSync(join(guest, 'initrd'));
  const folder = mkdtempSync(join(tmpdir(), 'kt-saboteur-'));
  try {
    const program = join(folder, 'saboteur');
    const source = join(projectRoot, 'test', 'support', 'saboteur.c');
    execFileSync('gcc', ['-O2', '-s', '-static', '-Wall', '-Wextra', '-Werror', '-o', program, source]);
    // The kernel unpacks one archive after the other, and a later file takes the place of an earlier one.
    const added = cpio([
      { name: 'init.real', mode: 0o100755, data: fileOf(initrd, 'init') },
      { name: 'init', mode: 0o100755, data: readFileSync(program) },
    ]);
    writeFileSync(file, Buffer.concat([initrd, added]));
  } finally {
    rmSync(folder, { recursive: true });
  }
}

/** A file of a cpio archive in the format that scripts/lib/cpio.ts writes. */
function fileOf(archive: Buffer, wanted: string): Buffer {
  const padded = (length: number) => Math.ceil(length / 4) * 4;
  for (let at = 0; at < archive.length; ) {
    const field = (index: number) =>
      Number.parseInt(archive.toString('latin1', at + 6 + index * 8, at + 14 + index * 8), 16);
    const [size, nameSize] = [field(6), field(11)];
    const name = archive.toString('latin1', at + 110, at + 110 + nameSize - 1);
    const data = at + padded(110 + nameSize);
    if (name === wanted) return archive.subarray(data, data + size);
    at = data + padded(size);
  }
  throw new Error(`the initrd has no ${wanted}`);
}

/** What the saboteur was asked: `hit` when it has happened, `done` when it is over; also when the guest ends by it. */
export interface Sabotage {
  readonly hit: Promise<void>;
  readonly done: Promise<void>;
}

/**
 * Asks the saboteur of one virtual machine.
 *
 * @param directory the private folder of the container
 * @param command as in saboteur.c
 */
export async function ask(directory: string, command: string): Promise<Sabotage> {
  const socket = connect(join(directory, 'vsock'));
  const ended = new Promise<void>((resolve) => socket.once('close', () => resolve()));
  socket.on('error', () => undefined);
  const lines = new Lines(socket);
  await once(socket, 'connect');
  socket.write(`CONNECT ${port}\n`);
  await lines.waitFor((line) => line.startsWith('OK '), 'the saboteur');
  socket.write(`${command}\n`);
  const answer = (word: string) => Promise.race([lines.waitFor((line) => line === word, word).then(() => {}), ended]);
  const [hit, done] = [answer('hit'), answer('done').finally(() => socket.destroy())];
  for (const promise of [hit, done]) promise.catch(() => undefined);
  return { hit, done };
}
