import { Status } from '../../gen/containerd/task_types.ts';
import type { Timestamp } from '../../gen/google/protobuf/timestamp.ts';
import { grpcStatus, KilnError } from '../errors.ts';
import type { CallStatus } from '../rpc/ttrpc/index.ts';
import type { ContainerState } from '../sandbox/process-state.ts';
import type { ContainerRecord } from '../sandbox/record.ts';
import type { SandboxBefore } from './sandbox-service.ts';
import type { TaskBefore } from './task.ts';

/** What containerd is told of a thrown value. */
export function toTtrpcStatus(error: unknown): CallStatus {
  const known = KilnError.from(error);
  return { code: grpcStatus[known.code], message: known.userMessage };
}

export function toTimestamp(date: Date): Timestamp {
  const ms = date.getTime();
  const seconds = Math.floor(ms / 1000);
  return { seconds: BigInt(seconds), nanos: Math.round((ms - seconds * 1000) * 1e6) };
}

export function toTaskStatus(state: ContainerState): Status {
  switch (state.kind) {
    case 'created':
    case 'starting':
      return Status.CREATED;
    case 'running':
      return Status.RUNNING;
    case 'pausing':
      return Status.PAUSING;
    case 'paused':
      return Status.PAUSED;
    case 'stopped':
    case 'deleted':
      return Status.STOPPED;
  }
}

/**
 * What State says of a container that is written down and not taken over yet.
 *
 * @param started whether its task is
 */
export function toTaskBefore(record: ContainerRecord | undefined, started: boolean): TaskBefore {
  if (record === undefined) return { pid: 0, status: Status.UNKNOWN };
  const alive = started ? Status.RUNNING : Status.CREATED;
  return { pid: record.standIn.pid, status: record.exit === undefined ? alive : Status.STOPPED };
}

/** The same of a sandbox, as SandboxStatus has it. */
export function toSandboxBefore({ pid, status }: TaskBefore): SandboxBefore {
  return { pid, ready: status === Status.RUNNING };
}
