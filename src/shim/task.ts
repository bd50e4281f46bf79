/** A task and its processes as the task service sees them: what it needs of them, and what it keeps of them. */
import * as api from '../../gen/containerd/task.ts';
import type { LimitResources } from '../oci/limits.ts';
import type { ContainerProcess, ContainerStats, ProcessDetails } from '../sandbox/container.ts';
import type { ContainerFiles } from '../sandbox/container-files.ts';
import type { ExecRequest } from '../sandbox/exec.ts';
import type { OomReport } from '../sandbox/oom.ts';
import type { ContainerState, Exit } from '../sandbox/process-state.ts';
import type { WaitableCell } from '../sandbox/waitable-cell.ts';

/** What containerd asks for with Create. */
export type TaskRequest = api.CreateTaskRequest;

/** What containerd asks for with Exec. */
export type ExecTaskRequest = api.ExecProcessRequest;

/** What the task service needs of a process; sandbox/exec.ts has it. */
export interface TaskProcess {
  readonly pid: number;
  readonly state: ContainerState;
  readonly exit: Pick<WaitableCell<Exit>, 'peek' | 'wait'>;
  start(): Promise<void>;
  kill(signal: number, all: boolean): Promise<void>;
  resize(size: { readonly width: number; readonly height: number }): Promise<void>;
  closeStdin(): void;
  delete(): Promise<Exit>;
}

/** What it needs of a container, which is its init process, too; sandbox/container.ts has it. */
export interface TaskContainer extends TaskProcess {
  readonly id: string;
  readonly oom: Pick<OomReport, 'listen'>;
  pause(): Promise<void>;
  resume(): Promise<void>;
  stats(): Promise<ContainerStats>;
  update(resources: LimitResources): Promise<void>;
  exec(request: ExecRequest): TaskProcess;
  processes(): Promise<readonly ContainerProcess[]>;
  /** Absent where there are none: it has ended, or is a pod. */
  readonly files?: ContainerFiles | undefined;
  processTable(): Promise<readonly ProcessDetails[]>;
  /** Ends it if need be, and releases everything; safe to call twice. */
  destroy(): Promise<void>;
}

/** What State says of a task until it is taken over. */
export type TaskBefore = Pick<api.StateResponse, 'pid' | 'status'>;

/** A task of an earlier kilnd. */
export interface RestoredTask {
  readonly container: TaskContainer;
  /** Those that are in the state; the others are registered, and not started. */
  readonly execs: ReadonlyMap<string, TaskProcess>;
}

/** A process as containerd knows it: the init, or an exec. */
export interface Tracked {
  readonly execId: string;
  readonly process: TaskProcess;
  /** As containerd sent it: CreateTaskRequest or ExecProcessRequest. */
  readonly request: Buffer;
  /** What State echoes. */
  readonly stdio: Pick<api.StateResponse, 'stdin' | 'stdout' | 'stderr' | 'terminal'>;
  /** Settled when no start event can come any more, so that TaskExit never overtakes it. */
  startAnnounced: Promise<void>;
  /** Settled when TaskExit is published. Never rejects. */
  exitAnnounced: Promise<void>;
  /** CloseIO has come. */
  stdinClosed: boolean;
  /** The Delete that is under way. */
  deletion: Promise<EndedProcess> | undefined;
}

/** A process that is deleted. */
export interface EndedProcess {
  /** Empty for the init. */
  readonly execId: string;
  readonly pid: number;
  readonly exit: Exit;
}

export interface Task {
  /** Kiln's own command line has made it. */
  readonly ofCommandLine: boolean;
  readonly container: TaskContainer;
  readonly bundle: string;
  readonly init: Tracked;
  /** By exec id. */
  readonly execs: Map<string, Tracked>;
  /** Settled when every TaskOOM that is due has been sent, which the init's TaskExit does not overtake either. */
  oomAnnounced: Promise<void>;
}

export function track(execId: string, process: TaskProcess, asked: Tracked['stdio'], request: Buffer): Tracked {
  const { stdin, stdout, stderr, terminal } = asked;
  const stdio = { stdin, stdout, stderr, terminal };
  const settled = Promise.resolve();
  return {
    execId,
    process,
    request,
    stdio,
    startAnnounced: settled,
    exitAnnounced: settled,
    stdinClosed: false,
    deletion: undefined,
  };
}

export function encodeCreate(request: TaskRequest): Buffer {
  return Buffer.from(api.CreateTaskRequest.encode(request).finish());
}

export function encodeExec(request: ExecTaskRequest): Buffer {
  return Buffer.from(api.ExecProcessRequest.encode(request).finish());
}

/** Resolves when the exit of each process that runs beside the init is announced. */
export async function allExited({ execs }: Task): Promise<void> {
  const started = [...execs.values()].filter(({ process }) => process.pid !== 0);
  await Promise.all(started.map(({ exitAnnounced }) => exitAnnounced));
}
