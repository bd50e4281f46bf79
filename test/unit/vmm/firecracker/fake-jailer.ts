/**
 * Plays the jailer as far as its document promises, without root: nobody is locked in, but the working directory is the
 * jail's root. What it insists on is what docs/jailer.md and src/jailer/src/env.rs of v1.16 do:
 *
 * - --id has 1 to 64 letters, digits and `-`; --exec-file and --chroot-base-dir exist; --uid and --gid are numbers;
 * - a --cgroup is `<file>=<value>`, and belongs to a --cgroup-version of 1 or 2; --resource-limit is fsize= or no-file=;
 * - the root directory is <chroot-base-dir>/<name of exec-file>/<id>/root, and gets a copy of exec-file;
 * - with --new-pid-ns the program is started as another process, whose id is then in <name>.pid, a new file, and the jailer
 *   ends with 0; the program's environment is empty, and its arguments are --id, times, and what came after `--`.
 *
 * Modes: "jail", "fail=<words>", "hang", "dies", whose program ends before anybody looks at it, and "version=<version>". It is
 * of its program's version else.
 */
import { spawn, spawnSync } from 'node:child_process';
import { copyFileSync, existsSync, mkdirSync, readFileSync, realpathSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { parseArgs } from 'node:util';

export function main(mode: string, self: string): void {
  const [name, words = ''] = mode.split('=');
  if (process.argv.includes('--version')) {
    process.stdout.write(`Jailer v${name === 'version' ? words : versionBeside(self)}\n\n`);
    return;
  }
  const end = process.argv.indexOf('--');
  const [args, extra] = [process.argv.slice(2, end), process.argv.slice(end + 1)];
  writeFileSync(`${self}.arguments`, JSON.stringify(args));
  if (name === 'fail') fail(words);
  if (name === 'hang') {
    setInterval(() => {}, 1 << 30);
    return;
  }
  const { id, program, base } = checked(args);
  const root = path.join(base, path.basename(program), id, 'root');
  mkdirSync(root, { recursive: true });
  copyFileSync(program, path.join(root, path.basename(program)));
  for (const folder of ['dev/net', 'run']) mkdirSync(path.join(root, folder), { recursive: true, mode: 0o700 });
  const times = ['--start-time-us', '1', '--start-time-cpu-us', '1', '--parent-cpu-time-us', '1'];
  const pidFile = path.join(root, `${path.basename(program)}.pid`);
  const how = { cwd: root, env: {}, stdio: 'inherit', detached: true } as const;
  if (name === 'dies') {
    const { pid } = spawnSync(program, ['--id', 'no_id'], how);
    writeFileSync(pidFile, String(pid), { flag: 'wx' });
    return;
  }
  // The copy would run as well, but the tests look for what the program writes beside itself.
  const child = spawn(program, ['--id', id, ...times, ...extra], how);
  writeFileSync(pidFile, String(child.pid), { flag: 'wx' });
  child.unref();
}

/** The version that the played Firecracker in the same folder has. */
function versionBeside(self: string): string {
  const source = readFileSync(path.join(path.dirname(self), 'firecracker'), 'utf8');
  return /"version=([\d.]+)"/.exec(source)?.[1] ?? '1.16.1';
}

function checked(args: string[]): { id: string; program: string; base: string } {
  const single = { type: 'string' } as const;
  const several = { type: 'string', multiple: true, default: [] as string[] } as const;
  const { values } = parseArgs({
    args,
    options: {
      ...{ id: single, 'exec-file': single, uid: single, gid: single, 'chroot-base-dir': single },
      ...{ 'cgroup-version': single, 'parent-cgroup': single, cgroup: several, 'resource-limit': several },
      'new-pid-ns': { type: 'boolean' },
    },
  });
  const { id = '', uid = '', gid = '', 'exec-file': program = '', 'chroot-base-dir': base = '' } = values;
  if (!/^[A-Za-z0-9-]{1,64}$/.test(id)) fail(`Invalid instance ID: ${id}`);
  for (const file of [program, base]) if (!existsSync(file)) fail(`Failed to canonicalize path ${file}`);
  if (!/^\d+$/.test(uid) || !/^\d+$/.test(gid)) fail('Invalid uid or gid');
  if (!/^[12]$/.test(values['cgroup-version'] ?? '1')) fail('Invalid cgroup version');
  for (const each of values.cgroup)
    if (!/^[a-z]+\.[^=/]+=[^=]+$/.test(each)) fail(`Invalid format for cgroups: ${each}`);
  for (const each of values['resource-limit']) {
    if (!/^(fsize|no-file)=\d+$/.test(each)) fail(`Invalid resource argument: ${each}`);
  }
  if (values['new-pid-ns'] !== true) fail('the test wants a PID namespace');
  return { id, program: realpathSync(program), base: realpathSync(base) };
}

function fail(words: string): never {
  process.stderr.write(`${words}\n`);
  process.exit(1);
}
