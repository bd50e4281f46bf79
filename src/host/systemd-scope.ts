/**
 * Scopes of systemd: control groups that systemd makes for processes which others have started, org.freedesktop.systemd1(5).
 * A runtime that is told to use systemd's names ("slice:prefix:name") has to ask systemd, which else would take the group
 * for its own leftover. It is asked by busctl(1), which comes with systemd, over the system's bus.
 *
 * A slice "a-b.slice" lies in "a.slice", systemd.slice(5), so its group is /a.slice/a-b.slice. A scope ends, and its
 * group with it, when its last process has ended.
 */
import { execFile } from 'node:child_process';
import { existsSync, readFileSync } from 'node:fs';
import { setTimeout as delay } from 'node:timers/promises';
import { promisify } from 'node:util';
import { KilnError } from '../errors.ts';
import { printable } from './printable.ts';

/** Where a host shows that systemd is its init: sd_booted(3). */
const bootedDirectory = '/run/systemd/system';

/** How long systemd may take to make a scope, and how often it is looked for, in ms. */
const scopeLimitMs = 10_000;
const scopeIntervalMs = 5;

/** A scope by what a cgroupsPath says of it. */
export interface ScopeName {
  readonly slice: string;
  /** The unit: "cri-containerd-<id>.scope". */
  readonly unit: string;
  /** The group, from the root of a hierarchy. */
  readonly group: string;
}

const form = /^([^/:]*):([^/:]*):([^/:]+)$/;

/** Where units without a slice of their own go: systemd.special(7). */
const defaultSlice = 'system.slice';

/**
 * The scope that a cgroupsPath names; undefined for one that is a path.
 *
 * @throws KilnError invalid-argument for a slice that is none
 */
export function scopeOf(cgroupsPath: string): ScopeName | undefined {
  const [, given = '', prefix = '', name = ''] = form.exec(cgroupsPath) ?? [];
  if (name === '' || !(given === '' || given.endsWith('.slice'))) return undefined;
  const slice = given || defaultSlice;
  const unit = prefix === '' ? `${name}.scope` : `${prefix}-${name}.scope`;
  return { slice, unit, group: `${groupOfSlice(slice)}/${unit}` };
}

/** systemd.slice(5). "-.slice" is the root. */
function groupOfSlice(slice: string): string {
  const name = slice.slice(0, -'.slice'.length);
  if (name === '-') return '';
  const parts = name.split('-');
  if (parts.includes('')) {
    throw new KilnError('invalid-argument', `linux.cgroupsPath: "${slice}" is no name of a systemd slice`);
  }
  return parts.map((_part, index) => `/${parts.slice(0, index + 1).join('-')}.slice`).join('');
}

export interface SystemdHost {
  readonly bootedDirectory: string;
  readonly busctl: string;
  /** Where processes show their groups: proc(5). */
  readonly proc: string;
}

export const systemdHost: SystemdHost = { bootedDirectory, busctl: 'busctl', proc: '/proc' };

/** @throws KilnError failed-precondition where systemd is not the host's init */
export function requireSystemd(cgroupsPath: string, host: SystemdHost = systemdHost): void {
  if (existsSync(host.bootedDirectory)) return;
  throw new KilnError(
    'failed-precondition',
    `linux.cgroupsPath "${cgroupsPath}" is a unit of systemd, but systemd does not run on this host`,
    {
      hint: 'let kubelet and containerd use the cgroup driver "cgroupfs"; without systemd, a group is named by its path',
    },
  );
}

/**
 * Has systemd make a scope with one process in it.
 *
 * @throws KilnError internal with systemd's words, deadline-exceeded when it does not do it
 */
export async function startScope(
  { slice, unit, group }: ScopeName,
  pid: number,
  { busctl, proc }: SystemdHost = systemdHost,
): Promise<void> {
  const properties = [
    ...['Description', 's', `Kiln: ${unit}`],
    ...['Slice', 's', slice],
    ...['PIDs', 'au', '1', String(pid)],
    // What is below the group is ours.
    ...['Delegate', 'b', 'true'],
    // Or systemd would end it early in its own shutdown.
    ...['DefaultDependencies', 'b', 'false'],
    // Or one that has failed would stay, and its name could not be used again.
    ...['CollectMode', 's', 'inactive-or-failed'],
  ];
  const manager = ['org.freedesktop.systemd1', '/org/freedesktop/systemd1', 'org.freedesktop.systemd1.Manager'];
  const call = ['StartTransientUnit', 'ssa(sv)a(sa(sv))', unit, 'fail', '6', ...properties, '0'];
  try {
    await promisify(execFile)(busctl, ['--quiet', 'call', ...manager, ...call], { timeout: scopeLimitMs });
  } catch (cause) {
    const { stderr = '', message } = cause as Error & { readonly stderr?: string };
    const failure = `systemd did not make the scope ${unit} in ${slice}: ${printable(stderr).trim() || message}`;
    throw new KilnError('internal', failure, { hint: 'busctl comes with systemd; see also `journalctl -b`', cause });
  }
  // systemd answers when the job is queued. The signal of its end would need a bus connection; the process itself shows it.
  for (let waited = 0; !isIn(`${proc}/${pid}/cgroup`, group); waited += scopeIntervalMs) {
    if (waited >= scopeLimitMs) {
      const limit = `systemd did not put process ${pid} into the scope ${unit} within ${scopeLimitMs / 1000} s`;
      throw new KilnError('deadline-exceeded', limit);
    }
    await delay(scopeIntervalMs);
  }
}

/** Whether a process is in the group, by its file; also when it has ended, which whoever waits for it will see. */
function isIn(file: string, group: string): boolean {
  try {
    return readFileSync(file, 'utf8')
      .split('\n')
      .some((line) => line.endsWith(`:${group}`));
  } catch {
    return true;
  }
}
