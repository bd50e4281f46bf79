/** What containerd is told of a process that is deleted: by Delete, and by the shim binary's `delete` on its stdout. */
import * as api from '../../gen/containerd/task.ts';
import { toTimestamp } from './status.ts';
import type { EndedProcess } from './task.ts';

/** Exit status that containerd is given for a container whose end nobody saw; what runc's shim answers. */
export const killedStatus = 137;

export function toDeleteResponse({ pid, exit }: Pick<EndedProcess, 'pid' | 'exit'>): api.DeleteResponse {
  return { pid, exitStatus: exit.status, exitedAt: toTimestamp(exit.at) };
}

/** What the shim binary's `delete` prints for a container that nobody knows any more. */
export function unknownTaskDeleted(): Uint8Array {
  return toDeleteReply({ pid: 0, exit: { status: killedStatus, at: new Date() } });
}

/** What it prints for one whose end is known. */
export function toDeleteReply(last: Pick<EndedProcess, 'pid' | 'exit'>): Uint8Array {
  return api.DeleteResponse.encode(toDeleteResponse(last)).finish();
}
