/** CRI as kubelet speaks it: gRPC on containerd's socket. */
import { credentials, type ServiceError } from '@grpc/grpc-js';
import {
  type ContainerStats,
  type ContainerStatus,
  type ContainerStatusResponse,
  type CreateContainerResponse,
  type ExecSyncResponse,
  type ListContainerStatsResponse,
  type PodSandboxStats,
  type PodSandboxStatsResponse,
  type PodSandboxStatus,
  type PodSandboxStatusResponse,
  type PortForwardResponse,
  type RunPodSandboxResponse,
  RuntimeServiceClient,
} from '../../gen/kubernetes/cri.ts';
import {
  type LinuxContainerResources,
  NamespaceMode,
  type NamespaceOption,
  type PodSandboxConfig,
} from '../../gen/kubernetes/pod.ts';

type Callback<Response> = (error: ServiceError | null, response: Response) => void;

/** Nothing of it is given: containerd then sets nothing. */
export const noResources: LinuxContainerResources = {
  cpuPeriod: 0n,
  cpuQuota: 0n,
  cpuShares: 0n,
  memoryLimitInBytes: 0n,
};

/** As kubelet asks for it without `shareProcessNamespace`. */
export const usualNamespaces: NamespaceOption = {
  network: NamespaceMode.POD,
  pid: NamespaceMode.CONTAINER,
  ipc: NamespaceMode.POD,
  targetId: '',
  usernsOptions: undefined,
};

export class Cri implements Disposable {
  readonly #client: RuntimeServiceClient;

  constructor(address: string) {
    this.#client = new RuntimeServiceClient(`unix://${address}`, credentials.createInsecure());
  }

  /** `cri.call((client, done) => client.version({ version: '' }, done))` */
  call<Response>(method: (client: RuntimeServiceClient, done: Callback<Response>) => unknown): Promise<Response> {
    return new Promise((resolve, reject) => {
      method(this.#client, (error, response) => (error === null ? resolve(response) : reject(error)));
    });
  }

  /** RunPodSandbox. */
  async run(config: PodSandboxConfig, runtimeHandler: string): Promise<CriPod> {
    const { podSandboxId } = await this.call<RunPodSandboxResponse>((client, done) =>
      client.runPodSandbox({ config, runtimeHandler }, done),
    );
    return new CriPod(this, podSandboxId, config);
  }

  [Symbol.dispose](): void {
    this.#client.close();
  }
}

export interface CriContainer {
  readonly name: string;
  readonly attempt?: number;
  readonly image: string;
  readonly command: readonly string[];
  readonly namespaces?: NamespaceOption;
  readonly resources?: Partial<LinuxContainerResources>;
}

/** A pod sandbox with its containers. */
export class CriPod {
  readonly id: string;
  readonly #cri: Cri;
  readonly #config: PodSandboxConfig;

  constructor(cri: Cri, id: string, config: PodSandboxConfig) {
    this.#cri = cri;
    this.id = id;
    this.#config = config;
  }

  /** CreateContainer. */
  async create({ name, attempt = 0, image, command, ...linux }: CriContainer): Promise<string> {
    const { namespaces: namespaceOptions = usualNamespaces, resources } = linux;
    const config = {
      metadata: { name, attempt },
      image: { image },
      command: [...command],
      logPath: `${name}-${attempt}.log`,
      linux: { resources: { ...noResources, ...resources }, securityContext: { namespaceOptions } },
    };
    const request = { podSandboxId: this.id, config, sandboxConfig: this.#config };
    const { containerId } = await this.#cri.call<CreateContainerResponse>((client, done) =>
      client.createContainer(request, done),
    );
    return containerId;
  }

  async start(container: CriContainer): Promise<string> {
    const containerId = await this.create(container);
    await this.startCreated(containerId);
    return containerId;
  }

  async startCreated(containerId: string): Promise<void> {
    await this.#cri.call((client, done) => client.startContainer({ containerId }, done));
  }

  /** ExecSync; stdout and stderr. */
  async exec(containerId: string, ...cmd: string[]): Promise<string> {
    const answer = await this.#cri.call<ExecSyncResponse>((client, done) =>
      client.execSync({ containerId, cmd, timeout: 60n }, done),
    );
    return `${answer.stdout}${answer.stderr}`.trim();
  }

  async update(containerId: string, limits: Partial<LinuxContainerResources>): Promise<void> {
    const linux = { ...noResources, ...limits };
    await this.#cri.call((client, done) => client.updateContainerResources({ containerId, linux }, done));
  }

  async containerStatus(containerId: string): Promise<ContainerStatus | undefined> {
    const { status } = await this.#cri.call<ContainerStatusResponse>((client, done) =>
      client.containerStatus({ containerId }, done),
    );
    return status;
  }

  /** ListContainerStats of the pod. */
  async containerStats(): Promise<ContainerStats[]> {
    const filter = { podSandboxId: this.id };
    const { stats } = await this.#cri.call<ListContainerStatsResponse>((client, done) =>
      client.listContainerStats({ filter }, done),
    );
    return stats;
  }

  async status(): Promise<PodSandboxStatus | undefined> {
    const { status } = await this.#cri.call<PodSandboxStatusResponse>((client, done) =>
      client.podSandboxStatus({ podSandboxId: this.id }, done),
    );
    return status;
  }

  async stats(): Promise<PodSandboxStats | undefined> {
    const { stats } = await this.#cri.call<PodSandboxStatsResponse>((client, done) =>
      client.podSandboxStats({ podSandboxId: this.id }, done),
    );
    return stats;
  }

  /** PortForward: where a client gets the port. */
  async portForward(port: number): Promise<string> {
    const { url } = await this.#cri.call<PortForwardResponse>((client, done) =>
      client.portForward({ podSandboxId: this.id, port: [port] }, done),
    );
    return url;
  }

  /** StopContainer. */
  async stop(containerId: string): Promise<void> {
    await this.#cri.call((client, done) => client.stopContainer({ containerId, timeout: 30n }, done));
  }

  async removeContainer(containerId: string): Promise<void> {
    await this.#cri.call((client, done) => client.removeContainer({ containerId }, done));
  }

  /** StopPodSandbox. */
  async stopAll(): Promise<void> {
    await this.#cri.call((client, done) => client.stopPodSandbox({ podSandboxId: this.id }, done));
  }

  /** StopPodSandbox and RemovePodSandbox, which removes the containers. */
  async remove(): Promise<void> {
    await this.stopAll();
    await this.#cri.call((client, done) => client.removePodSandbox({ podSandboxId: this.id }, done));
  }
}

/**
 * A program for Node that speaks with a port of a pod as kubelet's clients do: by WebSocket at the address that CRI's PortForward
 * has given (k8s.io/kubelet, pkg/cri/streaming/portforward/websocket.go). Each message begins with the number of a channel: 0 for
 * the port's bytes, 1 for an error; the first message on each is the port's number.
 *
 * Its arguments: the address with the port, and what is sent. Ends when as many bytes have come back, and prints them.
 */
export const portForwardClient = `
const [url, text] = process.argv.slice(1);
const socket = new WebSocket(url, ['v4.channel.k8s.io']);
socket.binaryType = 'arraybuffer';
const first = new Set();
let answer = '';
socket.onopen = () => socket.send(Buffer.concat([Buffer.from([0]), Buffer.from(text)]));
socket.onerror = ({ message }) => { process.stderr.write(String(message)); process.exitCode = 1; };
socket.onmessage = ({ data }) => {
  const [channel, ...bytes] = Buffer.from(data);
  if (!first.has(channel)) { first.add(channel); return; }
  if (channel === 1) { process.stderr.write(Buffer.from(bytes)); process.exitCode = 1; socket.close(); return; }
  answer += Buffer.from(bytes);
  if (answer.length >= text.length) { process.stdout.write(answer); socket.close(); }
};
`;
