/** CRI as kubelet speaks it: gRPC on containerd's socket. */
import { credentials, type ServiceError } from '@grpc/grpc-js';
import { RuntimeServiceClient } from '../../gen/kubernetes/cri.ts';

type Callback<Response> = (error: ServiceError | null, response: Response) => void;

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

  [Symbol.dispose](): void {
    this.#client.close();
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
