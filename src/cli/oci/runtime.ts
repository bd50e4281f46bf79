import { randomBytes } from 'node:crypto';
import { mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { KilnError } from '../../errors.ts';
import { identityOf, isAlive, type ProcessIdentity } from '../../host/process-identity.ts';
import { replaceFile } from '../../host/replace-file.ts';
import { readBundle } from '../../oci/bundle.ts';
import { stringifyJson } from '../../oci/json.ts';
import { networkNamespaceOf } from '../../oci/pod-spec.ts';
import type { Process } from '../../oci/spec.ts';
import { encodeCreateOptions } from '../../shim/create-options.ts';
import { oomFileOf } from '../../shim/oom-file.ts';
import { TaskClient, type TaskStatus } from '../../shim/task-client.ts';
import { type ContainerState, ContainerStates } from './container-state.ts';
import { deleteEndpoint, type EndpointName, endpointName, startEndpoint } from './endpoint.ts';
import { removeImageBundle } from './image-bundle.ts';
import { runs, type StandingProcess, startProcess, stdioPaths } from './process.ts';

export interface TerminalOptions {
  /** The socket that gets the master of the process's terminal. */
  readonly consoleSocket?: string | undefined;
  readonly foreground: boolean;
}

export interface CreateRequest extends TerminalOptions {
  readonly id: string;
  readonly bundle: string;
  readonly pidFile?: string | undefined;
}

export interface ExecRequest extends TerminalOptions {
  readonly id: string;
  readonly process: Process;
  readonly pidFile?: string | undefined;
  readonly ignorePaused?: boolean;
}

/** Who has claimed an id; see `#claim`. */
const claimFile = 'claim.json';

/** What runc does for its callers, done by kilnd: containers of one `--root`. */
export class OciRuntime {
  readonly states: ContainerStates;

  constructor(root: string) {
    this.states = new ContainerStates(root);
  }

  /**
   * Makes a container whose program does not run yet.
   *
   * @throws KilnError; then nothing is left of it
   */
  async create(request: CreateRequest): Promise<StandingProcess> {
    const { id, pidFile, foreground } = request;
    if (process.getuid?.() !== 0) {
      throw new KilnError('permission-denied', 'Kiln needs root: rootless containers are not supported', {
        hint: 'run podman or Docker as root',
      });
    }
    const bundle = await readBundle(path.resolve(request.bundle));
    const { spec } = bundle;
    const terminal = terminalKind(spec.process.terminal ?? false, request);
    const name = this.#name(id);
    await using stack = new AsyncDisposableStack();
    const directory = await this.#claim(id, bundle.dir);
    stack.defer(() => this.states.remove(id));
    const address = await startEndpoint(name, bundle.dir);
    stack.defer(() => deleteEndpoint(name, bundle.dir));
    const networkNamespace = networkNamespaceOf(spec) ?? '-';
    const where = { directory, terminal };
    const rootfs = bundle.rootPath;
    const standing = await startProcess({
      ...where,
      rootfs,
      foreground,
      networkNamespace,
      address,
      ...name,
      execId: '',
    });
    stack.defer(() => standing.abandon());
    using task = new TaskClient(address);
    await task.create({
      ...{ id: name.id, bundle: bundle.dir, rootfs: [], checkpoint: '', parentCheckpoint: '' },
      ...stdioPaths(where),
      options: encodeCreateOptions({ processPid: standing.pid, oomFile: oomFileOf(bundle.dir, spec) }),
    });
    this.states.write({
      ...{ ociVersion: spec.ociVersion, id, pid: standing.pid, bundle: bundle.dir, rootfs: bundle.rootPath },
      created: new Date().toISOString(),
      ...(spec.annotations === undefined ? {} : { annotations: spec.annotations }),
      owner: process.getuid?.() ?? 0,
      address,
    });
    if (pidFile !== undefined) replaceFile(pidFile, String(standing.pid));
    standing.go();
    stack.move();
    return standing;
  }

  /** Runs the program of a container that was created. */
  async start(id: string): Promise<void> {
    const status = await this.status(this.states.read(id));
    if (status === 'running' || status === 'paused') {
      throw new KilnError('failed-precondition', 'cannot start an already running container');
    }
    if (status === 'stopped') throw new KilnError('failed-precondition', 'cannot start a container that has stopped');
    await this.#call(id, (task, name) => task.start(name.id));
  }

  /** One that nobody knows of any more has stopped: its virtual machine is gone. */
  async status({ id, pid, address }: ContainerState): Promise<TaskStatus> {
    using task = new TaskClient(address);
    try {
      return await task.status(this.#name(id).id);
    } catch (error) {
      const { code } = KilnError.from(error);
      // While its process is there, so is the container: then it is kilnd that cannot be had.
      if (code === 'not-found' || (code === 'unavailable' && !runs(pid))) return 'stopped';
      throw error;
    }
  }

  /** @throws KilnError failed-precondition, in runc's words, for one that does not run */
  async kill(id: string, signal: number, all: boolean): Promise<void> {
    const state = this.states.read(id);
    if ((await this.status(state)) === 'stopped') throw notRunning();
    try {
      await this.#call(id, (task, name) => task.kill({ id: name.id, execId: '', signal, all }));
    } catch (error) {
      throw KilnError.from(error).code === 'not-found' ? notRunning() : error;
    }
  }

  /** Removes a container, by force also one that runs, or that is only half there. */
  async delete(id: string, force: boolean): Promise<void> {
    let state: ContainerState;
    try {
      state = this.states.read(id);
    } catch (error) {
      if (!force) throw error;
      await deleteEndpoint(this.#name(id), '/');
      this.states.remove(id);
      return;
    }
    if (!force) await this.#requireNotRunning(state);
    await deleteEndpoint(this.#name(id), state.bundle);
    this.states.remove(id);
    removeImageBundle(state.bundle);
  }

  async #requireNotRunning(state: ContainerState): Promise<void> {
    const status = await this.status(state);
    if (status !== 'running' && status !== 'paused') return;
    throw new KilnError('failed-precondition', `cannot delete container ${state.id} that is not stopped: ${status}`);
  }

  /** Runs one more process in a container. */
  async exec(request: ExecRequest): Promise<StandingProcess> {
    const { id, foreground, pidFile } = request;
    const state = this.states.read(id);
    const status = await this.status(state);
    if (status === 'stopped') throw new KilnError('failed-precondition', 'cannot exec in a stopped container');
    if (status === 'paused' && request.ignorePaused !== true) {
      throw new KilnError('failed-precondition', 'cannot exec in a paused container (use --ignore-paused to override)');
    }
    const terminal = terminalKind(request.process.terminal ?? false, request);
    this.#sweep(id);
    const execId = `exec-${randomBytes(8).toString('hex')}`;
    const directory = path.join(this.states.directory(id), execId);
    const name = this.#name(id);
    const { address, rootfs } = state;
    using task = new TaskClient(address);
    await using stack = new AsyncDisposableStack();
    mkdirSync(directory, { mode: 0o700 });
    stack.defer(() => rmSync(directory, { recursive: true, force: true }));
    const where = { directory, terminal };
    const standing = await startProcess({
      ...where,
      rootfs,
      foreground,
      networkNamespace: '=',
      address,
      ...name,
      execId,
    });
    stack.defer(() => standing.abandon());
    await task.exec({ id: name.id, execId, ...stdioPaths(where) }, stringifyJson(request.process), standing.pid);
    stack.defer(() => task.delete(name.id, execId).then(() => {}));
    await task.start(name.id, execId);
    writeFileSync(path.join(directory, 'pid'), String(standing.pid));
    if (pidFile !== undefined) replaceFile(pidFile, String(standing.pid));
    standing.go();
    stack.move();
    return standing;
  }

  /** The process that an exec without a file of its own begins with: the container's, with another command line. */
  async processOf(id: string): Promise<Process> {
    const { spec } = await readBundle(this.states.read(id).bundle);
    return spec.process;
  }

  async pause(id: string): Promise<void> {
    await this.#call(id, (task, name) => task.pause(name.id));
  }

  async resume(id: string): Promise<void> {
    await this.#call(id, (task, name) => task.resume(name.id));
  }

  /** Talks with the task service of a container that exists. */
  withTask<T>(id: string, talk: (task: TaskClient, kilndId: string) => Promise<T>): Promise<T> {
    return this.#call(id, (task, name) => talk(task, name.id));
  }

  async #call<T>(id: string, call: (task: TaskClient, name: EndpointName) => Promise<T>): Promise<T> {
    const { address } = this.states.read(id);
    using task = new TaskClient(address);
    return await call(task, this.#name(id));
  }

  #name(id: string): EndpointName {
    return endpointName(this.states.root, id);
  }

  /**
   * Takes the id, for this process to make the container: one that was killed while it did has left no state, and its claim
   * is void.
   */
  async #claim(id: string, bundle: string): Promise<string> {
    const claim = path.join(this.states.directory(id), claimFile);
    if (claimIsVoid(claim)) {
      await deleteEndpoint(this.#name(id), bundle);
      this.states.remove(id);
    }
    const directory = this.states.claim(id);
    writeFileSync(claim, JSON.stringify(identityOf(process.pid)));
    return directory;
  }

  /** Removes what execs that have ended have left: no process of ours was there any more. */
  #sweep(id: string): void {
    const directory = this.states.directory(id);
    for (const name of readdirSync(directory)) {
      if (!name.startsWith('exec-')) continue;
      const exec = path.join(directory, name);
      try {
        if (runs(Number(readFileSync(path.join(exec, 'pid'), 'utf8')))) continue;
        rmSync(exec, { recursive: true, force: true });
      } catch {
        // It is just being started.
      }
    }
  }
}

/** Whether a claim was made by a process that has ended without a container. */
function claimIsVoid(file: string): boolean {
  try {
    readFileSync(path.join(path.dirname(file), 'state.json'));
    return false;
  } catch {
    // Only then the claim counts.
  }
  try {
    return !isAlive(JSON.parse(readFileSync(file, 'utf8')) as ProcessIdentity);
  } catch {
    return false;
  }
}

function notRunning(): KilnError {
  return new KilnError('failed-precondition', 'container not running');
}

/** What kiln-process is to do for a terminal. @throws KilnError invalid-argument, in runc's words */
function terminalKind(wanted: boolean, { consoleSocket, foreground }: TerminalOptions): string {
  if (!wanted) {
    if (consoleSocket === undefined) return 'none';
    throw new KilnError('invalid-argument', 'cannot use console socket if kiln will not detach or allocate tty');
  }
  if (consoleSocket !== undefined) return path.resolve(consoleSocket);
  if (!foreground) {
    throw new KilnError('invalid-argument', 'cannot allocate tty if kiln will detach without setting console socket');
  }
  if (process.stdin.isTTY) return 'own';
  throw new KilnError('invalid-argument', 'process.terminal is true, but standard input is no terminal', {
    hint: 'set process.terminal to false, or give a --console-socket',
  });
}
