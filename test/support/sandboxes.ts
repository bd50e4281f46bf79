/** containerd's sandbox controller "shim", as a client of containerd speaks to it: gRPC on containerd's socket. */
import { once } from 'node:events';
import { readFile } from 'node:fs/promises';
import { connect } from 'node:net';
import { join } from 'node:path';
import { credentials, Metadata, type ServiceError } from '@grpc/grpc-js';
import {
  ControllerClient,
  type ControllerMetricsResponse,
  type ControllerStartResponse,
  type ControllerStatusResponse,
  type ControllerWaitResponse,
  StoreClient,
} from '../../gen/containerd/sandbox_controller.ts';
import type { Any } from '../../gen/google/protobuf/any.ts';
import { PodSandboxConfig } from '../../gen/kubernetes/pod.ts';
import { runtime } from './paths.ts';
import { SandboxClient } from './sandbox-client.ts';
import type { Scene } from './scene.ts';

const sandboxer = 'shim';

export interface SandboxOptions {
  readonly config?: Parameters<typeof PodSandboxConfig.fromPartial>[0];
  /** In place of `config`. */
  readonly options?: Any;
  readonly netnsPath?: string;
}

type Callback<Response> = (error: ServiceError | null, response: Response) => void;

export class Sandboxes implements Disposable {
  readonly #scene: Scene;
  readonly #controller: ControllerClient;
  readonly #store: StoreClient;
  readonly #metadata = new Metadata();

  constructor(scene: Scene) {
    this.#scene = scene;
    const address = `unix://${scene.containerd.address}`;
    this.#controller = new ControllerClient(address, credentials.createInsecure());
    this.#store = new StoreClient(address, credentials.createInsecure());
    this.#metadata.set('containerd-namespace', 'default');
  }

  /** Also notes the sandbox in containerd's records, without which it would not outlive containerd. */
  async create(id: string, { config = {}, options, netnsPath = '' }: SandboxOptions = {}): Promise<void> {
    const value = Buffer.from(PodSandboxConfig.encode(PodSandboxConfig.fromPartial(config)).finish());
    const sandbox = {
      ...{ sandboxId: id, sandboxer, spec: undefined },
      runtime: { name: runtime, options: undefined },
    };
    await this.#call((done) => this.#store.create({ sandbox }, this.#metadata, done));
    const request = {
      ...{ sandboxId: id, sandboxer, sandbox, netnsPath },
      options: options ?? { typeUrl: 'runtime.v1.PodSandboxConfig', value },
    };
    try {
      await this.#call((done) => this.#controller.create(request, this.#metadata, done));
    } catch (error) {
      await this.#forget(id);
      throw error;
    }
  }

  start(sandboxId: string): Promise<ControllerStartResponse> {
    return this.#call((done) => this.#controller.start({ sandboxId, sandboxer }, this.#metadata, done));
  }

  async run(id: string, options?: SandboxOptions): Promise<ControllerStartResponse> {
    await this.create(id, options);
    return this.start(id);
  }

  status(sandboxId: string, verbose = false): Promise<ControllerStatusResponse> {
    return this.#call((done) => this.#controller.status({ sandboxId, sandboxer, verbose }, this.#metadata, done));
  }

  metrics(sandboxId: string): Promise<ControllerMetricsResponse> {
    return this.#call((done) => this.#controller.metrics({ sandboxId, sandboxer }, this.#metadata, done));
  }

  wait(sandboxId: string): Promise<ControllerWaitResponse> {
    return this.#call((done) => this.#controller.wait({ sandboxId, sandboxer }, this.#metadata, done));
  }

  async stop(sandboxId: string, timeoutSecs = 0): Promise<void> {
    await this.#call((done) => this.#controller.stop({ sandboxId, sandboxer, timeoutSecs }, this.#metadata, done));
  }

  async shutdown(sandboxId: string): Promise<void> {
    await this.#call((done) => this.#controller.shutdown({ sandboxId, sandboxer }, this.#metadata, done));
    await this.#forget(sandboxId);
  }

  #forget(sandboxId: string): Promise<unknown> {
    return this.#call((done) => this.#store.delete({ sandboxId }, this.#metadata, done));
  }

  /** The bundle of a sandbox: containerd keeps them apart from those of tasks. */
  bundle(id: string): string {
    return join(this.#scene.containerd.dir, 'state', 'io.containerd.sandbox.controller.v1.shim', 'default', id);
  }

  /** A connection of the test's own to the socket that containerd dials. Dispose of its `ttrpc`. */
  async dial(id: string): Promise<SandboxClient> {
    const address = await readFile(join(this.bundle(id), 'address'), 'utf8');
    const socket = connect(address.replace('unix://', ''));
    await once(socket, 'connect');
    return new SandboxClient(socket, id);
  }

  #call<Response>(method: (done: Callback<Response>) => unknown): Promise<Response> {
    return new Promise((resolve, reject) => {
      method((error, response) => (error === null ? resolve(response) : reject(error)));
    });
  }

  [Symbol.dispose](): void {
    this.#controller.close();
    this.#store.close();
  }
}
