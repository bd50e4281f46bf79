import { existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import {
  type ControlGroupHost,
  clearControlGroup,
  HostControlGroup,
  planControlGroup,
} from '../../../src/host/control-group.ts';
import { type Logger, loggerTo } from '../../../src/observe/logger.ts';

let folder: string;
let directory: string;
let lines: string[];
let logger: Logger;
beforeEach(() => {
  folder = mkdtempSync(path.join(tmpdir(), 'kiln-cg'));
  directory = path.join(folder, 'container');
  mkdirSync(directory);
  lines = [];
  logger = loggerTo({ write: (line) => void lines.push(line) }, 'trace');
});
afterEach(() => rmSync(folder, { recursive: true }));

/** A host with these hierarchies, each at a folder of ours: "cgroup memory" or "cgroup2". */
function hostWith(...mounts: readonly string[]): ControlGroupHost {
  const table = mounts.map((mount) => {
    const [type = '', options = 'unified'] = mount.split(' ');
    const at = path.join(folder, options);
    mkdirSync(at);
    return `${type} ${at} ${type} rw,nosuid,${options} 0 0`;
  });
  const file = path.join(folder, 'mounts');
  writeFileSync(file, ['tmpfs /run tmpfs rw 0 0', ...table, ''].join('\n'));
  const booted = path.join(folder, 'booted');
  mkdirSync(booted);
  const busctl = path.join(folder, 'busctl');
  return { mounts: file, systemd: { bootedDirectory: booted, busctl, proc: path.join(folder, 'proc') } };
}

function read(...names: readonly string[]): string {
  return readFileSync(path.join(folder, ...names), 'utf8');
}

/** The kernel's own files go with their group; ours have to be removed first. */
function emptyFiles(at: string): void {
  for (const entry of readdirSync(at, { withFileTypes: true })) {
    if (entry.isDirectory()) emptyFiles(path.join(at, entry.name));
    else rmSync(path.join(at, entry.name));
  }
}

async function group(host: ControlGroupHost, cgroupsPath: string): Promise<HostControlGroup> {
  const plan = planControlGroup(cgroupsPath, host);
  if (plan === undefined) throw new Error('nothing is planned');
  return HostControlGroup.make({ directory, plan, logger }, host);
}

describe("a spec's linux.cgroupsPath", () => {
  test.each([
    ['/kubepods/burstable/pod1/abc', '/kubepods/burstable/pod1/abc'],
    ['kubepods/abc', '/kubepods/abc'],
    ['/../../x', '/x'],
    ['/a:b:c', '/a:b:c'],
    ['a:b:c', '/a:b:c'],
  ])('%s is the group %s', (given, expected) => {
    expect(planControlGroup(given, hostWith())?.group).toBe(expected);
  });

  test.each([
    ['a-b.slice:cri-containerd:c1', '/a.slice/a-b.slice/cri-containerd-c1.scope'],
    ['-.slice:cri:c1', '/cri-c1.scope'],
    [':nerdctl:c1', '/system.slice/nerdctl-c1.scope'],
    ['a.slice::c1', '/a.slice/c1.scope'],
  ])('%s is the scope %s of systemd', (given, expected) => {
    expect(planControlGroup(given, hostWith())).toMatchObject({ group: expected, scope: { group: expected } });
  });

  test('that is absent asks for nothing', () => {
    expect([planControlGroup(undefined), planControlGroup('')]).toEqual([undefined, undefined]);
  });

  test.each(['a--b.slice:cri:c1', '-a.slice:cri:c1', '.slice:cri:c1'])('%s is refused', (given) => {
    expect(() => planControlGroup(given, hostWith())).toThrow('is no name of a systemd slice');
  });

  test('in the form of systemd is refused where systemd does not run', () => {
    const host = hostWith();
    rmSync(host.systemd.bootedDirectory, { recursive: true });
    expect(() => planControlGroup('a.slice:cri:c1', host)).toThrow(
      'linux.cgroupsPath "a.slice:cri:c1" is a unit of systemd, but systemd does not run on this host',
    );
  });
});

describe('the control group of a sandbox', () => {
  test('is in every hierarchy, with the CPUs that its parent has, and vanishes from them with its last holder', async () => {
    const host = hostWith('cgroup memory', 'cgroup cpuset', 'cgroup name=systemd', 'cgroup2');
    writeFileSync(path.join(folder, 'cpuset/cpuset.cpus'), '0-1\n');
    writeFileSync(path.join(folder, 'cpuset/cpuset.mems'), '0\n');
    const first = await group(host, '/pods/p1/s1');
    for (const name of ['memory', 'cpuset', 'name=systemd', 'unified']) {
      expect(existsSync(path.join(folder, name, 'pods/p1/s1'))).toBe(true);
    }
    expect(read('cpuset/pods/cpuset.cpus') + read('cpuset/pods/p1/s1/cpuset.cpus')).toBe('0-10-1');
    expect(existsSync(path.join(folder, 'unified/cgroup.subtree_control'))).toBe(false);
    await first.add(77);
    for (const name of ['memory', 'cpuset', 'name=systemd', 'unified']) {
      expect(read(name, 'pods/p1/s1/cgroup.procs')).toBe('77');
    }
    const member = path.join(folder, 'member');
    mkdirSync(member);
    const second = first.share(member);
    for (const name of ['memory', 'cpuset', 'name=systemd', 'unified']) {
      emptyFiles(path.join(folder, name, 'pods/p1/s1'));
    }
    await first[Symbol.asyncDispose]();
    expect(existsSync(path.join(folder, 'memory/pods/p1/s1'))).toBe(true);
    await second[Symbol.asyncDispose]();
    for (const name of ['memory', 'cpuset', 'name=systemd', 'unified']) {
      expect(existsSync(path.join(folder, name, 'pods/p1/s1'))).toBe(false);
      expect(existsSync(path.join(folder, name, 'pods/p1'))).toBe(true);
    }
    expect(lines).toEqual([]);
  });

  test('has the CPUs of the group right above it, and one above that has none gets its own from its parent', async () => {
    const host = hostWith('cgroup cpuset');
    for (const [name, cpus] of [
      ['', '0-3\n'],
      ['pods', '\n'],
      ['pods/p1', '2\n'],
    ] as const) {
      mkdirSync(path.join(folder, 'cpuset', name), { recursive: true });
      writeFileSync(path.join(folder, 'cpuset', name, 'cpuset.cpus'), cpus);
      writeFileSync(path.join(folder, 'cpuset', name, 'cpuset.mems'), '0\n');
    }
    await group(host, '/pods/p1/s1/inner');
    const cpus = ['pods', 'pods/p1', 'pods/p1/s1', 'pods/p1/s1/inner'].map((at) => read('cpuset', at, 'cpuset.cpus'));
    expect(cpus).toEqual(['0-3', '2\n', '2', '2']);
    expect(read('cpuset/pods/p1/s1/inner/cpuset.mems')).toBe('0');
  });

  test('is counted by all controllers that the host has, where it has cgroup v2 alone', async () => {
    const host = hostWith('cgroup2');
    writeFileSync(path.join(folder, 'unified/cgroup.controllers'), 'cpu memory\n');
    await group(host, '/pods/s1');
    // The last of those that were written, each for itself.
    expect(read('unified/cgroup.subtree_control')).toBe('+memory');
    expect(existsSync(path.join(folder, 'unified/pods/s1/cgroup.subtree_control'))).toBe(false);
  });

  test('can be limited, by what the host can limit', async () => {
    const host = hostWith('cgroup memory', 'cgroup cpu', 'cgroup2');
    const made = await group(host, '/s1');
    writeFileSync(path.join(folder, 'memory/s1/memory.limit_in_bytes'), '-1');
    made.limit({ memoryBytes: 5000, pids: 9 });
    expect(read('memory/s1/memory.limit_in_bytes')).toBe('5000');
    expect(existsSync(path.join(folder, 'cpu/s1/pids.max'))).toBe(false);
  });

  test('that two containers ask for goes with the last one, whoever has made it', async () => {
    const host = hostWith('cgroup memory');
    const first = await group(host, '/both');
    const second = await group(host, '/both');
    await first[Symbol.asyncDispose]();
    expect(existsSync(path.join(folder, 'memory/both'))).toBe(true);
    await second[Symbol.asyncDispose]();
    expect(existsSync(path.join(folder, 'memory/both'))).toBe(false);
  });

  test('that was there before is used, and stays', async () => {
    const host = hostWith('cgroup memory');
    mkdirSync(path.join(folder, 'memory/s1'));
    const made = await group(host, '/s1');
    await made[Symbol.asyncDispose]();
    expect(existsSync(path.join(folder, 'memory/s1'))).toBe(true);
    // Nor does the next kilnd remove it.
    await group(host, '/s1');
    await clearControlGroup(directory, logger);
    expect(existsSync(path.join(folder, 'memory/s1'))).toBe(true);
  });

  test('that was there in one hierarchy goes from the others', async () => {
    const host = hostWith('cgroup memory', 'cgroup cpuset', 'cgroup pids', 'cgroup2');
    for (const file of ['cpuset.cpus', 'cpuset.mems']) writeFileSync(path.join(folder, 'cpuset', file), '0\n');
    for (const name of ['memory', 'cpuset']) mkdirSync(path.join(folder, name, 'mixed'));
    const made = await group(host, '/mixed');
    const there = () =>
      ['memory', 'cpuset', 'pids', 'unified'].map((name) => existsSync(path.join(folder, name, 'mixed')));
    expect(there()).toEqual([true, true, true, true]);
    emptyFiles(path.join(folder, 'unified/mixed'));
    await made[Symbol.asyncDispose]();
    expect(there()).toEqual([true, true, false, false]);
  });

  test('that cannot be made is an error that names it, and leaves nothing', async () => {
    const host = hostWith('cgroup memory', 'cgroup pids');
    writeFileSync(path.join(folder, 'pids/s1'), 'in the way');
    await expect(group(host, '/s1/x')).rejects.toThrow(
      `cannot make the control group /s1/x in ${folder}/pids: ENOTDIR`,
    );
    expect(existsSync(path.join(folder, 'memory/s1/x'))).toBe(false);
  });

  test('that somebody uses stays, and is told of', async () => {
    const host = hostWith('cgroup memory');
    const made = await group(host, '/used');
    // A folder with a file that is not the kernel's cannot be removed either.
    writeFileSync(path.join(folder, 'memory/used/file'), '');
    await made[Symbol.asyncDispose]();
    expect(lines.join()).toContain('a control group stays, since it cannot be removed');
  });

  test('is found again by the next kilnd, which removes it', async () => {
    const host = hostWith('cgroup memory');
    expect(HostControlGroup.adopt(directory, logger, host)).toBeUndefined();
    await group(host, '/s1');
    const before = HostControlGroup.adopt(directory, logger, host);
    await before?.add(5);
    expect(read('memory/s1/cgroup.procs')).toBe('5');
    emptyFiles(path.join(folder, 'memory/s1'));
    await clearControlGroup(directory, logger);
    expect(existsSync(path.join(folder, 'memory/s1'))).toBe(false);
    await clearControlGroup(directory, logger);
    expect(lines).toEqual([]);
  });
});

describe('a scope of systemd', () => {
  /** A busctl that notes how it was called each time, and then does that. */
  function busctl({ systemd }: ControlGroupHost, script: string): void {
    writeFileSync(systemd.busctl, `#!/bin/sh\necho "$@" >>${folder}/calls\n${script}\n`, { mode: 0o755 });
  }

  test('is made by systemd for the first process, and the others are put there', async () => {
    const host = hostWith('cgroup memory', 'cgroup name=systemd');
    const proc = path.join(folder, 'proc/41');
    const scope = path.join(folder, 'name=systemd/a.slice/cri-c1.scope');
    busctl(host, `mkdir -p ${proc} ${scope}; echo '1:name=systemd:/a.slice/cri-c1.scope' >${proc}/cgroup`);
    const made = await group(host, 'a.slice:cri:c1');
    expect(existsSync(path.join(folder, 'memory/a.slice'))).toBe(false);
    // Of two at once, either is written last; a group of the kernel's would have both.
    await Promise.all([made.add(41), made.add(42)]);
    await made.add(43);
    const expected =
      '--quiet call org.freedesktop.systemd1 /org/freedesktop/systemd1 org.freedesktop.systemd1.Manager ' +
      'StartTransientUnit ssa(sv)a(sa(sv)) cri-c1.scope fail 6 Description s Kiln: cri-c1.scope Slice s a.slice ' +
      'PIDs au 1 41 Delegate b true DefaultDependencies b false CollectMode s inactive-or-failed 0\n';
    expect(read('calls')).toBe(expected);
    expect(read('memory/a.slice/cri-c1.scope/cgroup.procs')).toBe('43');
    expect(read('name=systemd/a.slice/cri-c1.scope/cgroup.procs')).toBe('43');
  });

  test('of cgroup v2 has the controllers that systemd gives it', async () => {
    const host = hostWith('cgroup2');
    writeFileSync(path.join(folder, 'unified/cgroup.controllers'), 'cpu memory\n');
    const proc = path.join(folder, 'proc/41');
    busctl(
      host,
      `mkdir -p ${proc} ${folder}/unified/a.slice/cri-c1.scope; echo '0::/a.slice/cri-c1.scope' >${proc}/cgroup`,
    );
    const made = await group(host, 'a.slice:cri:c1');
    await made.add(41);
    expect(read('unified/a.slice/cri-c1.scope/cgroup.procs')).toBe('41');
    expect(existsSync(path.join(folder, 'unified/cgroup.subtree_control'))).toBe(false);
  });

  test('that systemd refuses is an error in its words', async () => {
    const host = hostWith('cgroup name=systemd');
    busctl(host, 'echo "Unit cri-c1.scope already exists." >&2; exit 1');
    const made = await group(host, 'a.slice:cri:c1');
    await expect(made.add(41)).rejects.toThrow(
      'systemd did not make the scope cri-c1.scope in a.slice: Unit cri-c1.scope already exists.',
    );
  });
});
