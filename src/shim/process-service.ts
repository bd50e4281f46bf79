/**
 * What `kiln ps` shows: Kiln's own service at a container's socket, beside containerd's, whose Pids tells of numbers only.
 * proto/kiln/oci/v1/processes.proto.
 */
import * as api from '../../gen/kiln/oci/v1/processes.ts';
import { type ServiceTable, unary } from '../rpc/ttrpc/index.ts';
import type { ProcessDetails } from '../sandbox/container.ts';
import type { TaskContainer } from './task.ts';

export const processService = 'kiln.oci.v1.Processes';

/** @param find the container of an id; rejects where there is none */
export function processTable(find: (id: string) => Promise<TaskContainer>): ServiceTable {
  const list = async ({ id }: api.ListRequest): Promise<api.ListResponse> => {
    const container = await find(id);
    return { processes: (await container.processTable()).map(encode) };
  };
  return { [processService]: { List: unary(api.ListRequest, api.ListResponse, list) } };
}

function encode({ startedAt, cpuMs, ...same }: ProcessDetails): api.Process {
  return { ...same, startedMs: BigInt(startedAt.getTime()), cpuMs: BigInt(Math.trunc(cpuMs)) };
}

/** For the client. */
export function decodeProcesses({ processes }: api.ListResponse): readonly ProcessDetails[] {
  return processes.map(({ startedMs, cpuMs, ...same }) => {
    return { ...same, startedAt: new Date(Number(startedMs)), cpuMs: Number(cpuMs) };
  });
}
