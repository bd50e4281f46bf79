/** What `volumes` has a container do with files, and how long that took it: fio, and busybox's tools for many small files. */
import { execFileSync } from 'node:child_process';
import { readFileSync, realpathSync } from 'node:fs';
import { busyboxLayer, type Image, type LayerEntry, layerTar } from '../support/images.ts';

const files = 1000;
const transferMib = 16;
const randomMib = 2;

/** In the order in which they run. fio's figures are rates, the others seconds. */
export const workloads = [
  { name: 'write', unit: 'MiB/s', what: `fio, ${transferMib} MiB in order, 128 KiB each, flushed at the end` },
  { name: 'read', unit: 'MiB/s', what: `fio, ${transferMib} MiB in order that the host has written, 128 KiB each` },
  { name: 'randwrite', unit: '/s', what: `fio, ${randomMib} MiB at random, 4 KiB each, flushed at the end` },
  { name: 'randread', unit: '/s', what: `fio, ${randomMib} MiB at random of what was read before, 4 KiB each` },
  { name: 'create', unit: 's', what: `${files} empty files, by a shell` },
  { name: 'stat', unit: 's', what: `find, which stats each of them` },
  { name: 'untar', unit: 's', what: `tar -x of ${files} files of 1 KiB in ${files / 50} directories` },
  { name: 'cat', unit: 's', what: 'all of them read' },
  { name: 'rm', unit: 's', what: 'rm -r of both' },
] as const;

export type Workload = (typeof workloads)[number]['name'];
export type Measured = Readonly<Record<Workload, number>>;

/** The file that the host has written. */
export const readFile = { name: 'read', bytes: transferMib * 2 ** 20 };

/** fio with its libraries, at the paths where it looks for them. */
function fioLayer(): LayerEntry[] {
  const libraries = execFileSync('ldd', ['/usr/bin/fio'], { encoding: 'utf8' }).matchAll(/(\/\S+) \(0x/g);
  const paths = ['/usr/bin/fio', ...Array.from(libraries, ([, path = '']) => path)];
  const directories = new Set(
    paths.flatMap((path) =>
      path
        .split('/')
        .slice(1, -1)
        .map((_, index, parts) => parts.slice(0, index + 1).join('/')),
    ),
  );
  return [
    ...[...directories].filter((path) => path !== 'bin').map((path): LayerEntry => ({ kind: 'dir', path })),
    ...paths.map((path): LayerEntry => {
      return { kind: 'file', path: path.slice(1), mode: 0o755, content: readFileSync(realpathSync(path)) };
    }),
  ];
}

async function smallFiles(): Promise<Buffer> {
  const content = Buffer.alloc(1024, 'kiln');
  return layerTar(
    Array.from({ length: files }, (_, index): LayerEntry[] => {
      const directory = `d${Math.floor(index / 50)}`;
      const file: LayerEntry = { kind: 'file', path: `${directory}/f${index}`, content };
      return index % 50 === 0 ? [{ kind: 'dir', path: directory }, file] : [file];
    }).flat(),
  );
}

export async function workImage(): Promise<Image> {
  const work: LayerEntry[] = [
    { kind: 'dir', path: 'm' },
    { kind: 'dir', path: 'v' },
    { kind: 'file', path: 'files.tar', content: await smallFiles() },
  ];
  return { name: 'docker.io/kiln/bench-volumes:test', layers: [busyboxLayer(), fioLayer(), work] };
}

/** Does it all in a directory, and says how long each part took by the machine's clock, in hundredths of a second. */
export function workScript(directory: string): string {
  const fio = (name: string, options: string) =>
    `--name=${name} --stonewall --ioengine=psync --fallocate=none --size=${transferMib}m ${options}`;
  return `cd ${directory} || exit 1
    timed() { name=$1; shift; read from rest < /proc/uptime; "$@" > /dev/null || exit 1
      read to rest < /proc/uptime; echo "took $name $from $to"; }
    create() { i=0; while [ $i -lt ${files} ]; do : > c/$i; i=$((i+1)); done; }
    fio --output-format=json \\
      ${fio('write', '--filename=written --rw=write --bs=128k --end_fsync=1')} \\
      ${fio('read', `--filename=${readFile.name} --rw=read --bs=128k`)} \\
      ${fio('randwrite', `--filename=written --rw=randwrite --bs=4k --io_size=${randomMib}m --end_fsync=1`)} \\
      ${fio('randread', `--filename=${readFile.name} --rw=randread --bs=4k --io_size=${randomMib}m`)} || exit 1
    mkdir c t
    timed create create
    timed stat find c -size +9
    timed untar tar -x -f /files.tar -C t
    timed cat sh -c 'cat t/*/*'
    timed rm rm -r c t
    rm written`;
}

interface FioJob {
  readonly jobname: string;
  readonly read: { readonly bw_bytes: number; readonly iops: number };
  readonly write: { readonly bw_bytes: number; readonly iops: number };
}

/** @throws Error for an output that lacks a figure */
export function readMeasured(output: string): Measured {
  const measured = new Map<string, number>();
  const json = output.slice(output.indexOf('{'), output.lastIndexOf('}') + 1);
  for (const { jobname, read, write } of (JSON.parse(json) as { jobs: FioJob[] }).jobs) {
    const { bw_bytes: bytes, iops } = jobname.endsWith('read') ? read : write;
    measured.set(jobname, jobname.startsWith('rand') ? iops : bytes / 2 ** 20);
  }
  for (const [, name = '', from, to] of output.matchAll(/^took (\w+) (\S+) (\S+)$/gm)) {
    // The clock's own step.
    measured.set(name, Math.max(Number(to) - Number(from), 0.01));
  }
  for (const { name } of workloads)
    if (!measured.has(name)) throw new Error(`there is no figure for ${name}: ${output}`);
  return Object.fromEntries(measured) as Measured;
}
