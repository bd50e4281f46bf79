/** containerd's side of the sandbox service: typed calls over a ttrpc client. */
import type { Duplex } from 'node:stream';
import * as api from '../../gen/containerd/sandbox.ts';
import { type CallOptions, TtrpcClient } from '../../src/rpc/ttrpc/index.ts';

interface Codec<T> {
  encode(message: T): { finish(): Uint8Array };
  decode(bytes: Uint8Array): T;
  fromPartial(fields: object): T;
}

export class SandboxClient {
  readonly ttrpc: TtrpcClient;
  readonly #id: string;

  constructor(socket: Duplex, id: string) {
    this.ttrpc = new TtrpcClient(socket);
    this.#id = id;
  }

  create(fields: Partial<api.CreateSandboxRequest> = {}, options: CallOptions = {}) {
    return this.#call('CreateSandbox', api.CreateSandboxRequest, api.CreateSandboxResponse, fields, options);
  }
  start(sandboxId = this.#id) {
    return this.#call('StartSandbox', api.StartSandboxRequest, api.StartSandboxResponse, { sandboxId });
  }
  platform(sandboxId = this.#id) {
    return this.#call('Platform', api.PlatformRequest, api.PlatformResponse, { sandboxId });
  }
  stop(timeoutSecs = 0, sandboxId = this.#id) {
    return this.#call('StopSandbox', api.StopSandboxRequest, api.StopSandboxResponse, { sandboxId, timeoutSecs });
  }
  wait(sandboxId = this.#id) {
    return this.#call('WaitSandbox', api.WaitSandboxRequest, api.WaitSandboxResponse, { sandboxId });
  }
  status(verbose = false, sandboxId = this.#id) {
    return this.#call('SandboxStatus', api.SandboxStatusRequest, api.SandboxStatusResponse, { sandboxId, verbose });
  }
  ping(sandboxId = this.#id) {
    return this.#call('PingSandbox', api.PingRequest, api.PingResponse, { sandboxId });
  }
  shutdown(sandboxId = this.#id) {
    return this.#call('ShutdownSandbox', api.ShutdownSandboxRequest, api.ShutdownSandboxResponse, { sandboxId });
  }
  metrics(sandboxId = this.#id) {
    return this.#call('SandboxMetrics', api.SandboxMetricsRequest, api.SandboxMetricsResponse, { sandboxId });
  }

  async #call<Request, Response>(
    method: string,
    request: Codec<Request>,
    response: Codec<Response>,
    fields: object,
    options: CallOptions = {},
  ): Promise<Response> {
    const bytes = request.encode(request.fromPartial({ sandboxId: this.#id, ...fields })).finish();
    const service = 'containerd.runtime.sandbox.v1.Sandbox';
    return response.decode(await this.ttrpc.call(service, method, bytes, options));
  }
}
