/**
 * Warm-up calls for a guest that becomes a template: after them the agent's code is compiled, crun and its libraries are
 * in the guest's page cache, and what a container's start touches first is touched. All clones share that.
 */
import { rm } from 'node:fs/promises';
import path from 'node:path';
import { PassThrough, type Readable } from 'node:stream';
import type { Guest } from '../guest/guest.ts';
import type { OutputName } from '../guest/streams.ts';
import type { GuestContainer, GuestStdio, ProcessRef } from '../guest/terms.ts';
import { abortable } from '../host/abortable.ts';
import { guestRootDirectory, writableMounts } from '../rootfs/guest-mounts.ts';
import type { Vm } from '../vmm/vmm.ts';

/** Rounds of calls. The first reads files and compiles; the second runs what is compiled by then. */
const rounds = 2;

const pipes: GuestStdio = { stdin: true, stdout: true, stderr: true, terminal: false, size: undefined };
const terminal: GuestStdio = {
  stdin: true,
  stdout: true,
  stderr: false,
  terminal: true,
  size: { width: 80, height: 24 },
};

const SIGKILL = 9;

/** For what a container that has written nothing has written, in ms. */
const changesLimitMs = 60_000;

/** Makes a file that is an empty ext4 filesystem, as containers have it for their changes. */
export type MakeBlank = (file: string, signal: AbortSignal) => Promise<void>;

export interface PrimeOptions {
  readonly guest: Guest;
  /** Its drive slots are empty, and will be again. */
  readonly vm: Pick<Vm, 'attachDisk' | 'detachDisk'>;
  /** For a disk that is gone afterwards. */
  readonly directory: string;
  readonly makeBlank: MakeBlank;
}

/** The one that the first container gets. */
const slot = 'rw0';

/**
 * Makes calls of every kind that a container's life is made of. Throws what the guest refuses, and what becomes of the disk, or
 * the signal's reason; the VM is of no use then.
 */
export function prime(options: PrimeOptions, signal: AbortSignal): Promise<void> {
  return abortable(warmUp(options, signal), signal);
}

async function warmUp({ guest, vm, directory, makeBlank }: PrimeOptions, signal: AbortSignal): Promise<void> {
  const file = path.join(directory, 'prime.ext4');
  try {
    await makeBlank(file, signal);
    const disk = await vm.attachDisk(slot, file);
    for (let round = 0; round < rounds; round += 1) {
      await liveWithPipes(guest, `prime-${round}`, disk);
      await liveWithTerminal(guest, `prime-terminal-${round}`, disk);
      await hearOfListeners(guest, signal);
    }
    await vm.detachDisk(slot);
  } finally {
    await rm(file, { force: true });
  }
}

async function liveWithPipes(guest: Guest, id: string, disk: string): Promise<void> {
  const init = { id, execId: '' };
  await guest.createContainer(container(id, ['/bin/cat'], pipes, disk));
  const stdin = new PassThrough();
  const ended = beside(endOf(guest, init, stdin));
  await guest.startContainer(id);
  stdin.write('primed\n');
  await guest.describe(id);
  await guest.processes(id);
  await guest.stats(id);
  await guest.setLimits(id, [{ name: 'pids.max', content: 'max' }]);
  await guest.pauseContainer(id);
  // An end waits for it, too.
  for await (const _ of guest.readChanges(id, 0n, changesLimitMs).pieces);
  await guest.resumeContainer(id);
  await execOnce(guest, id);
  stdin.end();
  await ended;
  await guest.removeContainer(id, { force: false, guestEnds: false });
}

async function execOnce(guest: Guest, id: string): Promise<void> {
  const ref = { id, execId: 'exec' };
  await guest.exec(ref, JSON.stringify(processOf(['/bin/true'], false)), pipes, true);
  await Promise.all([...read(guest, ref, 'stdout', 'stderr'), guest.waitExit(ref)]);
  await guest.removeProcess(ref);
}

async function liveWithTerminal(guest: Guest, id: string, disk: string): Promise<void> {
  const init = { id, execId: '' };
  await guest.createContainer(container(id, ['/bin/sh'], terminal, disk));
  const ended = beside(Promise.all([guest.waitExit(init), ...read(guest, init, 'stdout')]));
  await guest.startContainer(id);
  await guest.resize(init, { width: 100, height: 30 });
  await guest.signal(init, SIGKILL, true);
  await ended;
  await guest.removeContainer(id, { force: true, guestEnds: false });
}

/** Asked of each guest soon after its container's start; the program that looks for listeners runs from then on. */
async function hearOfListeners(guest: Guest, signal: AbortSignal): Promise<void> {
  const heard = new AbortController();
  await guest.watchListeners(() => heard.abort(), AbortSignal.any([heard.signal, signal]));
}

/** A step whose failure is looked at later, or not at all when another one fails before. */
function beside<T>(step: Promise<T>): Promise<T> {
  step.catch(() => {});
  return step;
}

/** All streams of a process to their ends, and its exit. */
async function endOf(guest: Guest, ref: ProcessRef, stdin: Readable): Promise<void> {
  const outputs = read(guest, ref, 'stdout', 'stderr');
  await Promise.all([...outputs, guest.pipeStdin(ref, stdin), guest.waitExit(ref)]);
}

/** Reads streams to their ends. */
function read(guest: Guest, ref: ProcessRef, ...streams: OutputName[]): Promise<void>[] {
  const onDelivered = () => {};
  const targets = streams.map((stream) => ({ stream, from: 0, sink: new PassThrough().resume(), onDelivered }));
  return guest.pipeOutputs(ref, targets).map(({ ended }) => ended);
}

/**
 * A container whose root filesystem is the guest's own under a disk of its own.
 *
 * @param disk its serial
 */
function container(id: string, args: string[], stdio: GuestStdio, disk: string): GuestContainer {
  const spec = {
    ociVersion: '1.0.2',
    root: { path: guestRootDirectory(id) },
    hostname: 'kiln',
    process: processOf(args, stdio.terminal),
    mounts,
    linux: {
      cgroupsPath: `/kiln/${id}`,
      namespaces: ['pid', 'ipc', 'uts', 'mount', 'cgroup'].map((type) => ({ type })),
      maskedPaths: ['/proc/kcore', '/proc/keys', '/proc/timer_list', '/sys/firmware'],
      readonlyPaths: ['/proc/bus', '/proc/fs', '/proc/irq', '/proc/sys', '/proc/sysrq-trigger'],
      resources: { devices: [{ allow: false, access: 'rwm' }] },
      seccomp: {
        defaultAction: 'SCMP_ACT_ALLOW',
        architectures: ['SCMP_ARCH_X86_64'],
        syscalls: [{ names: ['kexec_load', 'reboot'], action: 'SCMP_ACT_ERRNO' }],
      },
    },
  };
  return { id, spec: JSON.stringify(spec), stdio, mounts: writableMounts('/', id, disk) };
}

function processOf(args: string[], withTerminal: boolean) {
  const capabilities = ['CAP_CHOWN', 'CAP_DAC_OVERRIDE', 'CAP_KILL', 'CAP_SETGID', 'CAP_SETUID'];
  return {
    terminal: withTerminal,
    args,
    env: ['PATH=/usr/sbin:/usr/bin:/sbin:/bin'],
    cwd: '/',
    user: { uid: 0, gid: 0 },
    capabilities: { bounding: capabilities, effective: capabilities, permitted: capabilities },
    rlimits: [{ type: 'RLIMIT_NOFILE', hard: 1024, soft: 1024 }],
    noNewPrivileges: true,
  };
}

/** What every client of containerd mounts. */
const mounts = [
  { destination: '/proc', type: 'proc', source: 'proc', options: ['nosuid', 'noexec', 'nodev'] },
  {
    destination: '/dev',
    type: 'tmpfs',
    source: 'tmpfs',
    options: ['nosuid', 'strictatime', 'mode=755', 'size=65536k'],
  },
  {
    destination: '/dev/pts',
    type: 'devpts',
    source: 'devpts',
    options: ['nosuid', 'noexec', 'newinstance', 'ptmxmode=0666', 'mode=0620', 'gid=5'],
  },
  { destination: '/dev/shm', type: 'tmpfs', source: 'shm', options: ['nosuid', 'noexec', 'nodev', 'size=65536k'] },
  { destination: '/dev/mqueue', type: 'mqueue', source: 'mqueue', options: ['nosuid', 'noexec', 'nodev'] },
  { destination: '/sys', type: 'sysfs', source: 'sysfs', options: ['nosuid', 'noexec', 'nodev', 'ro'] },
  { destination: '/sys/fs/cgroup', type: 'cgroup', source: 'cgroup', options: ['nosuid', 'noexec', 'nodev', 'ro'] },
  {
    destination: '/run',
    type: 'tmpfs',
    source: 'tmpfs',
    options: ['nosuid', 'strictatime', 'mode=755', 'size=65536k'],
  },
];
