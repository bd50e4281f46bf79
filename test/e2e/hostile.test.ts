import { execFileSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { busyboxLayer, type Image } from '../support/images.ts';
import { underKiln } from '../support/paths.ts';
import type { EditableSpec, Scene } from '../support/scene.ts';
import { Lines, type RunningProgram, run } from '../support/spawn.ts';
import { useScene } from '../support/use-scene.ts';

const mib = 1 << 20;

/** Busybox, and a program that floods the host's end of the channel. */
const hostileImage: Image = {
  name: 'docker.io/kiln/hostile:test',
  get layers() {
    const folder = mkdtempSync(join(tmpdir(), 'kt-vsock-flood-'));
    const program = join(folder, 'program');
    execFileSync('gcc', ['-O2', '-s', '-static', '-o', program, join(import.meta.dirname, '../support/vsock-flood.c')]);
    const content = readFileSync(program);
    rmSync(folder, { recursive: true });
    return [busyboxLayer(), [{ kind: 'file', path: 'bin/vsock-flood', mode: 0o755, content }] as const];
  },
};

/** linux/capability.h, 0 to 40. */
const allCapabilities =
  `CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE
  NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN
  SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE
  MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE`
    .split(/\s+/)
    .map((name) => `CAP_${name}`);

/** All that a container can be given: its root is root in the guest, short of leaving its namespaces. */
function privileged(spec: EditableSpec): undefined {
  const { process, linux } = spec;
  process.capabilities = Object.fromEntries(
    ['bounding', 'effective', 'permitted', 'inheritable', 'ambient'].map((set) => [set, allCapabilities]),
  );
  process.noNewPrivileges = false;
  linux.maskedPaths = [];
  linux.readonlyPaths = [];
  linux.resources = { devices: [{ allow: true, access: 'rwm' }] };
  delete linux.seccomp;
}

/** A shell in a container, which is told what to do line by line. */
class Shell implements AsyncDisposable {
  readonly id: string;
  readonly program: RunningProgram;
  readonly lines: Lines;
  #count = 0;

  private constructor(id: string, program: RunningProgram) {
    this.id = id;
    this.program = program;
    this.lines = new Lines(program.stdout);
    program.stderr.resume();
  }

  static async start(scene: Scene, hint: string): Promise<Shell> {
    const id = scene.id(hint);
    const annotations = { 'io.kiln.writable_size_gib': '1', 'io.kiln.memory_mib': '256' };
    await scene.createWithSpec(
      id,
      ['sh'],
      (spec) => {
        spec.annotations = { ...spec.annotations, ...annotations };
        return privileged(spec);
      },
      { image: hostileImage.name },
    );
    const start = ['task', 'start', '--fifo-dir', scene.fifoDir, id];
    return new Shell(id, scene.containerd.ctrStream(start, { interactive: true, timeout: 170_000 }));
  }

  send(line: string): void {
    this.program.stdin.write(`${line}\n`);
  }

  /** What the commands print. */
  async do(commands: string): Promise<string> {
    this.#count += 1;
    const end = `-- ${this.#count} --`;
    const from = this.lines.all.length;
    this.send(`{ ${commands}; } 2>&1; echo "-- $((${this.#count})) --"`);
    await this.lines.waitFor((line) => line === end, `the end of: ${commands}`);
    return this.lines.all.slice(from, this.lines.all.indexOf(end)).join('\n');
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.program[Symbol.asyncDispose]();
  }
}

/** Resident memory of the scene's kilnd, in bytes. */
function kilndMemory(scene: Scene): number {
  const [pid] = scene.kilndPids();
  const status = readFileSync(`/proc/${pid}/status`, 'utf8');
  return Number(/^VmRSS:\s+(\d+) kB$/m.exec(status)?.[1]) * 1024;
}

async function stateFolderBytes(scene: Scene): Promise<number> {
  const { stdout } = await run('du', ['-sb', scene.stateDir]);
  return Number.parseInt(stdout.toString(), 10);
}

describe.runIf(underKiln)('a container that means harm', () => {
  const scene = useScene({ version: '2.1', images: [hostileImage] });

  it('with all privileges hurts its own virtual machine and nobody else', async () => {
    await using victim = await Shell.start(scene, 'victim');
    expect(await victim.do('echo up')).toBe('up');
    await using hostile = await Shell.start(scene, 'hostile');
    expect(await hostile.do('id -u')).toBe('0');
    const [pid] = scene.kilndPids();
    const memory = kilndMemory(scene);
    const times: Record<string, number> = {};
    /** The other container answers, and its task and kilnd are as they were. */
    const undisturbed = async (during: string) => {
      const before = performance.now();
      expect(await victim.do(`echo ${during}`)).toBe(during);
      times[during] = Math.round(performance.now() - before);
    };

    // Its disk: what is full is its own, and it is told.
    expect(await hostile.do('fallocate -l 940M /fill; dd if=/dev/zero of=/more bs=1M; ls -l /more | wc -l')).toMatch(
      /No space left on device[\s\S]*\n1$/,
    );
    await undisturbed('disk');
    expect(await hostile.do('rm -f /fill /more; echo written > /file; cat /file')).toBe('written');

    // The console, by the kernel's log and by the serial line itself.
    hostile.send('echo on > /proc/sys/kernel/printk_devkmsg; i=0');
    hostile.send('while [ $i -lt 1500 ]; do echo "<0>flood $i of the kernel\'s log" > /dev/kmsg; i=$((i+1)); done');
    hostile.send('mknod /tmp/serial c 4 64; yes "$(printf \'\\033[2J\\007serial\')" | head -c 300000 > /tmp/serial');
    await undisturbed('console');
    expect(await hostile.do('echo $i')).toBe('1500');

    // The channel: kilnd's port takes nobody any more, and what comes in is not read.
    expect(await hostile.do('for i in 1 2 3; do vsock-flood 100; done')).toBe('refused\nrefused\nrefused');
    await undisturbed('channel');

    // Its memory: the guest's kernel kills for it, or does not even promise it.
    expect(await hostile.do('dd if=/dev/zero of=/dev/null bs=210M 2>/dev/null; echo $?')).toMatch(/^(137|1)$/);
    await undisturbed('memory');

    expect(await stateFolderBytes(scene)).toBeLessThan(8 * mib);

    // Out of its namespaces: the kernel runs a core dump's program as the guest's root, beside the agent.
    hostile.send('ulimit -c unlimited; echo "|/bin/busybox kill -9 -1" > /proc/sys/kernel/core_pattern');
    hostile.send("sh -c 'kill -SEGV $$'");
    hostile.program.stdin.end();
    expect(await hostile.program.exit).not.toBe(0);
    await undisturbed('murder');
    await scene.remove(hostile.id);

    // Its own machine's end.
    victim.send('echo 1 > /proc/sys/kernel/sysrq; echo b > /proc/sysrq-trigger');
    expect(await victim.program.exit).toBe(255);
    await scene.remove(victim.id);
    expect(scene.kilndPids()).toEqual([pid]);
    process.stdout.write(`answers of the other container, in ms: ${JSON.stringify(times)}\n`);
    const grown = kilndMemory(scene) - memory;
    process.stdout.write(`kilnd has grown by ${Math.round(grown / mib)} MiB\n`);
    expect(grown).toBeLessThan(64 * mib);
  });

  it('forks without end: it can be killed, and takes no more than its machine', async () => {
    await using events = await scene.events();
    await using bomb = await Shell.start(scene, 'bomb');
    expect(await bomb.do('echo up')).toBe('up');
    bomb.send('bomb() { bomb | bomb & }; bomb; while :; do bomb; done');
    // It is under way once the guest has more processes than a shell has.
    const count = async () => (await scene.ctr(['task', 'ps', bomb.id])).trim().split('\n').length;
    while ((await count()) < 100);
    await scene.ctr(['task', 'kill', '--signal', 'SIGKILL', bomb.id]);
    expect((await events.waitFor('/tasks/exit', bomb.id)).event.exit_status).toBe(137);
    expect(await bomb.program.exit).toBe(137);
    await scene.remove(bomb.id);
  });
});
