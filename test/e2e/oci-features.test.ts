/** What `kiln features` claims of the guest's crun and kernel is done here, all of it; the rest stands in test/unit/oci/features.test.ts. */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { expect, it } from 'vitest';
import type { features } from '../../src/oci/features.ts';
import { useOciStage } from '../support/oci-stage.ts';

type Features = ReturnType<typeof features>;

/** They are about another mount. */
const needOthers = new Set(['bind', 'rbind', 'remount']);

/** System calls that nobody here makes, one for each rule. */
const syscalls = [
  ...['acct', 'swapon', 'swapoff', 'quotactl', 'reboot', 'kexec_load', 'init_module', 'delete_module'],
  ...['add_key', 'request_key', 'keyctl', 'lookup_dcookie', 'settimeofday', 'vhangup', 'nfsservctl', 'uselib'],
];

const stage = useOciStage();

it('a container has everything that `kiln features` claims', async () => {
  const { hooks, mountOptions, linux } = JSON.parse(await stage.must(['features'])) as Features;
  const mark = (moment: string) => `${stage.dir}/hooks-${moment}`;
  const onHost = (moment: string) => ({ path: '/bin/sh', args: ['sh', '-c', `cat >/dev/null; : > ${mark(moment)}`] });
  const inGuest: Readonly<Record<string, object>> = {
    createContainer: { path: '/bin/busybox', args: ['touch', '/tmp/hook'] },
    startContainer: { path: '/bin/busybox', args: ['touch', '/started-by-hook'] },
  };
  const names = syscalls[Symbol.iterator]();
  const rule = (more: object) => ({ names: [names.next().value], ...more });
  const argument = (op: string) => ({ index: 0, value: 4096, valueTwo: 4096, op });
  const options = mountOptions.filter((option) => !needOthers.has(option));
  const bundle = await stage.bundle({
    args: [
      'sh',
      '-c',
      'grep -E "^(Cap|Seccomp:)" /proc/self/status; grep -c " /m/" /proc/self/mountinfo; ls -d /started*',
    ],
    mounts: [
      ...options.map((option) => ({ destination: `/m/${option}`, type: 'tmpfs', source: 'tmpfs', options: [option] })),
      { destination: '/m/remount', type: 'tmpfs', source: 'tmpfs' },
      { destination: '/m/remount', type: 'tmpfs', source: 'tmpfs', options: ['remount', 'ro'] },
      { destination: '/m/bind', type: 'bind', source: stage.dir, options: ['bind'] },
      { destination: '/m/rbind', type: 'bind', source: stage.dir, options: ['rbind'] },
    ],
  });
  const file = join(bundle.directory, 'config.json');
  const config = JSON.parse(readFileSync(file, 'utf8'));
  const sets = ['bounding', 'effective', 'permitted', 'inheritable', 'ambient'];
  config.process.capabilities = Object.fromEntries(sets.map((set) => [set, linux.capabilities]));
  config.hooks = Object.fromEntries(hooks.map((moment) => [moment, [inGuest[moment] ?? onHost(moment)]]));
  config.linux.namespaces = linux.namespaces
    .filter((type) => !['user', 'time'].includes(type))
    .map((type) => ({ type }));
  config.linux.seccomp = {
    defaultAction: 'SCMP_ACT_ALLOW',
    architectures: linux.seccomp.archs,
    flags: linux.seccomp.supportedFlags,
    syscalls: [
      ...linux.seccomp.actions.map((action) => rule({ action })),
      ...linux.seccomp.operators.map((op) => rule({ action: 'SCMP_ACT_ERRNO', args: [argument(op)] })),
    ],
  };
  config.linux.memoryPolicy = { mode: linux.memoryPolicy.modes[0] };
  stage.write(bundle, config);

  const result = await stage.run(['run', '--bundle', bundle.directory, stage.id()], { stdin: '' });
  expect(result).toMatchObject({ code: 0, stderr: '' });
  const lines = result.stdout.toString().trim().split('\n');
  const all = (2n ** BigInt(linux.capabilities.length) - 1n).toString(16).padStart(16, '0');
  const told = ['CapInh', 'CapPrm', 'CapEff', 'CapBnd', 'CapAmb'].map((set) => `${set}:\t${all}`);
  expect(lines).toEqual([...told, 'Seccomp:\t2', String(options.length + 3), '/started-by-hook']);
  for (const moment of hooks.filter((name) => inGuest[name] === undefined)) {
    expect(readFileSync(mark(moment), 'utf8'), moment).toBe('');
  }
});

it('a container has namespaces of users and of time', async () => {
  const mapping = [{ containerID: 0, hostID: 100_000, size: 65_536 }];
  const bundle = await stage.bundle({
    args: ['sh', '-c', 'cat /proc/self/uid_map; ls -l /proc/self/ns/time'],
  });
  const file = join(bundle.directory, 'config.json');
  const config = JSON.parse(readFileSync(file, 'utf8'));
  config.linux.namespaces.push({ type: 'user' }, { type: 'time' });
  Object.assign(config.linux, { uidMappings: mapping, gidMappings: mapping });
  stage.write(bundle, config);
  const result = await stage.run(['run', '--bundle', bundle.directory, stage.id()], { stdin: '' });
  expect(result).toMatchObject({ code: 0, stderr: '' });
  expect(result.stdout.toString()).toMatch(/^ +0 +100000 +65536\n.* -> time:\[\d+\]\n/);
});
