/** What the tests of the C programs share: compiling them, a private installation, and the removal of every trace. */
import { execFileSync, spawn, spawnSync } from 'node:child_process';
import { chmodSync, existsSync, mkdirSync, mkdtempSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { buffer } from 'node:stream/consumers';
import { fileURLToPath } from 'node:url';

const repository = fileURLToPath(new URL('../../..', import.meta.url));
const fakeKilnd = fileURLToPath(new URL('./fake-kilnd.ts', import.meta.url));

export const hasGcc = spawnSync('gcc', ['--version']).status === 0;
export const isRoot = process.getuid?.() === 0;

export const launcherSources = [
  ...['launcher.c', 'launcher-kilnd.c'],
  ...['relay.c', 'relay-clients.c', 'relay-queues.c', 'relay-frame.c'],
  ...['relay-holds.c', 'relay-socket.c', 'relay-starter.c'],
];

export function compile(sources: readonly string[], out: string, defines: readonly string[] = []): void {
  mkdirSync(path.dirname(out), { recursive: true });
  execFileSync('gcc', [
    ...(out.endsWith('.so') ? ['-shared', '-fPIC'] : ['-static']),
    ...['-O2', '-Wall', '-Wextra', '-Werror', '-o', out],
    ...defines,
    ...sources.map((source) => path.join(repository, 'native', source)),
  ]);
}

/** A short path: sockets are made in it. */
export function temporaryFolder(): string {
  return mkdtempSync(path.join(tmpdir(), 'kiln-t'));
}

export interface Outcome {
  readonly code: number | null;
  readonly stdout: Buffer;
  readonly text: string;
  readonly stderr: string;
}

/** Runs a program and resolves when it has exited and every pipe to it has reached its end. */
export async function run(
  file: string,
  args: readonly string[],
  options: { env?: NodeJS.ProcessEnv; cwd?: string; stdin?: Uint8Array | 'ignore'; extraFds?: readonly number[] } = {},
): Promise<Outcome> {
  const { stdin = 'ignore', extraFds = [] } = options;
  const child = spawn(file, args, {
    env: options.env ?? process.env,
    cwd: options.cwd,
    stdio: [stdin === 'ignore' ? 'ignore' : 'pipe', 'pipe', 'pipe', ...extraFds],
  });
  const closed = new Promise<number | null>((resolve, reject) => {
    child.once('error', reject);
    child.once('close', resolve);
  });
  child.stdin?.on('error', () => {}); // EPIPE where the program does not read it
  if (stdin !== 'ignore') child.stdin?.end(stdin);
  const [code, stdout, stderr] = await Promise.all([
    closed,
    buffer(child.stdout as NodeJS.ReadableStream),
    buffer(child.stderr as NodeJS.ReadableStream),
  ]);
  return { code, stdout, text: stdout.toString(), stderr: stderr.toString() };
}

/** A private bin folder with the launcher and a kilnd that is a script of the test's choice, and a state folder. */
export class Installation implements Disposable {
  readonly folder = temporaryFolder();
  readonly stateDir = path.join(this.folder, 'state');
  readonly bundle = path.join(this.folder, 'bundle');
  readonly launcher = path.join(this.folder, 'bin', 'containerd-shim-kiln-v2');

  /** @param compiled a launcher, hard-linked into place: the launcher finds kilnd beside itself */
  constructor(compiled: string) {
    mkdirSync(this.bundle);
    mkdirSync(path.dirname(this.launcher));
    execFileSync('ln', [compiled, this.launcher]);
  }

  get kilnd(): string {
    return path.join(this.folder, 'bin', 'kilnd');
  }

  /** `ready`, `error`, … as fake-kilnd.ts says. */
  installFakeKilnd(mode: string): void {
    // A shebang and no shell, which would add variables of its own to the environment that is looked at.
    const source = `#!${process.execPath}\nimport { main } from ${JSON.stringify(fakeKilnd)};\nawait main('${mode}');\n`;
    this.installKilnd(source);
  }

  installKilnd(script: string): void {
    writeFileSync(this.kilnd, script);
    chmodSync(this.kilnd, 0o755);
  }

  environment(extra: NodeJS.ProcessEnv = {}): NodeJS.ProcessEnv {
    return { PATH: process.env.PATH, KILN_STATE_DIR: this.stateDir, ...extra };
  }

  /** Runs the launcher as containerd does. */
  launch(
    args: readonly string[],
    options: { env?: NodeJS.ProcessEnv; stdin?: Uint8Array | 'ignore'; extraFds?: readonly number[] } = {},
  ): Promise<Outcome> {
    const { env, ...rest } = options;
    return run(this.launcher, args, { cwd: this.bundle, env: this.environment(env), ...rest });
  }

  start(options: Parameters<Installation['launch']>[1] = {}): Promise<Outcome> {
    return this.launch(['-namespace', 'default', '-address', '/run/c.sock', '-id', 'one', 'start'], options);
  }

  /** The pid of every kilnd that this installation has started, by the files that they leave. */
  kilnds(): number[] {
    const folder = path.join(this.stateDir, 'pids');
    return existsSync(folder) ? readdirSync(folder).map(Number) : [];
  }

  [Symbol.dispose](): void {
    for (const pid of this.kilnds()) kill(pid);
    rmSync(this.folder, { recursive: true, force: true });
  }
}

export function kill(pid: number): void {
  try {
    process.kill(pid, 'SIGKILL');
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ESRCH') throw error;
  }
}

export function isAlive(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch {
    return false;
  }
}
