import { connect } from 'node:net';
import * as api from '../../gen/containerd/task.ts';
import { Status } from '../../gen/containerd/task_types.ts';
import { ListRequest, ListResponse } from '../../gen/kiln/oci/v1/processes.ts';
import { KilnError } from '../errors.ts';
import { type MessageCodec, TtrpcClient, TtrpcError } from '../rpc/ttrpc/index.ts';
import type { ProcessDetails } from '../sandbox/container.ts';
import { execTypeUrl } from './create-options.ts';
import { decodeProcesses, processService } from './process-service.ts';
import { type TaskStats, taskStatsOf } from './runtime-stats.ts';

const taskService = 'containerd.task.v2.Task';

/** Type of the JSON in Update. containerd typeurl, runtime-spec. */
const resourcesType = 'types.containerd.io/opencontainers/runtime-spec/1/LinuxResources';

export type TaskStatus = 'created' | 'running' | 'paused' | 'stopped';

const statuses: Readonly<Record<number, TaskStatus>> = {
  [Status.CREATED]: 'created',
  [Status.RUNNING]: 'running',
  [Status.PAUSED]: 'paused',
  [Status.PAUSING]: 'paused',
};

/** google.protobuf.Empty. */
const empty: MessageCodec<Record<string, never>> = {
  encode: () => ({ finish: () => new Uint8Array(0) }),
  decode: () => ({}),
};

/** One container's task service, as containerd calls it. */
export class TaskClient implements Disposable {
  readonly #client: TtrpcClient;

  /** @param address the path of the container's socket */
  constructor(address: string) {
    this.#client = new TtrpcClient(connect(address));
  }

  create(request: api.CreateTaskRequest): Promise<api.CreateTaskResponse> {
    return this.#call('Create', api.CreateTaskRequest, api.CreateTaskResponse, request);
  }

  start(id: string, execId = ''): Promise<api.StartResponse> {
    return this.#call('Start', api.StartRequest, api.StartResponse, { id, execId });
  }

  /** runtime-spec, runtime.md "State". */
  async status(id: string): Promise<TaskStatus> {
    const { status } = await this.#call('State', api.StateRequest, api.StateResponse, { id, execId: '' });
    return statuses[status] ?? 'stopped';
  }

  kill(request: api.KillRequest): Promise<unknown> {
    return this.#call('Kill', api.KillRequest, empty, request);
  }

  /**
   * @param process as config.json has it, in JSON
   * @param processPid of the process on the host that stands for it
   */
  exec(request: Omit<api.ExecProcessRequest, 'spec'>, process: string, processPid: number): Promise<unknown> {
    const spec = { typeUrl: execTypeUrl(processPid), value: Buffer.from(process) };
    return this.#call('Exec', api.ExecProcessRequest, empty, { ...request, spec });
  }

  delete(id: string, execId = ''): Promise<api.DeleteResponse> {
    return this.#call('Delete', api.DeleteRequest, api.DeleteResponse, { id, execId });
  }

  pids(id: string): Promise<api.PidsResponse> {
    return this.#call('Pids', api.PidsRequest, api.PidsResponse, { id });
  }

  /** As ps(1) shows them, by their pids in the guest. */
  async processes(id: string): Promise<readonly ProcessDetails[]> {
    return decodeProcesses(await this.#call('List', ListRequest, ListResponse, { id }, processService));
  }

  pause(id: string): Promise<unknown> {
    return this.#call('Pause', api.PauseRequest, empty, { id });
  }

  resume(id: string): Promise<unknown> {
    return this.#call('Resume', api.ResumeRequest, empty, { id });
  }

  /** Resolves when the container has ended. */
  async wait(id: string): Promise<void> {
    await this.#call('Wait', api.WaitRequest, api.WaitResponse, { id, execId: '' });
  }

  /** What the container uses, or has used. */
  async stats(id: string): Promise<TaskStats> {
    const { stats } = await this.#call('Stats', api.StatsRequest, api.StatsResponse, { id });
    return taskStatsOf(stats);
  }

  /** @param resources linux.resources as config.json has it, in JSON */
  update(id: string, resources: string): Promise<unknown> {
    const given = { typeUrl: resourcesType, value: Buffer.from(resources) };
    return this.#call('Update', api.UpdateTaskRequest, empty, { id, resources: given, annotations: {} });
  }

  [Symbol.dispose](): void {
    this.#client.close();
  }

  /** @throws KilnError with kilnd's words */
  async #call<Request, Response>(
    method: string,
    requestCodec: Pick<MessageCodec<Request>, 'encode'>,
    responseCodec: Pick<MessageCodec<Response>, 'decode'>,
    request: Request,
    service = taskService,
  ): Promise<Response> {
    try {
      const payload = requestCodec.encode(request).finish();
      return responseCodec.decode(await this.#client.call(service, method, payload));
    } catch (error) {
      if (!(error instanceof TtrpcError)) throw error;
      throw new KilnError(KilnError.codeOfStatus(error.code), error.message, { cause: error });
    }
  }
}
