/**
 * What the file server of volumes costs by itself, without a virtual machine: `node test/bench/file-server.ts`, as root, after
 * `npm run build`. The volume is on tmpfs, so that no disk is measured; half of each time is this client's own.
 */
import { execFileSync } from 'node:child_process';
import { closeSync, mkdirSync, mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { Socket } from 'node:net';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { type Volume, VolumeServer } from '../../src/volume/server.ts';
import { NinePClient } from '../support/ninep.ts';
import { projectRoot } from '../support/paths.ts';
import { socketPair } from '../support/socket-pair.ts';

const program = path.join(projectRoot, 'dist', 'libexec', 'kiln-volumes');
const fileBytes = 256 * 1024 * 1024;
const files = 5000;

const volume = (source: string): Volume => ({ source, readOnly: 'no', recursive: false, follows: false });

async function milliseconds(action: () => Promise<unknown>): Promise<number> {
  const start = performance.now();
  await action();
  return performance.now() - start;
}

function median(values: readonly number[]): number {
  return [...values].sort((one, other) => one - other)[values.length >> 1]!;
}

function show(what: string, value: number, unit: string): void {
  console.log(`${what.padEnd(48)}${value.toFixed(value < 10 ? 1 : 0).padStart(8)} ${unit}`);
}

function dirtyKib(server: VolumeServer): number {
  const rollup = readFileSync(`/proc/${server.pid}/smaps_rollup`, 'utf8');
  return Number(/^Private_Dirty:\s+(\d+) kB/m.exec(rollup)?.[1]);
}

async function measureStart(directory: string): Promise<void> {
  const starts: number[] = [];
  const additions: number[] = [];
  for (let round = 0; round < 30; round++) {
    await using server = await VolumeServer.start({ program, directory });
    await server.add([volume('/usr'), volume('/etc/hosts'), volume('/tmp')]);
    const [ours, theirs] = socketPair();
    starts.push(await milliseconds(() => server.serve(theirs)));
    additions.push(await milliseconds(() => server.add([volume('/usr')])));
    closeSync(ours);
  }
  show('start with three volumes, median of 30', median(starts), 'ms');
  show('adding one later', median(additions), 'ms');
}

async function measureTransfer(client: NinePClient, size: number): Promise<void> {
  const count = Math.floor(fileBytes / size);
  const data = Buffer.alloc(size, 1);
  const rate = (ms: number) => (count * size) / 1000 / ms;
  const fid = await client.create('0/file');
  const one = async (action: (offset: number) => Promise<unknown>) => {
    for (let i = 0; i < count; i++) await action(i * size);
  };
  const kib = Math.round(size / 1024);
  show(`write, ${kib} KiB each`, rate(await milliseconds(() => one((at) => client.write(fid, at, data)))), 'MB/s');
  show(`read, ${kib} KiB each`, rate(await milliseconds(() => one((at) => client.read(fid, at, size)))), 'MB/s');
  let next = 0;
  const lane = async () => {
    while (next < count) await client.read(fid, next++ * size, size);
  };
  const four = await milliseconds(() => Promise.all([lane(), lane(), lane(), lane()]));
  show(`read, ${kib} KiB each, four at once`, rate(four), 'MB/s');
  await client.clunk(fid);
  await client.unlink('0/file');
}

async function measureRequests(client: NinePClient): Promise<void> {
  const times: number[] = [];
  for (let i = 0; i < 20_000; i++) times.push(await milliseconds(() => client.getattr(0)));
  show('getattr, median of 20,000', median(times) * 1000, 'µs');
  const making = await milliseconds(async () => {
    for (let i = 0; i < files; i++) await client.clunk(await client.create(`0/file-${i}`));
  });
  show('create and clunk', (files / making) * 1000, '/s');
  const looking = await milliseconds(async () => {
    for (let i = 0; i < files; i++) {
      const fid = await client.walk(`0/file-${i}`);
      await client.getattr(fid);
      await client.clunk(fid);
    }
  });
  show('walk, getattr and clunk', (files / looking) * 1000, '/s');
}

const folder = mkdtempSync(path.join(tmpdir(), 'kiln-bench'));
const [directory, source] = [path.join(folder, 'sandbox'), path.join(folder, 'source')];
mkdirSync(directory);
mkdirSync(source);
execFileSync('mount', ['-t', 'tmpfs', '-o', 'size=512m', 'kiln-bench', source]);
try {
  await measureStart(directory);
  await using server = await VolumeServer.start({ program, directory });
  await server.add([volume(source)]);
  const [ours, theirs] = socketPair();
  await server.serve(theirs);
  using client = await NinePClient.open(new Socket({ fd: ours }), { msize: 1 << 20 });
  show('memory of its own, idle', dirtyKib(server), 'KiB');
  await measureTransfer(client, client.msize - 24);
  await measureTransfer(client, 128 * 1024);
  await measureRequests(client);
  show('memory of its own, at the end', dirtyKib(server), 'KiB');
} finally {
  execFileSync('umount', ['--lazy', source]);
  rmSync(folder, { recursive: true, force: true });
}
