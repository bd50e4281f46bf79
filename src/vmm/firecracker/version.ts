import { execFile } from 'node:child_process';
import { statSync } from 'node:fs';
import { promisify } from 'node:util';
import { KilnError } from '../../errors.ts';
import { findProgram } from '../../host/program.ts';

/** The oldest release that Kiln speaks to, as `[major, minor]`. */
const oldestVersion = [1, 13] as const;

/** What a program that is asked for its version may take, in ms. */
const versionLimitMs = 5_000;

/** A version as two numbers that order it; undefined for what is no version. */
export function parseVersion(version: string): readonly [major: number, minor: number] | undefined {
  const [, major, minor] = /^v?(\d+)\.(\d+)\./.exec(version) ?? [];
  return major === undefined ? undefined : [Number(major), Number(minor)];
}

/** Whether a supported version is at least 1.`minor`. */
export function isAtLeast(version: string, minor: number): boolean {
  return (parseVersion(version)?.[1] ?? 0) >= minor;
}

/** False for a Firecracker that is too old, or of another major version. */
export function isSupported(version: string): boolean {
  const [major, minor] = parseVersion(version) ?? [0, 0];
  return major === oldestVersion[0] && minor >= oldestVersion[1];
}

/** Throws `failed-precondition` for a Firecracker that is not supported. */
export function requireSupportedVersion(version: string): void {
  if (isSupported(version)) return;
  throw new KilnError('failed-precondition', `Firecracker ${version} is not supported`, {
    hint: `install version ${oldestVersion.join('.')} or newer, or set vm.vmm = "qemu" in the config file`,
  });
}

/** Guests that were restored by it could not call their host: CHANGELOG.md, 1.16.1, #5958. */
const lostCalls = /^1\.16\.0\b/;

/** Throws `failed-precondition` for a Firecracker whose restored VMs are not reached. */
export function requireVersionWithTemplates(version: string): void {
  if (!lostCalls.test(version)) return;
  const message = `Firecracker ${version} loses the calls of restored guests, so there are no templates with it`;
  throw new KilnError('failed-precondition', message, { hint: 'install version 1.16.1 or newer, or 1.15' });
}

/**
 * The two are made for each other: what the jailer puts on Firecracker's command line changes with the releases (docs/jailer.md).
 * A program that is not there, or a Firecracker that says no version, is left to the start, which tells more.
 *
 * @throws KilnError failed-precondition when they differ
 */
export async function requireSameVersion(firecracker: string, jailer: string): Promise<void> {
  if (findProgram(jailer) === undefined) return;
  const [its, theJailers] = await Promise.all([versionOf(firecracker), versionOf(jailer)]);
  if (parseVersion(its) === undefined || its === theJailers) return;
  const message = `the jailer ${jailer} is of version ${theJailers}, and Firecracker ${firecracker} of version ${its}`;
  throw new KilnError('failed-precondition', message, {
    hint: 'install both from one release; vm.firecracker and vm.jailer in the config file name them',
  });
}

const known = new Map<string, string>();

/**
 * What Firecracker or the jailer says to `--version`: "1.16.1" of "Firecracker v1.16.1"; or why it says nothing like that. It
 * is asked once, until there is another program in its place.
 */
export async function versionOf(program: string): Promise<string> {
  const { ino, mtimeMs } = statSync(program);
  const key = `${program} ${ino} ${mtimeMs}`;
  const version = known.get(key) ?? (await askVersion(program));
  // A program that did not answer may do so the next time.
  if (parseVersion(version) !== undefined) known.set(key, version);
  return version;
}

async function askVersion(program: string): Promise<string> {
  try {
    const { stdout } = await promisify(execFile)(program, ['--version'], { timeout: versionLimitMs, env: {} });
    return /^(?:Firecracker|Jailer) v(\S+)/.exec(stdout)?.[1] ?? 'unknown';
  } catch (error) {
    return `unknown (${(error as Error).message.split('\n', 1)[0]})`;
  }
}
