/** containerd's side of the task service: typed calls over a ttrpc client. */
import type { Duplex } from 'node:stream';
import * as api from '../../../gen/containerd/task.ts';
import { type CallOptions, statusName, TtrpcClient, TtrpcError } from '../../../src/rpc/ttrpc/index.ts';

interface Codec<T> {
  encode(message: T): { finish(): Uint8Array };
  decode(bytes: Uint8Array): T;
}

type Fields<T> = Partial<T> & { id?: string };

const nothing: Codec<Record<string, never>> = {
  encode: () => ({ finish: () => new Uint8Array() }),
  decode: () => ({}),
};

export class TaskClient {
  readonly ttrpc: TtrpcClient;
  readonly #service: string;
  readonly #id: string;

  constructor(socket: Duplex, id: string, service = 'containerd.task.v2.Task') {
    this.ttrpc = new TtrpcClient(socket);
    this.#service = service;
    this.#id = id;
  }

  create(fields: Fields<api.CreateTaskRequest> = {}, options: CallOptions = {}) {
    const request = { ...api.CreateTaskRequest.fromPartial({ id: this.#id, bundle: '/run/bundle' }), ...fields };
    return this.call('Create', api.CreateTaskRequest, api.CreateTaskResponse, request, options);
  }
  start(fields: Fields<api.StartRequest> = {}) {
    return this.call('Start', api.StartRequest, api.StartResponse, { execId: '', ...fields });
  }
  state(fields: Fields<api.StateRequest> = {}) {
    return this.call('State', api.StateRequest, api.StateResponse, { execId: '', ...fields });
  }
  wait(fields: Fields<api.WaitRequest> = {}, options: CallOptions = {}) {
    return this.call('Wait', api.WaitRequest, api.WaitResponse, { execId: '', ...fields }, options);
  }
  kill(signal: number, fields: Fields<api.KillRequest> = {}) {
    return this.call('Kill', api.KillRequest, nothing, { execId: '', all: false, signal, ...fields });
  }
  delete(fields: Fields<api.DeleteRequest> = {}) {
    return this.call('Delete', api.DeleteRequest, api.DeleteResponse, { execId: '', ...fields });
  }
  exec(fields: Fields<api.ExecProcessRequest> = {}) {
    const spec = { typeUrl: 'types.containerd.io/opencontainers/runtime-spec/1/Process', value: Buffer.from('{}') };
    const request = { ...api.ExecProcessRequest.fromPartial({ execId: 'e1', spec }), id: this.#id, ...fields };
    return this.call('Exec', api.ExecProcessRequest, nothing, request);
  }
  resizePty(fields: Fields<api.ResizePtyRequest> = {}) {
    return this.call('ResizePty', api.ResizePtyRequest, nothing, { execId: '', width: 0, height: 0, ...fields });
  }
  pids(fields: Fields<api.PidsRequest> = {}) {
    return this.call('Pids', api.PidsRequest, api.PidsResponse, { ...fields });
  }
  pause(fields: Fields<api.PauseRequest> = {}) {
    return this.call('Pause', api.PauseRequest, nothing, { ...fields });
  }
  resume(fields: Fields<api.ResumeRequest> = {}) {
    return this.call('Resume', api.ResumeRequest, nothing, { ...fields });
  }
  stats(fields: Fields<api.StatsRequest> = {}) {
    return this.call('Stats', api.StatsRequest, api.StatsResponse, { ...fields });
  }
  /** @param resources an OCI LinuxResources */
  update(resources: object, fields: Fields<api.UpdateTaskRequest> = {}) {
    const value = Buffer.from(JSON.stringify(resources));
    const any = { typeUrl: 'types.containerd.io/opencontainers/runtime-spec/1/LinuxResources', value };
    return this.call('Update', api.UpdateTaskRequest, nothing, { resources: any, annotations: {}, ...fields });
  }
  closeIo(fields: Fields<api.CloseIORequest> = {}) {
    return this.call('CloseIO', api.CloseIORequest, nothing, { execId: '', stdin: true, ...fields });
  }
  connect(fields: Fields<api.ConnectRequest> = {}) {
    return this.call('Connect', api.ConnectRequest, api.ConnectResponse, { ...fields });
  }
  shutdown(fields: Fields<api.ShutdownRequest> = {}) {
    return this.call('Shutdown', api.ShutdownRequest, nothing, { now: false, ...fields });
  }

  async call<Request, Response>(
    method: string,
    request: Codec<Request>,
    response: Codec<Response>,
    fields: Omit<Request, 'id'> & { id?: string },
    options: CallOptions = {},
  ): Promise<Response> {
    const bytes = request.encode({ id: this.#id, ...fields } as Request).finish();
    return response.decode(await this.ttrpc.call(this.#service, method, bytes, options));
  }

  /** Any method by its name, with an empty payload. */
  raw(method: string): Promise<Buffer> {
    return this.ttrpc.call(this.#service, method, new Uint8Array());
  }
}

/** `NotFound: container c1 does not exist`, or `no error` where there is none. */
export async function errorOf(call: Promise<unknown>): Promise<string> {
  try {
    await call;
    return 'no error';
  } catch (error) {
    return error instanceof TtrpcError ? `${statusName(error.code)}: ${error.message}` : String(error);
  }
}
