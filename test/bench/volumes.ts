/**
 * What a volume costs beside runc's bind mount, and beside the two other ways in which a virtual machine can have the host's
 * files, in the same kind of virtual machine: QEMU's own 9P server and virtiofsd. The host's files are in memory, so that
 * no disk is measured; so is the guest's own tmpfs, which tells what the guest and its emulation alone cost.
 */
import { chmod, mkdir, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { volumeOptions } from '../../src/sandbox/volumes.ts';
import { importImage } from '../support/images.ts';
import type { EditableSpec, Scene } from '../support/scene.ts';
import { mustRun, type RunResult } from '../support/spawn.ts';
import { table } from './statistics.ts';
import { type Measured, readFile, readMeasured, workImage, workloads, workScript } from './volume-work.ts';
import { runc } from './ways.ts';

/** Where a container has its files, and what came of it. */
export interface Place {
  readonly name: string;
  readonly measured: Measured;
}

/** The transports of QEMU's microvm that Kiln's own devices leave free, with two network cards. */
const [ninepTransport, fsTransport] = [3, 2];

/** Debian's qemu-system-common has it. */
const virtiofsd = '/usr/lib/qemu/virtiofsd';

/** QEMU's server, with v9fs's options but for the transport. */
const ninep = (options: string) => `9p -o trans=virtio,version=9p2000.L,${options} peer-9p`;

/** A container, and the places where it has files, one after the other. */
interface Machine {
  /** kiln.toml; without it, runc runs the container. */
  readonly config?: string;
  /** Of virtiofsd, in a virtual machine that has it, and QEMU's server. */
  readonly virtiofsCache?: string;
  readonly places: readonly {
    readonly name: string;
    /** What is mounted at /m; without it, the place is the volume at /v. */
    readonly mount?: string;
  }[];
}

const withVolume = (channel: string, cache: string): Machine => ({
  config: `[vm]\nchannel = "${channel}"\n[storage]\nvolume_cache = "${cache}"\n`,
  places: [{ name: `Kiln, ${channel}, cache=${cache}` }],
});
const virtiofs = (cache: string) => ({ name: `virtiofsd, cache=${cache}`, mount: 'virtiofs peer-fs' });

const machines: readonly Machine[] = [
  { places: [{ name: 'runc, bind mount' }] },
  withVolume('virtio-serial', 'mmap'),
  {
    virtiofsCache: 'none',
    places: [
      { name: "the guest's own tmpfs", mount: 'tmpfs tmpfs' },
      { name: 'Kiln, hybrid-vsock, cache=mmap' },
      { name: "QEMU's 9P, as Kiln's", mount: ninep(volumeOptions('mmap')) },
      { name: "QEMU's 9P, 512 KiB", mount: ninep('access=client,cache=mmap,msize=524312') },
      { name: "QEMU's 9P, loose", mount: ninep(volumeOptions('loose')) },
      virtiofs('none'),
    ],
  },
  { virtiofsCache: 'auto', places: [virtiofs('auto')] },
  { virtiofsCache: 'always', places: [virtiofs('always')] },
  withVolume('virtio-serial', 'none'),
  withVolume('virtio-serial', 'loose'),
];

/** Each machine `runs` times in turn, so that what else the host does meets all. The best figures count. */
export async function measureVolumes(scene: Scene, runs: number): Promise<readonly Place[]> {
  const image = await workImage();
  await importImage(scene.containerd, image);
  const folder = join(scene.dir, 'files');
  await mkdir(folder);
  await mustRun('mount', ['-t', 'tmpfs', '-o', 'size=512m', 'kiln-bench', folder]);
  try {
    const all = new Map<string, Measured[]>();
    for (let run = 0; run < runs; run += 1) {
      for (const machine of machines) {
        for (const { name, measured } of await measure(scene, machine, { folder, image: image.name })) {
          all.set(name, [...(all.get(name) ?? []), measured]);
        }
      }
    }
    return Array.from(all, ([name, measured]) => ({ name, measured: best(measured) }));
  } finally {
    await scene.configure('');
    await mustRun('umount', [folder]);
  }
}

function best(measured: readonly Measured[]): Measured {
  const figures = workloads.map(({ name, unit }) => {
    const values = measured.map((one) => one[name]);
    return [name, unit === 's' ? Math.min(...values) : Math.max(...values)];
  });
  return Object.fromEntries(figures) as Measured;
}

async function measure(
  scene: Scene,
  { config, virtiofsCache, places }: Machine,
  { folder, image }: { readonly folder: string; readonly image: string },
): Promise<Place[]> {
  const source = join(folder, 'source');
  await mkdir(source);
  try {
    await writeFile(join(source, readFile.name), Buffer.alloc(readFile.bytes, 'kiln'));
    const toml = virtiofsCache === undefined ? config : await peersConfig(folder, source, virtiofsCache);
    const options = {
      image,
      timeout: 900_000,
      flags: ['--mount', `type=bind,src=${source},dst=/v,options=rbind:rw`],
    };
    const command = ['sh', '-c', places.map(scriptOf).join('\n')];
    let result: RunResult;
    if (toml === undefined) {
      result = await scene.run(scene.id('files'), command, {
        ...options,
        runtime: runc,
        flags: ['--rm', ...options.flags],
      });
    } else {
      await scene.configure(toml);
      result = await scene.runWithSpec(scene.id('files'), command, (spec) => void mayMount(spec), options);
    }
    if (result.code !== 0) throw new Error(`${places[0]?.name}: ${result.code}: ${result.stdout}${result.stderr}`);
    const parts = result.stdout.toString().split(placeMark).slice(1);
    return places.map(({ name }, index) => ({ name, measured: readMeasured(parts[index] ?? '') }));
  } finally {
    await mustRun('rm', ['-rf', source]);
  }
}

const placeMark = 'the next place\n';

function scriptOf({ mount }: Machine['places'][number]): string {
  const echo = `echo ${placeMark.trim()}`;
  if (mount === undefined) return `${echo}; ${workScript('/v')}`;
  return `${echo}; mount -t ${mount} /m || exit 1
    [ -e /m/${readFile.name} ] || cp /v/${readFile.name} /m
    ${workScript('/m')}
    cd /; umount /m || exit 1`;
}

/** mount(2), in a virtual machine of its own. */
function mayMount({ process }: EditableSpec): void {
  for (const set of Object.values(process.capabilities ?? {})) set.push('CAP_SYS_ADMIN');
}

/** Has QEMU's program be one that gives the virtual machine the two other servers, too; virtiofsd ends with QEMU. */
async function peersConfig(folder: string, source: string, cache: string): Promise<string> {
  const program = join(folder, 'qemu-with-peers');
  const socket = join(folder, 'virtiofsd.sock');
  const qemu = 'qemu-system-x86_64';
  await writeFile(
    program,
    `#!/bin/sh
case " $* " in *" -kernel "*) ;; *) exec ${qemu} "$@" ;; esac
rm -f ${socket}
# What QEMU inherits, its listening control socket and its taps, is not this one's.
${virtiofsd} --socket-path=${socket} -o source=${source},cache=${cache} 3>&- 4>&- 5>&- 6>&- 7>&- < /dev/null > ${folder}/virtiofsd.log 2>&1 &
until [ -S ${socket} ]; do sleep 0.05; kill -0 $! || exit 1; done
# virtiofsd knows virtio 1 only.
exec ${qemu} "$@" -global virtio-mmio.force-legacy=false \\
  -fsdev local,id=peer,path=${source},security_model=passthrough,multidevs=remap \\
  -device virtio-9p-device,fsdev=peer,mount_tag=peer-9p,bus=virtio-mmio-bus.${ninepTransport} \\
  -chardev socket,id=peer-fs,path=${socket} \\
  -device vhost-user-fs-device,chardev=peer-fs,tag=peer-fs,queue-size=1024,bus=virtio-mmio-bus.${fsTransport}
`,
  );
  await chmod(program, 0o755);
  // Its memory must be shared with virtiofsd, which that of a template's clone is not.
  return `[vm]\nchannel = "hybrid-vsock"\nqemu = "${program}"\n[template]\nenabled = false\n`;
}

const shown = (value: number, unit: string): string => value.toFixed(unit === 's' ? 2 : 0);

/** Above 1 is slower, whatever the unit. */
function ratio(one: Measured, other: Measured, { name, unit }: (typeof workloads)[number]): string {
  const slower = unit === 's' ? one[name] / other[name] : other[name] / one[name];
  return slower.toFixed(slower < 10 ? 1 : 0);
}

export function describeVolumes(places: readonly Place[]): string {
  const rows = places.map(({ name, measured }) => [
    name,
    ...workloads.map((workload) => shown(measured[workload.name], workload.unit)),
  ]);
  const head = workloads.map(({ name, unit }) => `${name} ${unit}`);
  const compared = (base: string | undefined) => {
    const other = places.find(({ name }) => name === base)?.measured;
    if (other === undefined) return [];
    const ratios = places.map(({ name, measured }) => [name, ...workloads.map((each) => ratio(measured, other, each))]);
    return [`\nhow many times as long as ${base}`, table([['', ...workloads.map(({ name }) => name)], ...ratios])];
  };
  return [
    '\nfiles of the host in a container',
    table([['', ...head], ...rows]),
    ...workloads.map(({ name, what }) => `  ${name}: ${what}`),
    ...compared(places[0]?.name),
    ...compared("QEMU's 9P, as Kiln's"),
  ].join('\n');
}
